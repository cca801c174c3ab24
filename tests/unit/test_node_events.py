"""What a node shows: JSON lines, plain lines, a live view that never stops training."""

import io
import json
import math

import pytest
from rich.console import Console

from peerturb_node.events import KINDS, Events, JsonSink, PlainSink, sentence
from peerturb_node.view import LiveSink, curve, size

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
    sample = dict.fromkeys(" ".join(KINDS.values()).split(), 1.0) | {"key": "ab" * 32, "digest": "ab" * 16}
    said = {kind for kind in KINDS if sentence({"event": kind, "time": 0.0, **sample})}
    assert {"start", "model", "joined", "round", "eval", "disconnected", "refused", "stop"} <= said


def test_the_live_view_draws_what_it_saw() -> None:
    stream = io.StringIO()
    sink = LiveSink(Console(file=stream, force_terminal=True, width=100))
    events = Events(sink)
    events.emit("joined", slot=7, position=1, head=2)
    for loss in (3.0, 2.0, math.nan, 1.0):
        events.emit("round", **ROUND | {"loss": loss})
    events.emit("eval", round=3, loss=1.5, accuracy=0.5, examples=3, ms=1.0)
    events.emit("notice", code="x", text="something [odd] happened")
    events.close()
    shown = stream.getvalue()
    for part in ("0a0b0c0d", "50.0 %", "5.7 MB", "16,000", "something [odd] happened"):
        assert part in shown


def test_small_figures() -> None:
    from collections import deque

    assert curve(deque()) == ""
    assert curve(deque([1.0, 1.0])) == "▁▁"
    assert curve(deque([0.0, 1.0])) == "▁█"
    assert [size(count) for count in (0, 999, 1_500, 2.5e6, 3e9)] == ["0 B", "999 B", "1.5 KB", "2.5 MB", "3.0 GB"]
