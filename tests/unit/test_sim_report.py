"""The report is one file that asks nobody for anything, holds the run's figures, and stays small for large runs."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peerturb import cli
from peerturb_sim.drawings import CELLS, POINTS_MAX, at_once, thin
from peerturb_sim.report import FAULTS_MAX, PEERS_MAX, _held_out, page, write_report
from peerturb_sim.result import BrokenRow, EvaluationRow, FaultRow, LogRow, PeerRow, Result, RoundRow
from peerturb_sim.scenario import Scenario
from peerturb_sim.scenario_text import scenario_toml
from tests.conftest import REPOSITORY

VOID_TAGS = {"meta", "link"}


def make_result(*, rounds: int = 6, peers: int = 5, faults: int = 3) -> Result:
    """A run of two-second rounds; the third is sealed by its deadline and has no loss; peer 0 lies."""
    rows = [
        RoundRow(
            round=number, opened_s=2.0 * number, sealed_s=2.0 * number + 1.5,
            loss=None if number == 2 else 4.0 - number / 9,
            reason="deadline" if number == 2 else "everyone", peers=peers, connected=peers, codes=8 * peers,
            void_codes=0, scale=0.5, alpha=1e-3, bytes_up=48 * peers, bytes_down=90 * peers,
        )
        for number in range(rounds)
    ]  # fmt: skip
    given = [
        PeerRow(
            peer=number, name=f"home-{number}", group="home", slots=[number], lie="" if number else "extreme",
            probes_per_s=30.0, present_s=12.0, sessions=1, measured=8 * rounds, contributions=rounds, codes=8 * rounds,
            refused=0, crashes=0, rebuilds=0, bytes_up=48 * rounds, bytes_down=90 * rounds, stopped="",
        )
        for number in range(peers)
    ]  # fmt: skip
    return Result(
        name="storm <&>", seed=11, compute="toy", scenario={"name": "storm", "note": "<b>"}, spec_digest="ab" * 32,
        is_finished=True, virtual_s=2.0 * rounds, log=LogRow(file="run.runlog", records=40, bytes=900, chain="cd" * 32),
        rounds=rows, peers=given, seals={"everyone": rounds - 1, "deadline": 1}, rejects={"stale_round": 4},
        evaluations=[EvaluationRow(round=3, at_s=5.0, peer=1, loss=3.5, accuracy=None)],
        faults=[
            FaultRow(at_s=number / 10, until_s=None, kind="peer_crash", who=f"home-{number}")
            for number in range(faults)
        ],
    )  # fmt: skip


class Reader(HTMLParser):
    """Checks that tags close in order; collects identifiers, tags with their attributes, and rows of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def text() -> str:
    return page(make_result(), command="peerturb sim run storm.toml --seed 11")


