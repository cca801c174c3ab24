"""The demo's results: summary, report and examples say what was measured, and say it when something is wrong."""

import html.parser
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from peerturb.errors import DataError
from peerturb_node.demo.checks import are_same_models
from peerturb_node.demo.events import Story
from peerturb_node.demo.examples import Answer, Verdict, choose
from peerturb_node.demo.folder import DemoFolder
from peerturb_node.demo.report import limits, write_report
from peerturb_node.demo.summary import Summary, closing_page, is_good, next_lines, size, summarize
from peerturb_node.demo.svg import Level, Marker, Series, chart, nice_ticks
from tests.unit import demo_story

SUMMARY_FIELDS = (
    "accuracy_before", "accuracy_after", "loss_before", "loss_after", "rounds", "probes", "seconds",
    "bytes_up_per_code", "bytes_down_per_code", "digests_equal", "killed", "joined", "coordinator_restarts",
    "model_dir", "log_file",
)  # fmt: skip


def answer(text: str, truth: str, said: str) -> Answer:
    return Answer(text=text, truth=truth, answer=said, confidence=0.75)


BEFORE = Verdict(
    accuracy=0.5, loss=0.9,
    answers=(answer("a <b> & c", "doc", "code"), answer("y = x[0]", "code", "code"), answer("hm", "doc", "code"),
             answer("z()", "code", "doc")),
)  # fmt: skip
AFTER = Verdict(
    accuracy=0.75, loss=0.2,
    answers=(answer("a <b> & c", "doc", "doc"), answer("y = x[0]", "code", "code"), answer("hm", "doc", "code"),
             answer("z()", "code", "code")),
)  # fmt: skip


def make_summary(story: Story, *, is_replay_equal: bool = True, rounds_logged: int | None = None) -> Summary:
    rounds = story.round if rounds_logged is None else rounds_logged
    return summarize(
        story,
        BEFORE,
        AFTER,
        nodes=4,
        rounds_logged=rounds,
        probes_logged=story.probes,
        seconds=60.0,
        training_seconds=40.0,
        is_replay_equal=is_replay_equal,
        model_dir=Path("out/model"),
        log_file=Path("out/demo.runlog"),
        report_file=Path("out/report.html"),
    )


def test_summary_json_holds_the_promised_fields_with_the_measured_values(tmp_path: Path) -> None:
    story = demo_story.whole(40)
    make_summary(story).write(tmp_path / "summary.json")
    document = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert set(SUMMARY_FIELDS) <= set(document)
    assert document["rounds"] == 40
    assert document["probes"] == story.probes
    assert document["bytes_up_per_code"] == pytest.approx(story.bytes_up_per_code, abs=1e-4)
    assert document["bytes_up_per_code_steady"] == pytest.approx((demo_story.CODES + 50) / demo_story.CODES, abs=0.02)
    assert document["digests_equal"] is True
    assert (document["killed"], document["joined"], document["coordinator_restarts"]) == (1, 1, 1)
    assert document["codes_per_contribution"] == demo_story.CODES


def test_figures_that_do_not_exist_become_null(tmp_path: Path) -> None:
    make_summary(Story()).write(tmp_path / "summary.json")
    document = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert document["bytes_up_per_code"] is None
    assert document["digests_equal"] is False


@pytest.mark.parametrize("flaw", ["digest", "replay", "lost round", "short log", "worse"])
def test_each_flaw_makes_the_run_not_good_and_is_on_both_pages(flaw: str, tmp_path: Path) -> None:
    story = demo_story.whole(40)
    if flaw == "digest":
        demo_story.tell(story, "node-1", 41, 2)
        demo_story.tell(story, "node-2", 41, 2, digest="deadbeef")
    if flaw == "lost round":
        demo_story.tell(story, "node-1", 43, 1)
    summary = make_summary(story, is_replay_equal=flaw != "replay", rounds_logged=39 if flaw == "short log" else None)
    if flaw == "worse":
        summary = replace(summary, loss_after=1.5)
    assert not is_good(summary)
    assert "something is wrong" in printed(summary)
    write_report(tmp_path / "r.html", story, summary, [], [], when="now")
    assert "Something is wrong" in (tmp_path / "r.html").read_text(encoding="utf-8")


def printed(summary: Summary, columns: int = 100) -> str:
    console = Console(width=columns, file=io.StringIO(), record=True)
    console.print(closing_page(summary, choose(BEFORE, AFTER, 4), columns=columns))
    return console.export_text()


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_closing_page_says_it_all_and_fits(columns: int) -> None:
    summary = make_summary(demo_story.whole(40))
    assert is_good(summary)
    text = printed(summary, columns)
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= columns
    for piece in ("50.0 % → 75.0 %", "0.900 → 0.200", "40 rounds", "SIGKILL", "report.html"):
        assert piece in flat


