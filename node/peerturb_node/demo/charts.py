"""Curves in a terminal: braille dots, axes, marks. It knows numbers and cells, nothing of the demo."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

_DOT_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Unicode braille: bit of each dot by column, then row from the top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve. Points ascend in x; NaN breaks nothing, it is left out."""

    points: Sequence[tuple[float, float]]
    style: str
    is_joined: bool = True
    """True: dots are joined by straight lines; False: dots only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A moment on the x axis."""

    x: float
    sign: str
    """One character."""
    style: str


def draw(
    lines: Sequence[Line],
    *,
    columns: int,
    rows: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    y_labels: Sequence[tuple[float, str]],
    flags: Sequence[Flag] = (),
    x_label: str = "",
) -> Text:
    """Return `rows` lines of plot, one of axis with flags, one of x labels; each is `columns` cells wide at most.

    Args:
        lines: later ones are drawn over earlier ones where they share a cell.
        columns: cells, the y labels included.
        rows: cells of the plot itself.
        x_range: values at the left and right edge; the right one is the larger.
        y_range: values at the lower and upper edge.
        y_labels: (value, text) pairs for the left margin.
        flags: characters set into the axis.
        x_label: what x counts, shown after its range.
    """
    margin = max((len(text) for _, text in y_labels), default=0)
    width = max(4, columns - margin - 1)
    cells, styles = _raster(lines, width, rows, x_range, y_range)
    labels = {_row_of(value, rows, y_range): text for value, text in y_labels}
    flag_columns = {_column_of(flag.x, width, x_range): flag for flag in flags}
    text = Text(no_wrap=True)
    for row in range(rows):
        label = labels.get(row, "")
        text.append(label.rjust(margin), style="dim")
        text.append("┤" if label else "│", style="dim")
        for column in range(width):
            bits = cells[row][column]
            if bits:
                text.append(chr(0x2800 + bits), style=styles[row][column])
            elif column in flag_columns:
                text.append("┊", style=f"dim {flag_columns[column].style}")
            else:
                text.append(" ")
        text.append("\n")
    text.append(" " * margin + "└", style="dim")
    for column in range(width):
        flag = flag_columns.get(column)
        text.append(flag.sign if flag else "─", style=f"bold {flag.style}" if flag else "dim")
    text.append("\n")
    text.append(_x_labels(margin + 1, width, x_range, x_label), style="dim")
    return text


def _raster(
    lines: Sequence[Line], width: int, rows: int, x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[list[list[int]], list[list[str]]]:
    cells = [[0] * width for _ in range(rows)]
    styles = [[""] * width for _ in range(rows)]
    for line in lines:
        previous: tuple[int, int] | None = None
        for x, y in line.points:
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            dot = (_scale(x, x_range, 2 * width), 4 * rows - 1 - _scale(y, y_range, 4 * rows))
            path = _between(previous, dot) if previous is not None and line.is_joined else [dot]
            for column, row in path:
                cells[row // 4][column // 2] |= _DOT_BITS[column % 2][row % 4]
                styles[row // 4][column // 2] = line.style
            previous = dot
    return cells, styles


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line, both ends included."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]


def _scale(value: float, limits: tuple[float, float], dots: int) -> int:
    low, high = limits
    share = (value - low) / (high - low) if high > low else 0.0
    return min(dots - 1, max(0, round(share * (dots - 1))))


def _row_of(value: float, rows: int, limits: tuple[float, float]) -> int:
    return (4 * rows - 1 - _scale(value, limits, 4 * rows)) // 4


def _column_of(value: float, width: int, limits: tuple[float, float]) -> int:
    return _scale(value, limits, 2 * width) // 2


def _x_labels(indent: int, width: int, x_range: tuple[float, float], x_label: str) -> str:
    left, right = f"{x_range[0]:.0f}", f"{x_range[1]:.0f}"
    middle = x_label.center(max(0, width - len(left) - len(right)))
    return " " * indent + left + middle + right
