"""Plots as inline SVG that follow the page's colours (light or dark) and its width. It knows numbers, not the demo."""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 26, 34
_LABEL_GAP = 13
"""Vertical distance of the labels of markers that stand close together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve; `colour` is a class of the page's style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    kind: Literal["line", "dots"] = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A vertical line at a moment."""

    x: float
    label: str
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line to compare with."""

    y: float
    label: str
    colour: str = "muted"


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_text: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    markers: Sequence[Marker] = (),
    levels: Sequence[Level] = (),
) -> str:
    """Return an `<svg>` with axes, grid, legend, markers, and its data for the page's pointer read-out.

    Args:
        title: for screen readers.
        series: drawn in order.
        x_label: what x counts.
        y_text: how a y value is written.
        y_range: lower and upper edge; by default from 0 to a round figure above all values.
        markers: vertical lines with a label on top.
        levels: dashed horizontal lines with a label.
    """
    values = [y for s in series for _, y in s.points if math.isfinite(y)] + [level.y for level in levels]
    xs = [x for s in series for x, _ in s.points]
    x_high = max(xs, default=1.0) or 1.0
    ticks = nice_ticks(*(y_range or (0.0, max(values, default=1.0))))
    low, high = (y_range[0], y_range[1]) if y_range else (ticks[0], ticks[-1])

    def place_x(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * x / x_high

    def place_y(y: float) -> float:
        share = (y - low) / (high - low) if high > low else 0.0
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * min(1.0, max(0.0, share))

    parts = [_grid(ticks, place_y, y_text), _x_axis(x_high, place_x, x_label), _levels(levels, place_y)]
    parts.append(_markers(markers, place_x))
    parts += [_series(s, place_x, place_y) for s in series]
    data = {
        "left": _LEFT, "right": WIDTH - _RIGHT, "max": x_high, "unit": x_label,
        "series": [
            {"name": s.name, "colour": s.colour,
             "points": [[x, round(place_y(y), 1), y_text(y)] for x, y in s.points if math.isfinite(y)]}
            for s in series
        ],
    }  # fmt: skip
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/><g class="spots"></g>')
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f"data-plot='{html.escape(json.dumps(data, separators=(',', ':')), quote=True)}'>" + "".join(parts) + "</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """Return the names of the curves with their colours."""
    return '<p class="legend">' + " ".join(
        f'<span><i class="{s.colour} {s.kind}"></i>{html.escape(s.name)}</span>' for s in series
    ) + "</p>"  # fmt: skip


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values that cover [low, high], ascending; the last is >= high."""
    high = high if high > low else low + 1.0
    span = high - low
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    start = math.floor(low / step + 1e-9)
    ticks = [start * step]
    while ticks[-1] < high - 1e-9 * span:
        ticks.append((start + len(ticks)) * step)
    return ticks


def _grid(ticks: Sequence[float], place_y: Callable[[float], float], y_text: Callable[[float], str]) -> str:
    rows = []
    for tick in ticks:
        y = place_y(tick)
        rows.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        rows.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_text(tick)}</text>')
    return "".join(rows)


def _x_axis(x_high: float, place_x: Callable[[float], float], x_label: str) -> str:
    y = HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    for tick in nice_ticks(0.0, x_high):
        if tick <= x_high:
            parts.append(
                f'<text class="tick" x="{place_x(tick):.1f}" y="{y + 15}" text-anchor="middle">{tick:g}</text>'
            )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{y + 30}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _levels(levels: Sequence[Level], place_y: Callable[[float], float]) -> str:
    parts = []
    for level in levels:
        y = place_y(level.y)
        parts.append(
            f'<line class="level {level.colour}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="note {level.colour}" x="{WIDTH - _RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">'
            f"{html.escape(level.label)}</text>"
        )
    return "".join(parts)


def _markers(markers: Sequence[Marker], place_x: Callable[[float], float]) -> str:
    """Vertical lines; labels take turns on two heights so that neighbours do not overlap."""
    parts = []
    for index, marker in enumerate(markers):
        x = place_x(marker.x)
        anchor = "end" if x > WIDTH - 90 else "middle"
        y = _TOP - 4 - (_LABEL_GAP if index % 2 else 0)
        parts.append(
            f'<line class="mark {marker.colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 3}" y2="{HEIGHT - _BOTTOM}"/>'
            f'<text class="note {marker.colour}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">'
            f"{html.escape(marker.label)}</text>"
        )
    return "".join(parts)


def _series(series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    points = [(place_x(x), place_y(y)) for x, y in series.points if math.isfinite(y)]
    if series.kind == "dots":
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in points)
        return f'<g class="dots {series.colour}">{circles}</g>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points) if len(points) <= 40 else ""
    return f'<path class="line {series.colour}" d="{path}"/><g class="dots {series.colour}">{dots}</g>'
