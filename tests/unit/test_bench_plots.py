"""Plots become files whatever the figures are; how they look is for eyes."""

import math
from pathlib import Path

import pytest

from peerturb_bench import plots
from peerturb_bench.plots import Bar, Line, Panel

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _is_drawn(path: Path) -> bool:
    return path.read_bytes()[:8] == SIGNATURE


@pytest.mark.parametrize("is_log", [False, True])
def test_bars(tmp_path: Path, is_log: bool) -> None:
    items = [
        Bar(label="with everything", value=1_300.0, target=1_000.0, low=1_200.0, high=1_350.0),
        Bar(label="alone", value=2.5, colour=plots.GREY),
    ]
    plots.bars(tmp_path / "bars.png", items, title="t", axis="a", is_log=is_log)
    assert _is_drawn(tmp_path / "bars.png")


def test_parts(tmp_path: Path) -> None:
    pieces = [Bar(label=f"part {number}", value=float(number)) for number in range(1, 7)]
    plots.parts(tmp_path / "parts.png", Bar(label="all", value=30.0, target=40.0), pieces, title="t", axis="s")
    assert _is_drawn(tmp_path / "parts.png")


def test_curves_of_unequal_rows_and_broken_runs(tmp_path: Path) -> None:
    lines = [Line(label="a", xs=(0, 10, 20), ys=(1.0, math.inf, math.nan), colour=plots.RED)] * 2
    panel = Panel(title="t", x="x", y="y", lines=lines)
    log = Panel(title="t", x="x", y="y", lines=lines, is_log=True)
    plots.curves(tmp_path / "curves.png", [[panel, log], [panel]])
    assert _is_drawn(tmp_path / "curves.png")
