"""Headless Chromium for tests and measurements of pages, by the WebDriver protocol (W3C): JSON on HTTP.

It knows nothing of the pages.
"""

import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from peerturb.errors import PeerturbError

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
)  # fmt: skip
_HERE = build_opener(ProxyHandler({}))
"""Asks this computer, whatever proxies the environment names."""
_ANSWER_S = 120.0
"""Longest wait for the driver: it starts a whole browser on what may be a busy machine."""


class NoBrowserError(PeerturbError):
    """Chromium or its driver is missing."""


class BrowserError(PeerturbError):
    """The driver refuses: a script failed, a page did not answer."""


class Browser:
    """One window of one browser.

    Args:
        address: of the driver, `http://127.0.0.1:PORT`.
        folder: an empty one, for the browser's profile.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self._base = f"{address}/session"
        options = {"args": [*_FLAGS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        timeouts = {"script": int(1000 * _ANSWER_S)}
        wanted = {
            "timeouts": timeouts,
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._base += "/" + self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def open(self, page: Path | str, *, width: int, is_dark: bool = False, height: int = 900) -> None:
        """Load a page, a file's or an address, into a window of so many CSS pixels, in light or dark dress."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", size)
        dress = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"features": [dress]})
        self._ask("POST", "/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Return what a JavaScript function's body returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str) -> Any:
        """Return what a JavaScript function's body hands to its last argument, a function, sooner or later."""
        return self._ask("POST", "/execute/async", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """Return what the console has been told since the last question, refused requests included."""
        return [row["message"] for row in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last question."""
        rows = [json.loads(row["message"])["message"] for row in self._ask("POST", "/se/log", {"type": "performance"})]
        return [row["params"]["request"]["url"] for row in rows if row["method"] == "Network.requestWillBeSent"]

    def picture(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        whole = self._command("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(b64decode(whole["data"]))

    def close(self) -> None:
        """End the browser."""
        self._ask("DELETE", "", None)

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            with _HERE.open(Request(self._base + path, data, method=method), timeout=_ANSWER_S) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            raise BrowserError(f"the driver answers {method} {path} with {error.code}: {said[:1_000]}") from error


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Run a driver and a browser for as long as the context lasts.

    Args:
        folder: an empty one, for the browser's profile and its home.

    Raises:
        NoBrowserError: there is none.
    """
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            raise NoBrowserError(f"there is no {program}; `make setup-browser` installs it on Debian, as root")
    environment = {**os.environ, "HOME": str(folder)}
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as driver:
        try:
            assert driver.stdout is not None
            found = next(filter(None, (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)))
            browser = Browser(f"http://127.0.0.1:{found[1]}", folder / "profile")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
