"""The live page in a real browser: a crowd of a thousand peers at once, then a run of real processes as it goes."""

import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerturb.spec import RunSpec
from peerturb_bench.crowd import NAME, ROUNDS, InThread
from peerturb_bench.crowd import crowd as crowd_of
from peerturb_bench.page import DRAWN, _load_ms
from tests.browser import Browser, open_browser
from tests.integration.network import network, toy_run

pytestmark = [pytest.mark.slow, pytest.mark.integration]

_WIDE = """
const room = document.documentElement.clientWidth, found = [];
for (const node of document.querySelectorAll("main *")) {
  if (node.closest(".scroll, .events, pre, svg, .unseen")) continue;
  const box = node.getBoundingClientRect();
  if (box.width && (box.right > room + 0.5 || box.left < -0.5)) found.push(node.tagName + node.className);
}
return found;
"""
_LOADED = f"return {DRAWN}"


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, list[bytes]]:
    """The log of a thousand simulated peers, one of them a stranger with an odd name."""
    return crowd_of(tmp_path_factory.mktemp("crowd"))


@pytest.fixture(scope="module")
def crowded(crowd: tuple[RunSpec, list[bytes]]) -> Iterator[InThread]:
    served = InThread(*crowd)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def get(address: str | urllib.request.Request) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def wait_for(browser: Browser, script: str) -> None:
    """Wait until the script says true; the driver's time limit ends it. What is not drawn yet is not there yet."""
    asked = (
        f"const until = () => {{ try {{ {script} }} catch (error) {{ return false; }} }}; const done = arguments[0];"
    )
    assert browser.wait(f"{asked} const look = () => until() ? done(true) : setTimeout(look, 20); look();")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_loads_in_silence_fits_and_can_be_read_by_all(
    browser: Browser, crowded: InThread, width: int, is_dark: bool
) -> None:
    page = f"{crowded.address}/"
    browser.open(page, width=width, is_dark=is_dark)
    browser.complaints(), browser.requests()  # of the page before
    browser.open(page, width=width, is_dark=is_dark)
    wait_for(browser, _LOADED)
    assert browser.complaints() == []
    asked = browser.requests()
    assert f"{page}events" in asked
    assert all(address.startswith((crowded.address, "data:")) for address in asked), asked
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run(_WIDE) == []
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    browser.run(Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = browser.wait("axe.run(document).then(arguments[0])")
    bad = [(row["id"], row["impact"], row["nodes"][0]["html"]) for row in found["violations"]]
    assert [row for row in bad if row[1] in ("serious", "critical")] == []


def test_the_benchmark_sees_it_drawn(browser: Browser, crowded: InThread) -> None:
    assert 0 < _load_ms(browser, crowded, 390) < 60_000


def test_it_shows_the_run_and_no_secret(browser: Browser, crowded: InThread) -> None:
    browser.open(f"{crowded.address}/", width=1280)
    wait_for(browser, _LOADED)
    shown: str = browser.run("return document.body.innerText")
    for words in (
        "a crowd", "120", "of 120", "0 of ", " connected", "Show all ", "finished",
        "peerturb node run --coordinator 127.0.0.1:", "The operator of this run has the join token.",
    ):  # fmt: skip
        assert words in shown, words
    assert f"{NAME} joined" in shown, "a stranger's name is text"
    assert browser.run("return document.title") == "a crowd · peerturb"
    assert browser.run("return document.querySelectorAll('#peers tr').length") == 50
    browser.run("document.getElementById('more').click()")
    assert browser.run("return document.querySelectorAll('#peers tr').length") > 990
    whole = get(f"{crowded.address}/run.json")[1]
    assert "secret-token" not in whole
    document = json.loads(whole)
    assert [row[0] for row in document["curve"]] == list(range(ROUNDS))
    assert {row[0] for row in document["evaluations"]} >= {20, 40}


def test_it_is_read_only_and_sends_no_strangers_scripts(crowded: InThread) -> None:
    status, text, headers = get(f"{crowded.address}/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "http" not in text.replace("/run.json", ""), "nothing comes from elsewhere"
    for path in ("/nothing", "/live.py", "/../settings.py", "/%2e%2e/settings.py"):
        assert get(crowded.address + path)[0] == 404, path
    request = urllib.request.Request(f"{crowded.address}/run.json", b"{}", method="POST")
    assert get(request)[0] == 405
    assert get(f"{crowded.address}/healthz")[:2] == (200, "alive\n")
    assert get(f"{crowded.address}/readyz")[:2] == (200, "ready\n")


def test_a_page_that_fails_stops_nothing(crowded: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(crowded.server.runner, "status", broken)
    assert get(f"{crowded.address}/run.json")[:2] == (500, "this page failed; the program goes on\n")
    monkeypatch.undo()
    assert get(f"{crowded.address}/run.json")[0] == 200
    crowded.server.runner.fault = "no space left"
    try:
        assert get(f"{crowded.address}/readyz")[:2] == (503, "no round is sealed: no space left\n")
        assert get(f"{crowded.address}/healthz")[0] == 200
    finally:
        crowded.server.runner.fault = ""


def test_it_follows_a_run_of_real_processes_through_a_kill(browser: Browser, tmp_path: Path) -> None:
    with network(tmp_path, toy_run(deadline_ms=500, deadline_ms_max=1_000)) as run:
        coordinator = run.start_coordinator("--http", "127.0.0.1:0")
        address = coordinator.wait_for(lambda event: event["event"] == "serving")["http"]
        ann, _ = run.start_node("ann"), run.start_node("bob")
        browser.open(f"http://{address}/", width=1280)
        rounds = "Number(document.querySelector('#tiles dd').firstChild.textContent.replaceAll(',', ''))"
        wait_for(browser, f"return {rounds} >= 5 && document.querySelectorAll('#timeline rect').length >= 5")
        assert browser.run("return document.getElementById('state').textContent") == "running"
        wait_for(browser, "return document.getElementById('duration-text').textContent.includes(' longer than ')")
        before = browser.run(f"return {rounds}")
        ann.kill()
        wait_for(browser, "return document.getElementById('events').textContent.includes('ann is away')")
        wait_for(browser, f"return {rounds} > {before} + 5")
        shown: str = browser.run("return document.body.innerText")
        assert "bob joined" in shown
        assert "B down to each peer" in shown
        assert coordinator.stop() == 0
        wait_for(browser, "return document.getElementById('line').textContent.includes('is lost')")
        browser.open("about:blank", width=1280)
