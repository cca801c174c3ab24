"""How long the live page takes to load in headless Chromium, from a coordinator on loopback with 1 000 peers.

value: ms from the start of the navigation until curve and table of peers are drawn, the median of several loads;
reference: 1 000 ms; ratio: value / reference, at most 1. One row for a phone's width and one for a desktop's. Chromium
must be there (`make setup-browser`).
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from peerturb_bench.browser import Browser, open_browser
from peerturb_bench.crowd import InThread, crowd
from peerturb_bench.rows import Row

LIMIT_MS = 1_000.0
WIDTHS = {"phone": 390, "desktop": 1_280}
LOADS, QUICK_LOADS = 11, 3

DRAWN = "document.querySelectorAll('#peers tr').length > 0 && document.querySelector('#loss-chart svg') !== null"
"""True once curve and table are there."""
_WAIT = f"""
const done = arguments[0];
const look = () => ({DRAWN}) ? done(performance.now()) : requestAnimationFrame(look);
look();
"""


def run(quick: bool = False) -> list[Row]:
    """Measure and return a row for each width."""
    with TemporaryDirectory(prefix="peerturb-page-") as name:
        folder = Path(name)
        for part in ("run", "browser"):
            (folder / part).mkdir()
        served = InThread(*crowd(folder / "run"))
        try:
            with open_browser(folder / "browser") as browser:
                return [_row(browser, served, kind, QUICK_LOADS if quick else LOADS) for kind in WIDTHS]
        finally:
            served.stop()


def _row(browser: Browser, served: InThread, kind: str, loads: int) -> Row:
    found = [_load_ms(browser, served, WIDTHS[kind]) for _ in range(loads + 1)][1:]  # the first one starts the engine
    value = statistics.median(found)
    return Row(
        name=f"{kind}, {WIDTHS[kind]} px wide", value=round(value, 1), unit="ms", reference=LIMIT_MS,
        ratio=round(value / LIMIT_MS, 3), note=f"slowest {max(found):.0f} ms",
    )  # fmt: skip


def _load_ms(browser: Browser, served: InThread, width: int) -> float:
    browser.open(f"{served.address}/", width=width)
    return float(browser.wait(_WAIT))  # milliseconds since the navigation began, by the browser's clock
