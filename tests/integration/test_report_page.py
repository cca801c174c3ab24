"""The report of a simulated run in a real browser: it loads in silence, fits a phone, and shows the run's figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peerturb.spec import RoundSpec
from peerturb_sim import amounts
from peerturb_sim.report import PEERS_MAX, write_report
from peerturb_sim.result import Result
from peerturb_sim.scenario import FaultSpec, GroupSpec, LifeSpec, Scenario
from peerturb_sim.simulation import simulate
from tests.browser import Browser, open_browser

pytestmark = [pytest.mark.slow, pytest.mark.integration]

_WIDE_CHILDREN = """
const room = document.documentElement.clientWidth, found = [];
for (const node of document.querySelectorAll("main *")) {
  if (node.closest(".scroll")?.contains(node) && !node.matches(".scroll")) continue;
  if (node.closest("pre") || node.closest("svg")) continue;
  const box = node.getBoundingClientRect();
  if (box.width && (box.right > room + 0.5 || box.left < -0.5)) found.push(node.tagName + node.textContent);
}
return found;
"""
"""What sticks out of the page, but for what scrolls by itself."""
_CUT_TILES = """
return [...document.querySelectorAll(".tile, .tile b")].filter(node => node.scrollWidth > node.clientWidth + 1)
  .map(node => node.textContent);
"""
_SIZES = """
const page = document.documentElement;
return {shown: innerWidth, room: page.clientWidth, whole: page.scrollWidth};
"""
_DRAWN = """
const height = node => node.getBoundingClientRect().height;
return [...document.querySelectorAll("svg.plot")].filter(height).map(node => ({
  name: node.getAttribute("aria-label"), text: node.textContent,
  letters: Math.min(...[...node.querySelectorAll("text")].filter(text => !text.style.transform).map(height)),
}));
"""
_LETTERS_PX = 9.0
"""Height of a line of a drawing's text, from which it can be read on a phone."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run with all that a page can show, and its page."""
    folder = tmp_path_factory.mktemp("run")
    scenario = Scenario(
        name="a storm of people whose names are longer than usual", seed=3,
        round=RoundSpec(count=40, budget_ms=500, deadline_ms_max=4_000),
        peers=(
            GroupSpec(
                name="people-with-mobile-lines", count=PEERS_MAX + 20, line="mobile", evaluates=True, evaluate_ms=20,
                life=LifeSpec(arrive_s=(0, 60), stay_s=60, away_s=20), crashes_per_hour=60, pauses_per_hour=30,
            ),
            GroupSpec(name="liars", count=8, lie="extreme"),
        ),
        faults=(
            FaultSpec(kind="coordinator_crash", at_s=20), FaultSpec(kind="partition", at_s=40, share=0.5),
            FaultSpec(kind="corruption", at_s=50, share=0.1),
        ),
    )  # fmt: skip
    result = simulate(scenario, folder=folder, out=folder)
    write_report(folder / "report.html", result)
    return result, folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_loads_in_silence_and_fits(browser: Browser, run: tuple[Result, Path], width: int, is_dark: bool) -> None:
    page = run[1]
    browser.open(page, width=width, is_dark=is_dark)
    browser.complaints(), browser.requests()  # of the page before
    browser.open(page, width=width, is_dark=is_dark)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    sizes = browser.run(_SIZES)
    assert sizes["shown"] == width, "a phone shows more than its width where something sticks out"
    assert sizes["whole"] <= sizes["room"]
    assert browser.run(_WIDE_CHILDREN) == []
    assert browser.run(_CUT_TILES) == []
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    red = int(colour.removeprefix("rgb(").split(",")[0])
    assert red < 60 if is_dark else red > 200, colour


@pytest.mark.parametrize("width", [390, 1280])
def test_it_shows_the_figures_of_the_run(browser: Browser, run: tuple[Result, Path], width: int) -> None:
    result, page = run
    browser.open(page, width=width)
    shown: str = browser.run("return document.body.innerText")
    losses = [row.loss for row in result.rounds if row.loss is not None]
    codes = sum(row.codes for row in result.rounds)
    assert len(result.rounds) == 40, "the run is what this test was written for"
    for words in (
        f"{len(result.peers)} simulated peers, 40 rounds", f"{losses[0]:.4g} → {losses[-1]:.4g}",
        f"{codes:,}", amounts.size(result.bytes_up), amounts.size(result.bytes_down), amounts.size(result.log.bytes),
        f"the {PEERS_MAX} who gave most", "28 others", "lie: extreme", result.log.chain[:16],
    ):  # fmt: skip
        assert words in shown, words
    drawings: list[dict[str, Any]] = browser.run(_DRAWN)
    assert [drawing["name"] for drawing in drawings] == [
        "loss by virtual time", "peers by virtual time", "seconds a round by virtual time", "bytes a round",
        "timeline of faults",
    ]  # fmt: skip
    for drawing in drawings:
        assert drawing["letters"] >= _LETTERS_PX, drawing["name"]
        assert "virtual time" in drawing["text"]
    for kind in ("coordinator crash (1)", "partition (1)", "corruption (", "peer crash (", "pause ("):
        assert kind in drawings[-1]["text"], kind
