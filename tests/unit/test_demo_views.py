"""The demo's views: they fit the terminal they are given and say what the story says, in every state of it."""

import io
import json

import pytest
from rich.console import Console

from peerturb_node.demo.charts import Flag, Line, draw
from peerturb_node.demo.events import Story
from peerturb_node.demo.view import JsonView, PlainView, picture
from tests.unit import demo_story


def shown(story: Story, columns: int, rows: int) -> list[str]:
    console = Console(width=columns, height=rows, file=io.StringIO(), force_terminal=True, record=True)
    console.print(picture(story, columns=columns, rows=rows))
    return console.export_text().splitlines()


@pytest.mark.parametrize("story", [Story(), demo_story.begin(), demo_story.whole(12), demo_story.whole(40)])
@pytest.mark.parametrize(("columns", "rows"), [(80, 23), (80, 40), (120, 30), (132, 60)])
def test_the_picture_fits_its_terminal(story: Story, columns: int, rows: int) -> None:
    lines = shown(story, columns, rows)
    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns


def test_the_picture_tells_the_story() -> None:
    story = demo_story.whole(40)
    story.phase = "everything is fine"
    text = "\n".join(shown(story, 120, 40))
    for piece in ("everything is fine", "40 / 40", "97.0 %", "● killed", "replayed 20", "equal in all 40 rounds"):
        assert piece in text
    assert demo_story.digest_after(40) in text
    assert f"↑ {story.bytes_up_per_code:.2f}" in text
    assert f"↓ {story.bytes_down_per_code:.2f}" in text


def test_differing_digests_cry_out() -> None:
    story = demo_story.whole(30)
    demo_story.tell(story, "node-1", 31, 2)
    demo_story.tell(story, "node-2", 31, 2, digest="deadbeef")
    assert "DIFFER in round 31" in "\n".join(shown(story, 100, 40))


def test_square_brackets_in_the_story_are_text() -> None:
    story = demo_story.begin()
    story.say("a path like [/red] stays")
    assert "a path like [/red] stays" in "\n".join(shown(story, 100, 40))


def chart_rows(lines: list[Line], flags: list[Flag] | None = None) -> list[str]:
    text = draw(
        lines,
        columns=20,
        rows=4,
        x_range=(0, 10),
        y_range=(0, 1),
        y_labels=[(1.0, "1"), (0.0, "0")],
        flags=flags or [],
        x_label="x",
    )
    return text.plain.split("\n")


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    rows = chart_rows([Line(points=[(0, 0), (10, 1)], style="green")])
    assert len(rows) == 6
    assert all(len(row) <= 20 for row in rows)
    assert rows[0].startswith("1┤")
    assert rows[3].startswith("0┤")
    assert rows[0][-1] >= "\u2800"
    assert rows[3][2] >= "\u2800"
    assert rows[0][2] == " "


def test_values_out_of_range_stay_in_the_chart_and_missing_ones_are_left_out() -> None:
    rows = chart_rows([Line(points=[(0, float("nan")), (5, 99.0), (50, -1.0)], style="", is_joined=False)])
    dots = [(row, column) for row in range(4) for column, sign in enumerate(rows[row]) if sign >= "\u2800"]
    assert [row for row, _ in dots] == [0, 3]


def test_flags_stand_on_the_axis_and_above_it() -> None:
    rows = chart_rows([], [Flag(x=10, sign="✗", style="red")])
    assert rows[4].endswith("✗")
    assert all(row.endswith("┊") for row in rows[:4])


def test_a_chart_of_nothing_and_of_one_place_is_drawn() -> None:
    empty = draw([], columns=10, rows=2, x_range=(0, 0), y_range=(1, 1), y_labels=[])
    assert len(empty.plain.split("\n")) == 4


def test_plain_lines_come_once_each() -> None:
    story, stream = demo_story.whole(40), io.StringIO()
    view = PlainView(story, stream)
    view.update()
    first = stream.getvalue()
    view.update()
    view.close()
    assert stream.getvalue() == first
    assert "node-4 killed with SIGKILL" in first
    assert "digests equal in 40 rounds" in first


def test_json_lines_hold_every_step_round_and_evaluation_once() -> None:
    story, stream = demo_story.whole(40), io.StringIO()
    view = JsonView(story, stream)
    view.update()
    demo_story.tell(story, "node-1", 41, 4)
    view.close()
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["round"] for row in rows if row["event"] == "round"] == list(range(1, 42))
    assert sum(row["event"] == "eval" for row in rows) == 8
    assert [row["text"] for row in rows if row["event"] == "step"] == [entry.text for entry in story.entries]
    assert next(row for row in rows if row["event"] == "round")["duration_ms"] is None
