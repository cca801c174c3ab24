"""The live view of a node in a terminal: a sink that redraws one panel from the events it has seen."""

from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peerturb.wire.logs import is_written
from peerturb_node.events import Event, level, number, sentence

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 48
_MESSAGES_SHOWN = 4
_REDRAWS_PER_S = 4


class LiveSink:
    """Round, loss and accuracy, peers, speed and bytes, and the last few messages."""

    def __init__(self, console: Console, *, least: str = "info") -> None:
        """Begin to draw; messages below level `least` are not shown."""
        self._least = least
        self._title = "peerturb node"
        self._state = "starting"
        self._round: Event = {}
        self._held_out: Event = {}
        self._losses: deque[float] = deque(maxlen=_CURVE_POINTS)
        self._messages: deque[str] = deque(maxlen=_MESSAGES_SHOWN)
        self._slot = "-"
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=_REDRAWS_PER_S, transient=False
        )
        self._live.start()

    def emit(self, event: Event) -> None:
        """Take an event in; the next redraw shows it."""
        match event["event"]:
            case "start":
                self._title = f"{event['name']} · run {event['run']} · {event['coordinator']}"
            case "round":
                self._round = event
                if event["loss"] is not None and event["loss"] == event["loss"]:
                    self._losses.append(event["loss"])
                return
            case "eval":
                self._held_out = event
                return
            case "joined":
                self._slot = str(event["slot"])
                self._state = "joined"
            case "behind":
                self._state = f"catching up, {event['rounds']} rounds"
            case "training":
                self._state = "training"
            case "disconnected":
                self._state = "disconnected"
            case "paused":
                self._state = f"paused, {event['why']}"
            case "resumed":
                self._state = "joining again"
            case "stop":
                self._state = "stopped"
        line = sentence(event) if is_written(level(event), self._least) else ""
        if line:
            self._messages.append(line)

    def close(self) -> None:
        """Draw a last time and give the terminal back."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        table.add_column(style="dim")
        table.add_column()
        table.add_column(style="dim")
        table.add_column()
        last, held_out = self._round, self._held_out
        accuracy = held_out.get("accuracy")
        table.add_row("state", self._state, "slot", self._slot)
        table.add_row("round", str(last.get("round", "-")), "peers", str(last.get("peers", "-")))
        table.add_row(
            "loss", number(last.get("loss")), "held-out loss", number(held_out.get("loss")) if held_out else "-"
        )
        table.add_row(
            "accuracy", "-" if accuracy is None else f"{100 * accuracy:.1f} %", "digest", last.get("digest") or "-"
        )
        table.add_row(
            "probes/s",
            f"{last.get('probes_per_s', 0):.0f}",
            "tokens/s",
            f"{last.get('tokens_per_s', 0):,.0f}",
        )
        table.add_row("sent", size(last.get("bytes_up", 0)), "received", size(last.get("bytes_down", 0)))
        messages = Text("\n".join(self._messages), style="dim", overflow="ellipsis", no_wrap=True)
        return Panel(Group(table, Text(curve(self._losses), style="cyan"), messages), title=self._title)


def curve(values: deque[float]) -> str:
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
