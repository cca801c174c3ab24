"""`peerturb bench`: list the benchmarks, run one, show its rows.

It knows each benchmark as a name, a line of help and a module with `run(quick: bool) -> list[Row]`.
"""

import difflib
import importlib
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peerturb.errors import PeerturbError
from peerturb_bench.rows import Row, to_json

BENCHMARKS = {
    "update": "Applying a round, against seeding a generator and drawing a normal tensor for each probe.",
    "wire": "Bytes on the socket for each code, up and down, with all framing.",
    "overhead": "Milliseconds a round costs when computing costs nothing: real processes, fsync included.",
    "step": "A probe's two evaluations, against plain inference on the same tokens.",
    "join": "A peer that joins late: time until it trains, bytes it received.",
    "replay": "Replaying 10 000 rounds, beside what its parts cost alone.",
    "memory": "Peak memory of probes above that of plain inference.",
    "target": "Seconds and forward passes to the loss MeZO ends with, against MeZO; AdamW as the ceiling.",
    "sides": "Held-out loss with one-sided probes that share a clean loss, against two-sided, at equal forward passes.",
    "byte": "Rounds to the same held-out loss with one byte for each projected gradient, against f32 scalars.",
}
"""Name (and module below `peerturb_bench`) -> what it measures, against what."""

app = typer.Typer(add_completion=False)


class UnknownBenchmarkError(PeerturbError):
    """There is no benchmark of that name."""

    exit_code = 2


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without a name they are listed.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of rows {name, value, unit, reference, ratio}.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes: seconds, and rougher figures.")] = False,
) -> None:
    """Measure one of the project's claims on this computer."""
    if name is None:
        _list()
        return
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise UnknownBenchmarkError(f"there is no benchmark {name!r}; {hint}")
    rows: list[Row] = importlib.import_module(f"peerturb_bench.{name}").run(quick)
    if as_json:
        sys.stdout.write(to_json(rows) + "\n")
    else:
        Console().print(_table(name, rows))


def _list() -> None:
    """Print the benchmarks' names and what each measures."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, summary in BENCHMARKS.items():
        table.add_row(name, summary)
    Console().print(table)


def _table(name: str, rows: list[Row]) -> Table:
    """Lay out the rows for people."""
    table = Table(title=f"{name}: {BENCHMARKS[name]}", title_justify="left")
    table.add_column("name")
    for header in ("value", "unit", "reference", "ratio"):
        table.add_column(header, justify="left" if header == "unit" else "right")
    for row in rows:
        table.add_row(row.name, _figure(row.value), row.unit, _figure(row.reference), _figure(row.ratio))
    return table


def _figure(value: float | None) -> str:
    """Return four significant digits, thousands grouped; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
