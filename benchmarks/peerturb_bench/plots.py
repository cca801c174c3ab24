"""Draw results: bars against a target, parts of a whole, curves of training. It knows no benchmark, only what to draw.

matplotlib is imported when something is drawn, and used without its global state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY = "#1b6ca8", "#c1432e", "#6b8e23", "#8a8f98"
PARTS = (BLUE, "#d98e04", GREEN, "#7a5195", GREY)
SHADES = ("#3b1f77", "#1b6ca8", "#2a9d6f", "#d98e04", "#c1432e")
"""From little to much: also told apart in grey."""
DPI = 110
_PAPER = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One measured figure."""

    label: str
    value: float
    target: float | None = None
    """Where the project wants to be, if it has said so."""
    low: float | None = None
    high: float | None = None
    """Quartiles."""
    colour: str = BLUE


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    """Equal labels share one entry of the legend."""
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    mark: str = ""
    """matplotlib's name of the mark at each point; empty: none."""
    dash: str = "-"
    """matplotlib's name of the line's style; empty: no line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    is_log: bool = False
    """Of x."""
    is_log_y: bool = False
    ticks: Sequence[float] = ()
    """Of x, written as plain numbers; by default matplotlib chooses."""
    has_legend: bool = False
    """Of its own, in place of the figure's: for panels whose lines are not those of the others."""
    span: tuple[float, float] | None = None
    """Of y; by default all that is drawn."""


def bars(path: Path, items: Sequence[Bar], *, title: str, axis: str, is_log: bool = False) -> None:
    """Draw a horizontal bar for each item, the first on top, its target as a red line across it."""
    figure = _figure(9.5, 1.4 + 0.42 * len(items))
    axes = figure.subplots()
    heights = range(len(items))
    axes.barh(heights, [bar.value for bar in items], height=0.62, color=[bar.colour for bar in items])
    axes.set_yticks(heights, [bar.label for bar in items])
    axes.invert_yaxis()
    if is_log:
        axes.set(xscale="log", xlim=(1.0, None))
    for height, bar in zip(heights, items, strict=True):
        if bar.target is not None:
            axes.vlines(bar.target, height - 0.5, height + 0.5, color=RED, linewidth=2, zorder=3)
        if bar.low is not None and bar.high is not None:
            axes.hlines(height, bar.low, bar.high, color="black", linewidth=1.5, zorder=4)
        end = bar.value if bar.high is None else max(bar.value, bar.high)
        text = f"{bar.value:,.0f}" if bar.value >= 1000 else f"{bar.value:,.4g}"
        axes.annotate(text, (end, height), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
                      bbox=_PAPER, zorder=5)  # fmt: skip
    axes.margins(x=0.12)  # room for the last figure
    has_target = any(bar.target is not None for bar in items)
    axes.set_xlabel(f"{axis} (red: the target)" if has_target else axis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def parts(path: Path, total: Bar, pieces: Sequence[Bar], *, title: str, axis: str) -> None:
    """Draw a total as one bar, with its target, and below it the pieces end to end."""
    figure = _figure(9.5, 3.0)
    axes = figure.subplots()
    axes.barh([0], [total.value], height=0.6, color=GREY)
    axes.annotate(f"{total.value:,.4g}", (total.value / 2, 0), ha="center", va="center", color="white")
    begin = 0.0
    for piece, colour in zip(pieces, PARTS, strict=False):
        label = f"{piece.label}, {piece.value:,.3g}"
        axes.barh([1], [piece.value], left=[begin], height=0.6, color=colour, label=label)
        begin += piece.value
    if total.target is not None:
        axes.axvline(total.target, color=RED, linewidth=2)
    axes.set_yticks([0, 1], [total.label, "sum of the parts"])
    axes.invert_yaxis()
    axes.set_xlabel(axis if total.target is None else f"{axis} (red: the target)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(pieces), 4), frameon=False, fontsize=9)
    _save(figure, path)


def curves(path: Path, rows: Sequence[Sequence[Panel]]) -> None:
    """Draw a grid of panels, rows of equal length or shorter, with one legend for all."""
    columns = max(len(row) for row in rows)
    figure = _figure(5.2 * columns, 3.7 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    entries: dict[str, Any] = {}
    for panels, all_axes in zip(rows, grid, strict=True):
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for panel, axes in zip(panels, all_axes, strict=False):
            drawn = [(line, _finite(line, is_log=panel.is_log)) for line in panel.lines]
            own: set[str] = set()
            for line, points in drawn:
                style = {"marker": line.mark or None, "linestyle": line.dash or "none"}
                found = axes.plot(*points, color=line.colour, alpha=0.8, linewidth=1.5, **style)
                if panel.has_legend:
                    found[0].set_label(line.label if line.label not in own else f"_{line.label}")
                    own.add(line.label)
                else:
                    entries.setdefault(line.label, found[0])
            if panel.is_log and any(xs for _, (xs, _) in drawn):
                axes.set_xscale("log")
            if panel.is_log_y and any(ys for _, (_, ys) in drawn):
                axes.set_yscale("log")
            if panel.ticks:
                axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
                axes.minorticks_off()
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            if panel.span is not None:
                axes.set_ylim(*panel.span)
            if panel.has_legend:
                axes.legend(fontsize=8, framealpha=0.85)
            axes.grid(alpha=0.25)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), frameon=False)
    _save(figure, path)


def _finite(line: Line, *, is_log: bool) -> tuple[list[float], list[float]]:
    """Return what of a line can be drawn: a run that broke down ends early, and a logarithm begins above 0."""
    kept = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y) and (x > 0 or not is_log)]
    return [x for x, _ in kept], [y for _, y in kept]


def _figure(width: float, height: float) -> "Figure":
    """Return a figure that belongs to no window and no global list."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=DPI)
