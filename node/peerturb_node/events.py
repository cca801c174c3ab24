"""What a node tells the outside: one stream of events, shown as JSON lines, plain lines or a live view.

An event is a flat dictionary with `event` (its kind), `time` (seconds since 1970), the fields listed in `KINDS`, and
what is bound: `run`, and `slot` and `round` once they are known. A sink that fails is dropped and never stops training.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from peerturb.protocol.trend import DIVERGING
from peerturb.wire.logs import is_written, iso_time, open_log

Event = Mapping[str, Any]

KINDS = {
    "monitor": "address",
    "start": "version name key coordinator run spec rounds state compute device",
    "model": "parameters tensors dtype digest seconds quantised",
    "restored": "round position checkpoint",
    "connecting": "coordinator",
    "joined": "slot position head",
    "behind": "rounds",
    "training": "round seconds",
    "measured": "round codes void loss ms tokens",
    "round": "round loss digest codes peers own ms alpha probes_per_s tokens_per_s bytes_up bytes_down",
    "eval": "round loss accuracy examples ms",
    "disconnected": "why retry_ms again",
    "refused": "code why",
    "notice": "code text",
    "paused": "reason why",
    "resumed": "why seconds",
    "rebuild": "why",
    "checkpoint": "round file",
    "export": "folder",
    "leaving": "why",
    "stop": "why round digest bytes_up bytes_down codes_up codes_down",
    "error": "message code",
}
"""Kind -> its fields beside the bound ones. `digest` is 8 hex digits of the weights after `round` rounds, null inside a
burst of catch-up; `ms` is how long the node's own work took; `bytes_*` and `codes_*` count since the process began;
`again` says that an attempt to connect failed as the last one did."""


ROUND_S = 1.0
"""Least seconds between two lines about rounds, for people and in a log without details."""

_DETAILS = frozenset({"connecting", "measured"})
_WARNINGS = frozenset({"disconnected", "rebuild"})
_WARNING_NOTICES = frozenset({DIVERGING, "epsilon", "idle_off", "log_set_aside", "monitor", "slow"})
_ROUTINE_REFUSALS = frozenset({"stale_round", "run_finished", "shutting_down"})
"""Codes of refusals that are part of any run: a contribution after the seal, the run's end, the coordinator's stop."""


def level(event: Event) -> str:
    """Return how much an event matters: debug, info, warning or error."""
    kind = event["event"]
    if kind == "error":
        return "error"
    if kind == "refused":
        return "debug" if event["code"] in _ROUTINE_REFUSALS else "warning"
    if kind in _DETAILS or (kind == "disconnected" and event["again"]):
        return "debug"
    is_warning = kind in _WARNINGS or (kind == "notice" and event["code"] in _WARNING_NOTICES)
    return "warning" if is_warning else "info"


class Sink(Protocol):
    """Somewhere events go."""

    def emit(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:
        """Restore the terminal, flush."""


class Events:
    """Stamps events and hands them to every sink."""

    def __init__(self, *sinks: Sink, now: Callable[[], float] = time.time) -> None:
        self._sinks = list(sinks)
        self._now = now
        self._bound: dict[str, Any] = {"run": None}

    def bind(self, **fields: Any) -> None:
        """Give every event from now on these fields, unless it brings its own."""
        self._bound |= fields

    def add(self, sink: Sink) -> None:
        """Let one more sink hear, from now on."""
        self._sinks.append(sink)

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell all sinks."""
        event = {"event": kind, "time": round(self._now(), 3), **self._bound, **fields}
        for sink in list(self._sinks):
            try:
                sink.emit(event)
            except Exception as error:
                # Whatever is wrong with a display (closed pipe, full disk), training goes on without it.
                self._sinks.remove(sink)
                print(f"peerturb node: an output failed and is switched off: {error}", file=sys.stderr)

    def close(self) -> None:
        """Close all sinks; a failing one is passed over."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                print(f"peerturb node: an output failed at its end: {error}", file=sys.stderr)


class JsonSink:
    """The log for machines: one JSON object a line (`peerturb.wire.logs`), null for numbers that JSON cannot carry.

    Rounds stand in it at most once a second, all of them only with the details.
    """

    def __init__(self, stream: TextIO, *, least: str = "debug") -> None:
        """Write events of level `least` and above."""
        self._stream = stream
        self._log = open_log(stream, as_json=True, level=least)
        self._is_thinned = least != "debug"
        self._last_round_s = -math.inf

    def emit(self, event: Event) -> None:
        """Write and flush one line."""
        if self._is_thinned and event["event"] == "round":
            if 0 <= event["time"] - self._last_round_s < ROUND_S:
                return
            self._last_round_s = event["time"]
        fields = {key: value for key, value in event.items() if key not in ("event", "time")}
        getattr(self._log, level(event))(event["event"], time=iso_time(event["time"]), **fields)
        self._stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""
        self._stream.flush()


class PlainSink:
    """One readable line an event; rounds at most once a second."""

    def __init__(self, stream: TextIO, *, now: Callable[[], float] = time.monotonic, least: str = "debug") -> None:
        """Write events of level `least` and above."""
        self._stream = stream
        self._now = now
        self._least = least
        self._last_round_s = -math.inf

    def emit(self, event: Event) -> None:
        """Write the event's line, if it has one now."""
        if not is_written(level(event), self._least):
            return
        if event["event"] == "round":
            if self._now() - self._last_round_s < ROUND_S:
                return
            self._last_round_s = self._now()
        line = sentence(event)
        if line:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""
        self._stream.flush()


