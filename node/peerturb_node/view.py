"""The live view of a node in a terminal: a sink that redraws one panel from the events it has seen.

It has the screen to itself while it lives, so that no change of the terminal's size leaves anything behind; at the end
the last picture stays. A run's and a peer's name are strangers' text: nothing in them is taken for markup.
"""

import math
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peerturb.wire.logs import is_written
from peerturb_node.events import Event, level, number, sentence

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 512
"""Losses kept; what the width does not hold is not shown."""
_MESSAGES_MIN, _MESSAGES_MAX = 1, 12
_ROWS = 10
"""Rows of the panel without messages: frame, state, figures, curve."""
_STATE_STYLE = {"training": "green", "stopped": "dim", "starting": "dim"}
_REDRAWS_PER_S = 4
_PACE_ROUNDS = 30
"""Rounds over which the pace is averaged that says how long the run still takes."""


class LiveSink:
    """Round and time left, loss and accuracy, peers, speed and bytes, and the last few messages."""

    def __init__(self, console: Console, *, least: str = "info") -> None:
        """Begin to draw; messages below level `least` are not shown."""
        self._console = console
        self._least = least
        self._lock = threading.Lock()  # rich draws on a thread of its own
        self._title = "peerturb node"
        self._state = "starting"
        self._rounds_planned = 0
        self._round: Event = {}
        self._held_out: Event = {}
        self._losses: deque[float] = deque(maxlen=_CURVE_POINTS)
        self._pace: deque[tuple[int, float]] = deque(maxlen=_PACE_ROUNDS + 1)
        """(round, time) of rounds applied while training."""
        self._messages: deque[str] = deque(maxlen=_MESSAGES_MAX)
        self._slot = "-"
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=_REDRAWS_PER_S, screen=True,
            vertical_overflow="crop",
        )  # fmt: skip
        self._live.start(refresh=True)

    def emit(self, event: Event) -> None:
        """Take an event in; the next redraw shows it."""
        with self._lock:
            self._take(event)

    def close(self) -> None:
        """Give the screen back and leave the last picture on it, with all messages: they may scroll now."""
        self._live.stop()
        self._console.print(self._picture(self._console.width, _MESSAGES_MAX))

    def _take(self, event: Event) -> None:
        match event["event"]:
            case "start":
                self._title = f"{event['name']} · run {event['run']} · {event['coordinator']}"
                self._rounds_planned = event["rounds"]
                self._state = "loading the model"
            case "round":
                self._applied(event)
                return
            case "eval":
                self._held_out = event
                return
            case "joined":
                self._slot = str(event["slot"])
                self._state = "joined"
                self._pace.clear()
            case "behind":
                self._state = f"catching up, {event['rounds']} rounds"
            case "training":
                self._state = "training"
                self._pace.clear()
            case "disconnected":
                self._state = "disconnected"
            case "paused":
                self._state = f"paused, {event['why']}"
            case "resumed":
                self._state = "joining again"
            case "leaving":
                self._state = "leaving"
            case "stop":
                self._state = "stopped"
        line = sentence(event) if is_written(level(event), self._least) else ""
        if line:
            self._messages.append(line)

    def _applied(self, event: Event) -> None:
        self._round = event
        if self._state == "training":
            self._pace.append((event["round"], event["time"]))
        if event["loss"] is not None and math.isfinite(event["loss"]):
            self._losses.append(event["loss"])

    def _draw(self) -> RenderableType:
        columns, rows = self._console.size
        return self._picture(columns, min(max(rows - _ROWS, _MESSAGES_MIN), _MESSAGES_MAX))

    def _picture(self, columns: int, messages_max: int) -> RenderableType:
        with self._lock:
            messages = list(self._messages)[-messages_max:]
            losses = list(islice(self._losses, max(0, len(self._losses) - max(columns - 4, 1)), None))
            parts = (
                Text(self._state, style=_STATE_STYLE.get(self._state, "yellow"), overflow="ellipsis", no_wrap=True),
                self._figures(),
                Text(curve(losses), style="cyan"),
                Text("\n".join(messages), style="dim", overflow="ellipsis", no_wrap=True),
            )
            return Panel(Group(*parts), title=Text(self._title))

    def _figures(self) -> Table:
        table = Table.grid(padding=(0, 3))
        for style in ("dim", "", "dim", ""):
            table.add_column(style=style, no_wrap=True)
        last, held_out = self._round, self._held_out
        accuracy = held_out.get("accuracy")
        done = str(last.get("round", "-")) + (f" of {self._rounds_planned}" if self._rounds_planned else "")
        for row in (
            ("round", done, "time left", self._time_left()),
            ("loss", number(last.get("loss")), "held-out loss", number(held_out.get("loss"))),
            ("peers", str(last.get("peers", "-")), "accuracy", "-" if accuracy is None else f"{100 * accuracy:.1f} %"),
            ("tokens/s", f"{last.get('tokens_per_s', 0):,.0f}", "probes/s", f"{last.get('probes_per_s', 0):,.0f}"),
            ("sent", size(last.get("bytes_up", 0)), "received", size(last.get("bytes_down", 0))),
            ("digest", last.get("digest") or "-", "slot", self._slot),
        ):
            table.add_row(*map(Text, row))
        return table

    def _time_left(self) -> str:
        """Say how long the run still takes at the pace of the last rounds."""
        if self._state != "training" or len(self._pace) < 2:
            return "-"
        (first, since_s), (last, at_s) = self._pace[0], self._pace[-1]
        round_s = (at_s - since_s) / max(last - first, 1)
        if not self._rounds_planned:
            return f"no end set, {round_s:.2g} s a round"
        return f"about {duration(round_s * max(self._rounds_planned - last, 0))}"


def curve(values: Sequence[float]) -> str:
    """Return a line of block characters, the lowest value lowest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)


def size(count: float) -> str:
    """Return a byte count for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time for people, as exact as an estimate can be: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
