"""The demo's live view: a picture of a `Story` for a terminal, redrawn in place, and plain lines where there is none.

It knows the story and the terminal's size, nothing of processes.
"""

import json
import math
from dataclasses import asdict
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peerturb_node.demo.charts import Flag, Line, draw
from peerturb_node.demo.events import Entry, PeerState, Story

CHART_ROWS_MAX = 10
CHART_ROWS_MIN = 5
ENTRIES_MAX = 8
ENTRIES_MIN = 2
_FIXED_ROWS = 10
"""Rows of the panel besides charts, peers and timeline: frame, sentence, figures, headings, axes, bytes."""
_GAPS = 4
"""Blank lines between the parts, where there is room."""

_SIGNS = {"kill": Flag(x=0, sign="✗", style="red"), "join": Flag(x=0, sign="+", style="green"),
          "restart": Flag(x=0, sign="↻", style="yellow")}  # fmt: skip
_STATE_STYLE: dict[PeerState, str] = {
    "starting": "dim",
    "loading": "dim",
    "joining": "cyan",
    "catching up": "yellow",
    "training": "green",
    "reconnecting": "yellow",
    "killed": "red",
    "stopped": "dim",
}
_TONE_STYLE = {"plain": "", "good": "green", "bad": "red", "act": "yellow"}
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def picture(story: Story, *, columns: int, rows: int, tick: int = 0) -> RenderableType:
    """Return the whole view for a terminal of `columns` x `rows`; `tick` turns the spinner."""
    columns = max(60, min(columns, 132))
    spare = rows - _FIXED_ROWS - max(1, len(story.peers))
    has_gaps = spare - _GAPS >= CHART_ROWS_MIN + ENTRIES_MIN
    spare -= _GAPS if has_gaps else 0
    chart_rows = max(CHART_ROWS_MIN, min(CHART_ROWS_MAX, spare - ENTRIES_MIN))
    entry_rows = max(ENTRIES_MIN, min(ENTRIES_MAX, spare - chart_rows))
    parts = [
        _sentence(story, tick),
        _figures(story),
        _curves(story, columns - 4, chart_rows),
        Group(peers_table(story, columns - 4), _wire(story)),
        _timeline(story.entries[-entry_rows:]),
    ]
    gapped: list[RenderableType] = []
    for part in parts:
        gapped += [Text(), part] if has_gaps and gapped else [part]
    return Panel(
        Group(*gapped),
        title=Text.assemble((" peerturb demo ", "bold"), (_subject(story), "dim")),
        title_align="left",
        subtitle=Text(" Ctrl-C stops everything ", style="dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="cyan",
        width=columns,
    )


def _subject(story: Story) -> str:
    return f"{story.parameters:,} parameters, one byte per gradient " if story.parameters else "one byte per gradient "


def _sentence(story: Story, tick: int) -> RenderableType:
    clock = f"{story.at_s:.0f} s" if story.at_s else ""
    row = Table.grid(expand=True)
    row.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    row.add_column(justify="right", no_wrap=True)
    row.add_row(
        Text.assemble((_SPINNER[tick % len(_SPINNER)] + " ", "cyan"), (story.phase, "bold")), Text(clock, style="dim")
    )
    return row


def _figures(story: Story) -> RenderableType:
    """The four or five large figures."""
    last = story.evals[-1] if story.evals else None
    planned = f" / {story.rounds_planned}" if story.rounds_planned else ""
    items = [
        (
            "accuracy",
            "–" if last is None or math.isnan(last.accuracy) else f"{100 * last.accuracy:.1f} %",
            "bold green",
        ),
        ("held-out loss", "–" if last is None else f"{last.loss:.3f}", "bold cyan"),
        ("round", f"{story.round}{planned}", "bold"),
        ("probes", f"{story.probes:,}", "bold"),
        ("rounds/s", f"{story.rounds_per_s:.1f}" if story.rounds_per_s else "–", "bold"),
    ]
    row = Table.grid(expand=True, padding=(0, 1))
    for _ in items:
        row.add_column(justify="center", ratio=1, no_wrap=True)
    row.add_row(*(Text(value, style=style) for _, value, style in items))
    row.add_row(*(Text(label, style="dim") for label, _, _ in items))
    return row


def _curves(story: Story, width: int, rows: int) -> RenderableType:
    """Accuracy left, loss right, side by side."""
    half = (width - 3) // 2
    row = Table.grid(padding=(0, 0))
    row.add_column(width=half)
    row.add_column(width=width - 2 * half)
    row.add_column(width=half)
    row.add_row(accuracy_chart(story, half, rows), "", loss_chart(story, half, rows))
    return row


def accuracy_chart(story: Story, columns: int, rows: int) -> Text:
    """Return the held-out accuracy over rounds."""
    points = [(float(p.round), 100 * p.accuracy) for p in story.evals]
    known = [y for _, y in points if math.isfinite(y)]
    floor = min([40.0, *(10 * math.floor(y / 10) for y in known)])
    chart = draw(
        [Line(points=points, style="green")],
        columns=columns,
        rows=rows,
        x_range=_x_range(story),
        y_range=(floor, 100.0),
        y_labels=[(100.0, "100 %"), ((100 + floor) / 2, f"{(100 + floor) / 2:.0f} %"), (floor, f"{floor:.0f} %")],
        flags=_flags(story),
        x_label="rounds",
    )
    return Text.assemble(("held-out accuracy\n", "bold green"), chart)


def loss_chart(story: Story, columns: int, rows: int) -> Text:
    """Return the training loss (dots) and held-out loss (line) over rounds."""
    training = [(float(p.round), p.loss) for p in story.rounds]
    held_out = [(float(p.round), p.loss) for p in story.evals]
    values = [y for _, y in (*training, *held_out) if math.isfinite(y)]
    top = _round_up(max(values)) if values else 1.0
    chart = draw(
        [Line(points=training, style="blue", is_joined=False), Line(points=held_out, style="cyan")],
        columns=columns,
        rows=rows,
        x_range=_x_range(story),
        y_range=(0.0, top),
        y_labels=[(top, f"{top:.2g}"), (top / 2, f"{top / 2:.2g}"), (0.0, "0")],
        flags=_flags(story),
        x_label="rounds",
    )
    return Text.assemble(("loss ", "bold cyan"), ("held-out", "cyan"), ("  training", "blue"), "\n", chart)


def peers_table(story: Story, width: int) -> RenderableType:
    """Return one row per node."""
    table = Table(box=None, padding=(0, 1, 0, 0), width=width, header_style="dim", pad_edge=False)
    is_wide = width > 90
    table.add_column("node", no_wrap=True, ratio=2)
    table.add_column("state", no_wrap=True, ratio=None if is_wide else 3, min_width=26 if is_wide else None)
    table.add_column("slot", justify="right", no_wrap=True)
    if is_wide:
        table.add_column("pid", justify="right", no_wrap=True, ratio=2)
    table.add_column("codes", justify="right", no_wrap=True, ratio=2)
    table.add_column("round", justify="right", no_wrap=True, ratio=2)
    table.add_column("digest", justify="right", no_wrap=True, ratio=2)
    if is_wide:
        table.add_column("B up", justify="right", no_wrap=True, ratio=2)
        table.add_column("B down", justify="right", no_wrap=True, ratio=2)
    for peer in story.peers.values():
        style = "dim" if peer.state == "killed" else ""
        state = Text(f"● {peer.state}", style=_STATE_STYLE[peer.state])
        if peer.is_late and peer.state == "training" and is_wide:
            state.append(f" (replayed {peer.replayed})", style="dim")
        cells: list[RenderableType] = [peer.name, state, "–" if peer.slot is None else str(peer.slot)]
        if is_wide:
            cells.append(str(peer.pid or "–"))
        cells += [f"{peer.codes_up:,}", "–" if peer.round is None else str(peer.round), peer.digest or "–"]
        if is_wide:
            cells += [f"{peer.bytes_up:,}", f"{peer.bytes_down:,}"]
        table.add_row(*cells, style=style)
    return table


def _wire(story: Story) -> Text:
    """Bytes and digests in one line."""
    up, down = story.bytes_up_per_code, story.bytes_down_per_code
    text = Text.assemble(("bytes per gradient  ", "dim"), no_wrap=True, overflow="ellipsis")
    text.append("↑ " + ("–" if math.isnan(up) else f"{up:.2f}"), style="bold")
    text.append("  ↓ " + ("–" if math.isnan(down) else f"{down:.2f}"), style="bold")
    text.append("   digests ", style="dim")
    if not story.compared:
        text.append("–")
    elif story.are_digests_equal:
        text.append(f"equal in all {story.compared} rounds ✓", style="bold green")
    else:
        text.append(f"DIFFER in round {story.mismatches()[0]}", style="bold red")
    return text


def _timeline(entries: list[Entry]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for index, entry in enumerate(entries):
        text.append("\n" if index else "")
        text.append(f"{entry.at_s:5.1f} s  ", style="dim")
        text.append(entry.text, style=_TONE_STYLE[entry.tone])
    return text


def _flags(story: Story) -> list[Flag]:
    return [
        Flag(x=float(mark.round), sign=_SIGNS[mark.kind].sign, style=_SIGNS[mark.kind].style) for mark in story.marks
    ]


def _x_range(story: Story) -> tuple[float, float]:
    return 0.0, float(max(story.rounds_planned, story.round, 10))


def _round_up(value: float) -> float:
    """Return the next larger of 1, 1.5, 2, 3, 5, 7 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 5, 7, 10) if step * power >= value * 0.999)


class LiveView:
    """Redraws the story in a terminal until closed."""

    def __init__(self, story: Story, console: Console) -> None:
        self._story = story
        self._console = console
        self._tick = 0
        self._live = Live(get_renderable=self._draw, console=console, auto_refresh=False, transient=True)
        self._live.start()

    def update(self) -> None:
        """Draw now."""
        self._tick += 1
        self._live.refresh()

    def close(self) -> None:
        """Clear the view and give the terminal back."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        size = self._console.size
        return picture(self._story, columns=size.width, rows=size.height - 1, tick=self._tick)


class PlainView:
    """Prints new timeline entries, and a line about training now and then."""

    EVERY_S = 5.0

    def __init__(self, story: Story, stream: TextIO) -> None:
        self._story = story
        self._stream = stream
        self._entries = 0
        self._round = 0
        self._round_s = -math.inf

    def update(self) -> None:
        """Print what is new."""
        story = self._story
        for entry in story.entries[self._entries :]:
            self._write(f"[{entry.at_s:6.1f} s] {entry.text}")
        self._entries = len(story.entries)
        if story.round > self._round and story.at_s - self._round_s >= self.EVERY_S:
            self._round, self._round_s = story.round, story.at_s
            self._write(f"[{story.at_s:6.1f} s] {status_line(story)}")

    def close(self) -> None:
        """Print what is left."""
        self.update()

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class JsonView:
    """Writes every timeline entry, round and evaluation as one JSON object a line."""

    def __init__(self, story: Story, stream: TextIO) -> None:
        self._story = story
        self._stream = stream
        self._entries = self._rounds = self._evals = 0

    def update(self) -> None:
        """Write what is new."""
        story = self._story
        for entry in story.entries[self._entries :]:
            self._write("step", {"seconds": entry.at_s, "round": entry.round, "text": entry.text})
        for point in story.rounds[self._rounds :]:
            self._write("round", asdict(point))
        for held_out in story.evals[self._evals :]:
            self._write("eval", asdict(held_out))
        self._entries, self._rounds, self._evals = len(story.entries), len(story.rounds), len(story.evals)

    def close(self) -> None:
        """Write what is left."""
        self.update()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        clean = {
            k: (None if not math.isfinite(v) else round(v, 6)) if isinstance(v, float) else v for k, v in fields.items()
        }
        self._stream.write(json.dumps({"event": kind, **clean}) + "\n")
        self._stream.flush()


def status_line(story: Story) -> str:
    """Return one line about the training."""
    last = story.evals[-1] if story.evals else None
    parts = [f"round {story.round}"]
    if last is not None:
        parts.append(f"held-out accuracy {100 * last.accuracy:.1f} %, loss {last.loss:.3f}")
    if not math.isnan(story.bytes_up_per_code):
        parts.append(f"{story.bytes_up_per_code:.2f} B up, {story.bytes_down_per_code:.2f} B down per gradient")
    if story.compared:
        state = "equal" if story.are_digests_equal else "DIFFERENT"
        parts.append(f"digests {state} in {story.compared} rounds")
    return "; ".join(parts)