def test_the_page_is_whole_and_asks_nobody(text: str) -> None:
    reader = read(text)
    assert len(reader.ids) == len(set(reader.ids)), "drawings share no identifiers"
    for tag, attributes in reader.seen:
        assert tag not in ("script", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
            assert not value.startswith("#") or value == "#" or value[1:] in reader.ids
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_it_holds_the_figures_and_the_command(text: str) -> None:
    said = read(text).text
    for words in (
        "storm <&>: 5 simulated peers, 6 rounds", "Seed 11", "of 6 rounds were sealed by the deadline",
        "peerturb sim run storm.toml --seed 11",
        "stale_round 4", "lie: extreme", "cdcdcdcdcdcdcdcd after 40 records", "no checker saw an invariant broken",
        "peer crash (3)", "sealed by its deadline", "held-out, as peers say",
    ):  # fmt: skip
        assert words in said, words
    assert "<b>" not in re.sub(r'<div class="tile"><b>', "", text), "what a scenario says is no markup"


def test_colours_are_the_pages_and_lines_differ_without_them(text: str) -> None:
    drawn = text[text.index("<main>") :]
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    assert {"blue", "amber", "soft", "line"} <= set(re.findall(r"var\(--(\w+)\)", drawn))
    assert "stroke-dasharray" in drawn


def test_the_same_result_gives_the_same_page(text: str) -> None:
    assert page(make_result(), command="peerturb sim run storm.toml --seed 11") == text


def test_what_went_wrong_stands_at_the_top() -> None:
    broken = replace(make_result(), broken=[BrokenRow(at_s=3.0, name="agreement", text="peers 1 and 2 < differ")])
    said = read(page(broken, command="x")).text
    assert "Invariants were broken" in said
    assert "peers 1 and 2 < differ" in said
    assert "no checker saw" not in said
    assert "Not all rounds were sealed" in page(replace(make_result(), is_finished=False), command="x")


def test_a_run_without_rounds_or_faults_has_a_page() -> None:
    empty = replace(make_result(faults=0), rounds=[], peers=[], evaluations=[], virtual_s=0.0)
    said = read(page(empty, command="x")).text
    assert "No round was sealed" in said
    assert "Nothing went wrong" in said


@pytest.mark.parametrize("path", sorted((REPOSITORY / "sim" / "scenarios").glob("*.toml")), ids=lambda path: path.stem)
def test_the_scenario_it_shows_is_the_scenario(path: Path, tmp_path: Path) -> None:
    scenario = Scenario.load(path)
    shown = scenario_toml(scenario.model_dump(mode="json"))
    (tmp_path / "scenario.toml").write_text(shown, encoding="utf-8")
    assert Scenario.load(tmp_path / "scenario.toml") == scenario
    result = replace(make_result(), scenario=scenario.model_dump(mode="json"))
    assert shown in read(page(result)).text
    assert f"peerturb sim run scenario.toml --seed {result.seed}" in page(result)


def test_evaluations_of_a_round_are_averaged() -> None:
    rows = [(10, 5.0, 3.0), (10, 7.0, 4.0), (20, 9.0, None), (20, 11.0, 2.0)]
    claims = [EvaluationRow(round=round_, at_s=at_s, peer=0, loss=loss, accuracy=None) for round_, at_s, loss in rows]
    assert _held_out(replace(make_result(), evaluations=claims)) == [(6.0, 3.5), (11.0, 2.0)]


def test_large_runs_stay_small() -> None:
    large = make_result(rounds=5_000, peers=10_000, faults=3_000)
    whole = page(large, command="x")
    assert len(whole) < 1_000_000
    said = read(whole).text
    assert f"{10_000 - PEERS_MAX:,} others" in said
    assert f"{(10_000 - PEERS_MAX) * 8 * 5_000:,}" in said, "the rest is summed"
    assert f"the first {FAULTS_MAX} of 3,000" in said
    assert "mean of 7 rounds" in said


def test_thinned_curves_keep_their_ends_and_means() -> None:
    xs = [float(x) for x in range(10 * POINTS_MAX)]
    points = thin(xs, xs)
    assert len(points) == POINTS_MAX
    assert points[0] == (4.5, 4.5)
    assert sum(y for _, y in points) == pytest.approx(sum(xs) / 10)
    assert thin([1.0, 2.0, 3.0, 4.0], [None, math.nan, math.inf, 5.0]) == [(4.0, 5.0)]


def test_moments_and_spans_are_counted_along_the_timeline() -> None:
    moments = at_once([(0.0, 0.0), (100.0, 100.0), (150.0, 150.0)], 100.0)
    assert len(moments) == CELLS
    assert (moments[0], moments[-1], sum(moments)) == (1, 2, 3), "what comes after the end stands at the end"
    spans = at_once([(10.0, 19.9), (15.0, 29.9)], 100.0)
    assert spans == [0] * 40 + [1] * 20 + [2] * 20 + [1] * 40 + [0] * 280
    assert at_once([(0.0, 0.0)], 0.0)[0] == 1


def test_the_command_writes_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(make_result().to_json())
    assert cli.run(["sim", "report", str(tmp_path)]) == 0
    read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert cli.run(["sim", "report", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    with pytest.raises(Exception, match="cannot write the report"):
        write_report(tmp_path / "no" / "where.html", make_result(), command="x")
