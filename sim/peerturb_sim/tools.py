"""The commands of `peerturb sim` that simulate nothing: compare two logs. They turn words into calls."""

import json
from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A .runlog file, or a coordinator's data folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    as_json: JsonOption = False,
) -> None:
    """Find the first difference of two run logs: which record, which field, both values, and what that means.

    Ends with 0 if they are equal, 1 if they differ (or one is the other's beginning), 2 if one cannot be used.
    """
    from peerturb_sim.compare import compare_logs, lines

    found = compare_logs(first, second)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2))
    else:
        for line in lines(found, (str(first), str(second))):
            typer.echo(line)
    raise typer.Exit(found.exit_code)
