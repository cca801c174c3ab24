"""`peerturb sim`: simulate a network. It turns words into calls; each command's work is a module of its own."""

from pathlib import Path
from typing import Annotated

import typer

from peerturb_sim import tools

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Simulate a network of peers: the same run, bit for bit."
)


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="Peers, lines, faults, rounds.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the scenario's seed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run log and result.json.")] = Path("sim-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Simulate a scenario: its run log and result.json are the same bytes for the same seed."""
    from peerturb_sim.running import run_scenario

    run_scenario(scenario, seed=seed, out=out, as_json=as_json)


@app.command()
def swarm(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 100,
    first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this real time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Run small networks whose faults each seed draws itself; report every broken invariant and what repeats it."""
    from peerturb_sim.running import run_seeds

    run_seeds(first=first, seeds=seeds, seconds=seconds, as_json=as_json)


app.command()(tools.compare)
app.command()(tools.plan)
app.command()(tools.report)
