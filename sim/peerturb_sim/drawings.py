"""Curves and a timeline as inline SVG that takes its colours from the page. It knows numbers, nothing of runs.

matplotlib draws with stand-in colours, which become the style sheet's: so one drawing serves light and dark pages.
Lines differ in dashes and marks too, and carry their names. Drawings of `SLIM` inches can be read on a phone.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_MAX = 800
"""Points of a curve: more cannot be seen; each is then the mean of its neighbours."""
CELLS = 400
"""Places along a timeline."""
WIDE, SLIM = 11.0, 4.4
"""Widths of drawings, inches: as wide as the page, and as a phone or half of the page. Text of 9.5 points is then drawn
about as large as it says on a phone, and larger elsewhere."""

_INK = {"ink": "#010203", "soft": "#040506", "line": "#070809", "blue": "#0a0b0c", "amber": "#0d0e0f",
        "green": "#101112", "red": "#131415", "violet": "#161718"}  # fmt: skip
"""Stand-ins by the names that the style sheet has for its colours."""
_DASHES = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 1.5))}
_RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "peerturb", "font.size": 9.5, "font.family": "DejaVu Sans",
       "text.color": _INK["ink"], "axes.edgecolor": _INK["soft"], "axes.labelcolor": _INK["soft"],
       "xtick.color": _INK["soft"], "ytick.color": _INK["soft"], "grid.color": _INK["line"],
       "axes.formatter.useoffset": False}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line, or marks without a line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    """None and what is not finite are left out."""
    colour: str = "blue"
    dash: str = "solid"
    mark: str = ""
    """matplotlib's letter for the marks at the points; with `dash` empty there are only marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One row of a timeline."""

    name: str
    spans: Sequence[tuple[float, float]]
    """(from, to); equal for a moment."""
    colour: str = "red"


def curves(
    key: str, items: Sequence[Curve], *, title: str, x: str, y: str, is_log: bool = False,
    amount: Callable[[float], str] | None = None,
) -> str:  # fmt: skip
    """Return an `<svg>`.

    Args:
        key: begins its identifiers, so that drawings share none.
        items: the curves, on common axes.
        title: read to the blind.
        x: what the horizontal axis shows, with its unit.
        y: the same of the vertical one.
        is_log: whether that one is logarithmic, if anything is above 0.
        amount: how its numbers are written; matplotlib's way if there is none.
    """
    import matplotlib

    with matplotlib.rc_context(_RC):
        figure = _figure(SLIM, 2.7)
        axes = figure.subplots()
        for item in items:
            points = thin(item.xs, item.ys)
            style: Any = _DASHES.get(item.dash, "none")
            axes.plot(
                [at for at, _ in points], [value for _, value in points], label=item.name, color=_INK[item.colour],
                linestyle=style, linewidth=1.4, marker=item.mark or None, markersize=5, markerfacecolor="none",
            )  # fmt: skip
        if is_log and any(value > 0 for item in items for _, value in thin(item.xs, item.ys)):
            axes.set_yscale("log")
        if amount is not None:
            axes.yaxis.set_major_formatter(lambda value, _: amount(value))
        axes.set(xlabel=x, ylabel=y)
        _strip(axes)
        if len(items) > 1:
            figure.legend(
                loc="outside upper left", ncols=len(items), frameon=False, handlelength=2.4, columnspacing=1.4
            )
        return _inline(figure, key, title)


def timeline(key: str, bands: Sequence[Band], *, end: float, title: str, x: str, width: float = WIDE) -> str:
    """Return an `<svg>` with a row for each band, from 0 to `end`; as high as spans of the band there are at once.

    Args:
        key: as in `curves`; so are `title` and `x`.
        bands: the rows.
        end: of the time axis.
        title: read to the blind.
        x: what the axis shows.
        width: `WIDE`, with the rows' names at their left; or `SLIM`, with the names above the rows.
    """
    import matplotlib

    is_slim = width < WIDE
    with matplotlib.rc_context(_RC):
        figure = _figure(width, 0.8 + (0.5 if is_slim else 0.3) * len(bands))
        axes = figure.subplots()
        edges = [(end or 1) * cell / CELLS for cell in range(CELLS + 1)]
        for row, band in enumerate(bands):
            counts = at_once(band.spans, end)
            floor, most = row + 0.36, max([1, *counts])
            tops = [floor - (0.45 if is_slim else 0.72) * count / most for count in (*counts, counts[-1])]
            axes.fill_between(edges, floor, tops, step="post", color=_INK[band.colour], linewidth=0.5)
            if is_slim:
                axes.text(0, row - 0.14, band.name, color=_INK["soft"], verticalalignment="bottom")
        names = [] if is_slim else [band.name for band in bands]
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, end or 1), ylim=(len(bands) - 0.4, -0.6), xlabel=x)
        _strip(axes)
        axes.grid(visible=False, axis="y")
        return _inline(figure, key, title)


def thin(xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float]]:
    """Return at most `POINTS_MAX` points of a curve: those there are, or means of as many neighbours each."""
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    step = math.ceil(len(kept) / POINTS_MAX)
    if step <= 1:
        return kept
    parts = [kept[at : at + step] for at in range(0, len(kept), step)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def at_once(spans: Sequence[tuple[float, float]], end: float) -> list[int]:
    """Return for each of `CELLS` places from 0 to `end` how many spans touch it; a moment touches one."""
    width = (end or 1) / CELLS
    changes = [0] * (CELLS + 1)
    for begin, until in spans:
        first = min(CELLS - 1, max(0, int(begin / width)))
        changes[first] += 1
        changes[min(CELLS - 1, max(first, int(until / width))) + 1] -= 1
    return list(accumulate(changes[:-1]))


def _figure(width: float, height: float) -> "Figure":
    """Return a figure that belongs to no window and no global list; the page is its background."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _strip(axes: "Axes") -> None:
    axes.set_facecolor("none")
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _inline(figure: "Figure", key: str, title: str) -> str:
    """Turn a figure into an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style element within a page is the whole page's; fonts are the page's too.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = text.replace("font-family: 'DejaVu Sans'; ", "").replace("xlink:href=", "href=")
    for name, colour in _INK.items():
        text = text.replace(colour, f"var(--{name})")
    # Presentation attributes know no variables, and identifiers must differ between the drawings of a page.
    text = re.sub(r'\b(stroke|fill)="(var\([^"]*\))"', r'style="\1: \2"', text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = text.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg class="plot" {box[0]} role="img" aria-label="{title}">'
    return head + text[text.index(">") + 1 :].strip()
