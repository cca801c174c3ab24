"""`peerturb tune`: which learning rate and epsilon suit this model and these data."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peerturb.zo.search import Outcome
    from peerturb_node.tuning import Tuned

app = typer.Typer(add_completion=False, no_args_is_help=True)

_WIDTH = 100
"""Columns that the table needs."""


@app.command()
def tune(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The RunSpec; `peerturb model` begins one.")],
    data: Annotated[Path, typer.Option(help="Training data: JSON Lines (.gz too) or plain text.")],
    eval_: Annotated[
        Path | None, typer.Option("--eval", help="Held-out data; settings are compared by its loss.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the base model, instead of the RunSpec's.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of this run to start from, instead of the base weights.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time for the sweep, once loaded.")] = 120,
    probes: Annotated[
        int | None, typer.Option(min=1, help="Probes a round.", show_default="the RunSpec's, fewer if time is short")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch decides.")] = 0,
    rows: Annotated[int, typer.Option(help="Most sequences in one pass; 0: the engine decides.")] = 0,
    compute_dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16", help="Type in which losses are computed, as nodes will be told."
        ),
    ] = "auto",
    estimator: Annotated[
        str, typer.Option(metavar="auto|spsa|exact", help="How projected gradients are found, as nodes will be told.")
    ] = "auto",
    fields: Annotated[str | None, typer.Option(metavar="FIELD=COLUMN,...", help="Names of the fields.")] = None,
    template: Annotated[str | None, typer.Option(help="Template for this data, instead of the RunSpec's.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recommended lines here; never over a file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Try learning rates and epsilons for some rounds each, from one saved point, and recommend lines for RUN.toml.

    Ends with 0 if there is something to recommend, 1 otherwise.
    """
    from peerturb.spec import RunSpec
    from peerturb_node import settings as settings_module
    from peerturb_node.cli.output import check_new, write_new

    spec = RunSpec.from_toml(run)
    target_file = None if out is None else check_new(out)
    flags = {
        # No coordinator is asked; a node's settings want one.
        "coordinator": "127.0.0.1:7470", "data": data, "eval": eval_, "model": model, "device": device,
        "threads": threads, "rows": rows, "compute_dtype": compute_dtype, "estimator": estimator,
        "fields": fields, "template": template,
    }  # fmt: skip
    settings = settings_module.load({key: value for key, value in flags.items() if value is not None})

    from peerturb.zo.heap import keep_large_blocks
    from peerturb_node.tuning import tune as sweep

    keep_large_blocks()
    show = _silent if as_json or not sys.stderr.isatty() else _progress
    found = sweep(spec, settings, checkpoint=checkpoint, budget_s=budget, probes=probes, on_outcome=show)
    if as_json:
        typer.echo(json.dumps(_finite(found.document()), indent=2))
    else:
        _show(found, out)
    if target_file is not None and found.toml:
        write_new(target_file, found.toml)
    raise typer.Exit(0 if found.recommendation.setting is not None else 1)


def _silent(outcome: "Outcome") -> None:
    """Say nothing."""


def _progress(outcome: "Outcome") -> None:
    setting = outcome.setting
    typer.echo(
        f"epsilon {setting.epsilon:g}, learning rate {setting.learning_rate:g}: "
        f"{outcome.before:.4f} -> {outcome.after:.4f} in {outcome.seconds:.0f} s",
        err=True,
    )


def _finite(value: object) -> object:
    """Return JSON values with NaN and the infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: "Tuned", out: Path | None) -> None:
    """Print for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.width < _WIDTH:  # a cut cell says nothing; a terminal wraps the line
        console = Console(width=_WIDTH)
    console.print(
        f"{found.parameters:,} parameters, losses in {found.compute_dtype}, {found.probes:,} "
        f"{'exact codes' if found.estimator == 'exact' else 'probes'} a round, "
        f"{found.seconds:.0f} s"
    )
    has_held_out = any(one.held_out_after is not None for one in found.outcomes)
    table = Table("rounds", "epsilon", "rate", "training loss", "+-", box=None)
    if has_held_out:
        table.add_column("held-out loss")
    for heading in ("clipped", "rms(c)", ""):
        table.add_column(heading)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[-1] else "right"
    search = sorted(found.outcomes, key=lambda one: (one.setting.epsilon, one.setting.learning_rate))
    for one in (*search, *found.final):
        cells = [str(one.rounds), f"{one.setting.epsilon:g}", f"{one.setting.learning_rate:g}"]
        cells += [_course(one.before, one.after), f"{one.error:.4f}"]
        cells += [_course(one.held_out_before, one.held_out_after)] if has_held_out else []
        cells += [f"{100 * one.clipped:.1f} %", f"{one.rms:.0f}", _verdict(found, one)]
        table.add_row(*cells)
    console.print(table)
    if found.is_cut:
        console.print("The budget ended the search; --budget gives it more time.")
    # Lines to be copied, and a sentence: neither may be wrapped or cut.
    console.print(f"\n{found.recommendation.text}", soft_wrap=True, markup=False, highlight=False)
    if found.warning is not None:
        console.print(f"\nwarning: {found.warning}", soft_wrap=True, markup=False, highlight=False)
    if found.toml:
        console.print(f"\n{found.toml}", soft_wrap=True, markup=False, highlight=False)
    if out is not None and found.toml:
        console.print(f"\nwritten to {out}", soft_wrap=True, markup=False, highlight=False)


def _course(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.4f} → {after:.4f}"


def _verdict(found: "Tuned", one: "Outcome") -> str:
    if one.setting == found.recommendation.setting and (one in found.final or not found.final):
        return "[bold green]recommended[/]"
    if one.has_diverged:
        return "[red]diverges[/]"
    return "" if one.has_learned else "learns nothing"