def test_commands_are_one_line_each_however_long() -> None:
    console = Console(width=40, file=io.StringIO(), record=True)
    command = "peerturb log export somewhere/demo.runlog --model base --out replayed"
    for line in next_lines([("replay", command)]):
        console.print(line, soft_wrap=True)
    assert console.export_text().splitlines() == [f"  replay  {command}"]


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, the tags left open, and the drawn points."""

    VOID = ("meta", "link", "line", "circle", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.charts: list[dict[str, object]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "action") and v and v != "data:,"]
        if values.get("data-plot"):
            self.charts.append(json.loads(values["data-plot"] or ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    story = demo_story.whole(40)
    story.say("<script>alert(1)</script>")
    summary = make_summary(story)
    path = tmp_path / "report.html"
    write_report(path, story, summary, choose(BEFORE, AFTER, 4), [("replay", "peerturb log replay <x>")], when="today")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>alert" not in text
    assert "a &lt;b&gt; &amp; c" in text
    assert len(page.charts) == 4
    assert f"{summary.full_gradient_bytes:,} B" in text
    assert f"{summary.bytes_up:,} B" in text
    for mark in story.marks:
        assert text.count(mark.label) >= 4


def test_the_sum_of_bytes_in_the_report_adds_up(tmp_path: Path) -> None:
    story = demo_story.whole(40)
    path = tmp_path / "report.html"
    write_report(path, story, make_summary(story), [], [], when="today")
    found = re.search(
        r"\(([\d,]+) sent \+ ([\d,]+) received\) × ([\d,]+) parameters × 4 B = ([\d,]+) B",
        path.read_text(encoding="utf-8"),
    )
    assert found
    sent, received, parameters, total = (int(group.replace(",", "")) for group in found.groups())
    assert (sent + received) * parameters * 4 == total


def test_a_report_of_nothing_is_written(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Story(), make_summary(Story()), [], [], when="today")
    assert Page((tmp_path / "r.html").read_text(encoding="utf-8")).open == []


def test_limits_follow_the_size_of_the_messages() -> None:
    summary = replace(make_summary(demo_story.whole(40)), codes_per_contribution=128.0, probes=512 * 40)
    assert limits(summary) == pytest.approx((1.45, 1.15))


def test_a_chart_keeps_its_marks_levels_and_points() -> None:
    svg = chart(
        "t", [Series(name="s", points=[(0, 1), (5, float("nan")), (10, 3)], colour="green")], x_label="round",
        y_text=lambda y: f"{y:g}!", markers=[Marker(x=5, label="bang", colour="red")], levels=[Level(y=2, label="two")],
    )  # fmt: skip
    assert "bang" in svg
    assert "two" in svg
    assert "3!" in svg
    assert "nan" not in svg.lower()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (40, 100), (0, 0.037), (0, 0), (0, 7), (0, 120), (-3, 3)])
def test_ticks_are_round_ascend_and_cover(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks == sorted(ticks)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1_234, "1.23 kB"), (123_456, "123 kB"), (3.41e9, "3.41 GB")]
)
def test_sizes_have_three_figures(count: float, text: str) -> None:
    assert size(count) == text


def test_examples_show_corrected_mistakes_first_and_a_remaining_one_last() -> None:
    pairs = choose(BEFORE, AFTER, 4)
    assert [pair[1].text for pair in pairs] == ["z()", "a <b> & c", "y = x[0]", "hm"]
    assert [pair[1].text for pair in choose(BEFORE, AFTER, 2)] == ["z()", "hm"]


def test_a_verdict_survives_its_way_through_json() -> None:
    assert Verdict.from_json(json.dumps(asdict(AFTER))) == AFTER


def test_weights_are_compared_byte_by_byte(tmp_path: Path) -> None:
    for name, content in (("a", b"12345"), ("b", b"12345"), ("c", b"12346"), ("d", b"1234")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    (tmp_path / "e").mkdir()
    assert are_same_models(tmp_path / "a", tmp_path / "b")
    for other in ("c", "d", "e"):
        assert not are_same_models(tmp_path / "a", tmp_path / other)
        assert not are_same_models(tmp_path / other, tmp_path / "a")
    assert not are_same_models(tmp_path / "e", tmp_path / "e")


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    first = DemoFolder.prepare(tmp_path / "out")
    first.summary.write_text("old", encoding="utf-8")
    (first.model / "deep").mkdir(parents=True)
    second = DemoFolder.prepare(tmp_path / "out")
    assert not second.summary.exists()
    assert not second.model.exists()
    assert second.logs.is_dir()


def test_a_stranger_s_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="not empty and not of an earlier demo"):
        DemoFolder.prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="cannot write to"):
        DemoFolder.prepare(tmp_path / "out")


def test_tidying_leaves_the_results(tmp_path: Path) -> None:
    folder = DemoFolder.prepare(tmp_path / "out")
    for path in (folder.model, folder.replayed, folder.coordinator):
        path.mkdir()
    folder.log.write_bytes(b"log")
    folder.tidy()
    assert folder.model.is_dir()
    assert folder.log.exists()
    assert not folder.replayed.exists()
    assert not folder.nodes.exists()