def sentence(event: Event) -> str:
    """Return an event as one line for people; empty for events only machines want."""
    match event["event"]:
        case "start":
            return (
                f"peerturb {event['version']}: node {event['name']!r} (key {event['key'][:8]}) "
                f"takes part in run {event['run']!r} at {event['coordinator']}, state in {event['state']}"
            )
        case "monitor":
            return f"health and metrics at http://{event['address']}/metrics"
        case "model":
            return (
                f"model: {event['parameters']:,} parameters in {event['tensors']} tensors, {event['dtype']}, "
                f"digest {event['digest'][:8]}, loaded in {event['seconds']:.1f} s"
                + (f"; {event['quantised']}" if event.get("quantised") else "")
            )
        case "restored":
            saved = f"checkpoint after {event['checkpoint']} rounds" if event["checkpoint"] else "no checkpoint"
            return f"local log: {event['position']} records, {event['round']} rounds; {saved}"
        case "joined":
            return f"joined as slot {event['slot']}; log {event['position']} of {event['head']} records"
        case "behind":
            return f"catching up: about {event['rounds']} rounds to apply"
        case "training":
            return f"training from round {event['round']}, {event['seconds']:.1f} s after joining"
        case "round":
            return (
                f"round {event['round']:>6}  loss {number(event['loss'])}  {event['codes']} codes of "
                f"{event['peers']} peers  digest {event['digest'] or '--------'}  {event['probes_per_s']:.0f} probes/s"
            )
        case "eval":
            accuracy = "" if event["accuracy"] is None else f", accuracy {100 * event['accuracy']:.1f} %"
            return (
                f"held-out after {event['round']} rounds: loss {number(event['loss'])}{accuracy} "
                f"({event['examples']} examples)"
            )
        case "disconnected":
            return f"disconnected: {event['why']}; trying again"
        case "refused":
            return f"refused ({event['code']}): {event['why']}"
        case "notice":
            return str(event["text"])
        case "paused":
            return f"paused: {event['why']}; the node goes on by itself"
        case "resumed":
            return f"resumed after {event['seconds']:.0f} s: {event['why']}"
        case "rebuild":
            return f"rebuilding the weights from the local log: {event['why']}"
        case "checkpoint":
            return f"checkpoint after {event['round']} rounds: {event['file']}"
        case "export":
            return f"model written to {event['folder']}"
        case "leaving":
            return f"leaving: {event['why']}"
        case "stop":
            return f"stopped after {event['round']} rounds: {event['why']}"
        case _:
            return ""


def number(value: float | None) -> str:
    """Return a loss for people; `-` for none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
