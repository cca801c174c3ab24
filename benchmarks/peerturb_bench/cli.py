"""`peerturb bench`: list the benchmarks, run one or the suite, show rows.

It turns words into calls and rows into tables; what is measured is the business of `peerturb_bench.registry`.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peerturb.errors import PeerturbError
from peerturb.zo.heap import keep_large_blocks
from peerturb_bench.registry import BENCHMARKS, SUITE, measure
from peerturb_bench.rows import Row, to_json

SUITE_NAME = "suite"
SUITE_OUT = Path("bench-out")

app = typer.Typer(add_completion=False)


class BenchUsageError(PeerturbError):
    """There is no benchmark of that name, or it does not do what the flags ask for."""

    exit_code = 2


class BenchFailedError(PeerturbError):
    """Some benchmarks of the suite could not be run."""


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(help="Which benchmark, or `suite` for several; without a name they are listed.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of rows {name, value, unit, reference, ratio, ...}.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes: seconds, and rougher figures.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for plots; by default none are drawn, by `suite` in bench-out.")
    ] = None,
) -> None:
    """Measure one of the project's claims on this computer, or with `suite` several, and write file and plots."""
    if name is None:
        _list()
    elif name == SUITE_NAME:
        _run_suite(_folder(out or SUITE_OUT), as_json=as_json, quick=quick)
    elif name not in BENCHMARKS:
        near = difflib.get_close_matches(name, [SUITE_NAME, *BENCHMARKS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([SUITE_NAME, *BENCHMARKS])}"
        raise BenchUsageError(f"there is no benchmark {name!r}; {hint}")
    elif out is not None and not BENCHMARKS[name].is_drawn:
        drawn = ", ".join(key for key, benchmark in BENCHMARKS.items() if benchmark.is_drawn)
        raise BenchUsageError(f"{name} draws nothing, so leave --out away; there are plots of {drawn}")
    else:
        keep_large_blocks()  # as nodes do
        rows = measure(name, quick=quick, out=None if out is None else _folder(out))
        if as_json:
            sys.stdout.write(to_json(rows) + "\n")
        else:
            _show(name, rows)


def _run_suite(out: Path, *, as_json: bool, quick: bool) -> None:
    """Run all of the suite; raise at the end if something failed."""
    from peerturb_bench import suite  # brings torch, which help and list can do without

    keep_large_blocks()  # as nodes do
    document = suite.run(quick=quick, out=out, show=(lambda name, rows: None) if as_json else _show)
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    failed = suite.failures(document)
    if failed:
        raise BenchFailedError(
            f"{len(failed)} of {len(SUITE)} benchmarks failed, the others' results are in {out / suite.FILE}:\n"
            + "\n".join(f"  {name}: {why}" for name, why in failed.items())
        )


def _folder(path: Path) -> Path:
    """Make the folder if it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchUsageError(f"--out {path}: {error.strerror}; name a folder that can be written to") from error
    return path


def _list() -> None:
    """Print the benchmarks' names and what each measures."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, benchmark in BENCHMARKS.items():
        table.add_row(name, benchmark.summary)
    table.add_row(SUITE_NAME, f"{', '.join(SUITE)}, one after the other; JSON and plots in a folder.")
    Console().print(table)


def _show(name: str, rows: Sequence[Row]) -> None:
    """Print the rows for people, their notes below."""
    console = Console()
    table = Table(title=f"{name}: {BENCHMARKS[name].summary}", title_justify="left")
    table.add_column("name")
    for header in ("value", "unit", "reference", "ratio"):
        table.add_column(header, justify="left" if header == "unit" else "right")
    has_quartiles = any(row.low is not None for row in rows)
    if has_quartiles:
        table.add_column("quartiles", justify="right")
    for row in rows:
        cells = [row.name, _figure(row.value), row.unit, _figure(row.reference), _figure(row.ratio)]
        if has_quartiles:
            cells.append("" if row.low is None else f"{_figure(row.low)} to {_figure(row.high)}")
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.name}: {row.note}", markup=False, highlight=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    """Return four significant digits, thousands grouped; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
