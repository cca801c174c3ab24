"""What a node shows: JSON lines, plain lines, a live view that never stops training."""

import io
import json
import math

import pytest
from rich.console import Console

from peerturb_node.events import KINDS, Events, JsonSink, PlainSink, sentence
from peerturb_node.view import LiveSink, curve, duration, size

ROUND = {
    "round": 3,
    "loss": 2.5,
    "digest": "0a0b0c0d",
    "codes": 512,
    "peers": 4,
    "own": True,
    "ms": 1.5,
    "alpha": 1e-5,
    "probes_per_s": 250.0,
    "tokens_per_s": 16_000.0,
    "bytes_up": 1_234,
    "bytes_down": 5_678_901,
}


def test_json_lines_carry_no_nan() -> None:
    stream = io.StringIO()
    Events(JsonSink(stream), now=lambda: 12.3456).emit("round", **ROUND | {"loss": math.nan})
    event = json.loads(stream.getvalue())
    assert event["loss"] is None
    assert event["time"] == "1970-01-01T00:00:12.346Z"
    assert list(event)[:5] == ["time", "level", "event", "run", "round"]
    assert set(KINDS["round"].split()) == set(event) - {"event", "time", "level", "run"}


def test_plain_lines_show_a_round_a_second() -> None:
    stream = io.StringIO()
    clock = [0.0]
    events = Events(PlainSink(stream, now=lambda: clock[0]))
    for tenth in range(25):
        clock[0] = tenth / 10
        events.emit("round", **ROUND | {"round": tenth})
    events.emit("eval", round=24, loss=1.25, accuracy=0.875, examples=10, ms=1.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "round      0" in lines[0]
    assert "87.5 %" in lines[-1]


def test_a_broken_output_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    broken, good = io.StringIO(), io.StringIO()
    broken.close()
    events = Events(JsonSink(broken), JsonSink(good))
    events.emit("notice", code="a", text="first")
    events.emit("notice", code="a", text="second")
    assert good.getvalue().count("\n") == 2
    assert capsys.readouterr().err.count("switched off") == 1


def test_every_kind_has_a_sentence_or_none() -> None:
    sample = dict.fromkeys(" ".join(KINDS.values()).split(), 1.0) | {"key": "ab" * 32, "digest": "ab" * 16, "run": "r"}
    said = {kind for kind in KINDS if sentence({"event": kind, "time": 0.0, **sample})}
    assert {"start", "model", "joined", "round", "eval", "disconnected", "refused", "stop"} <= said


def live(columns: int, rows: int) -> tuple[LiveSink, Events, list[float]]:
    """A view on a terminal of that size, its events, and the clock that stamps them."""
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, height=rows)
    sink, clock = LiveSink(console), [0.0]
    return sink, Events(sink, now=lambda: clock[0]), clock


def picture(sink: LiveSink, columns: int, rows: int) -> list[str]:
    console = Console(file=io.StringIO(), width=columns, height=rows)
    with console.capture() as capture:
        console.print(sink._draw())
    return capture.get().splitlines()


START = {
    "version": "0.1.0", "name": "attic", "key": "ab" * 32, "coordinator": "127.0.0.1:7470", "run": "a [red]run[/x]",
    "spec": "cd" * 32, "rounds": 400, "state": "/nowhere", "compute": "torch", "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(("columns", "rows"), [(60, 12), (80, 24), (120, 40)])
def test_the_live_view_shows_what_it_saw_and_fits(columns: int, rows: int) -> None:
    sink, events, clock = live(columns, rows)
    events.emit("start", **START)
    assert "loading the model" in "\n".join(picture(sink, columns, rows))
    events.emit("joined", slot=7, position=1, head=2)
    events.emit("training", round=0, seconds=1.0)
    for number, loss in enumerate((3.0, 2.0, math.nan, 1.0), start=1):
        clock[0] = 10.0 * number
        events.emit("round", **ROUND | {"loss": loss, "round": number})
    events.emit("eval", round=3, loss=1.5, accuracy=0.5, examples=3, ms=1.0)
    for number in range(20):
        events.emit("notice", code="x", text=f"something [odd] happened {number}")
    lines = picture(sink, columns, rows)
    shown = "\n".join(lines)
    for part in ("a [red]run[/x]", "training", "4 of 400", "about 66 min", "1.0000", "1.5000", "50.0 %", "16,000",
                 "250", "1.2 KB", "5.7 MB", "0a0b0c0d", "something [odd] happened 19"):  # fmt: skip
        assert part in shown, part
    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns
    events.close()


def test_the_live_view_promises_no_time_where_it_knows_none() -> None:
    sink, events, clock = live(100, 30)
    events.emit("start", **START | {"rounds": 0})
    events.emit("joined", slot=7, position=1, head=2)
    for number in range(1, 40):  # what is replayed says nothing of the pace
        clock[0] += 0.001
        events.emit("round", **ROUND | {"round": number})
    assert "time left" in (line := picture(sink, 100, 30)[2])
    assert "about" not in line
    events.emit("training", round=40, seconds=1.0)
    for number in range(40, 43):
        clock[0] += 2.5
        events.emit("round", **ROUND | {"round": number})
    assert "no end set, 2.5 s a round" in picture(sink, 100, 30)[2]
    events.emit("paused", reason="cpu", why="other processes use 63 % of the CPU")
    assert "paused, other processes use 63 % of the CPU" in picture(sink, 100, 30)[1]
    events.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (100, "2 min"), (5_000, "83 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_levels_keep_routine_out_of_a_log_without_details() -> None:
    stream = io.StringIO()
    events = Events(JsonSink(stream, least="info"))
    events.bind(run="r", slot=3)
    events.emit("measured", round=1, codes=1, void=0, loss=1.0, ms=1.0, tokens=1)
    events.emit("refused", code="stale_round", why="late")
    events.emit("disconnected", why="gone", retry_ms=1, again=True)
    assert stream.getvalue() == ""
    events.emit("refused", code="digest_mismatch", why="other weights")
    events.emit("disconnected", why="gone", retry_ms=1, again=False)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["run"], line["slot"]) for line in lines] == [("warning", "r", 3)] * 2


def test_small_figures() -> None:
    from collections import deque

    assert curve(deque()) == ""
    assert curve(deque([1.0, 1.0])) == "▁▁"
    assert curve(deque([0.0, 1.0])) == "▁█"
    assert [size(count) for count in (0, 999, 1_500, 2.5e6, 3e9)] == ["0 B", "999 B", "1.5 KB", "2.5 MB", "3.0 GB"]
