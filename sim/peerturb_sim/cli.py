"""`peerturb sim`: simulate a network. It turns words into calls; each command's work is a module of its own."""

from pathlib import Path
from typing import Annotated

import typer

from peerturb_sim import tools

SEED_MAX = 2**63 - 1
"""Of a RunSpec."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Simulate a network of peers: the same run, bit for bit."
)


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="Peers, lines, faults, rounds.")],
    seed: Annotated[int | None, typer.Option(min=0, max=SEED_MAX, help="Instead of the scenario's seed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run log and result.json.")] = Path("sim-out"),
    workers: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Measure a real model's probes on so many workers of Ray.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="Of a Ray cluster that runs already.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Simulate a scenario: its run log and result.json are the same bytes for the same seed."""
    from peerturb_sim.running import Cluster, run_scenario

    run_scenario(scenario, seed=seed, out=out, cluster=Cluster(workers=workers, address=address), as_json=as_json)


@app.command()
def swarm(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 100,
    first: Annotated[int, typer.Option(min=0, max=SEED_MAX, help="The first of them.")] = 0,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this real time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Run small networks whose faults each seed draws itself; report every broken invariant and what repeats it."""
    from peerturb_sim.running import run_seeds

    run_seeds(first=first, seeds=seeds, seconds=seconds, as_json=as_json)


@app.command()
def reproduce(
    log: Annotated[
        Path, typer.Argument(metavar="RUN.log", help="A log that real nodes wrote; a file, or a coordinator's folder.")
    ],
    trace: Annotated[Path, typer.Option(metavar="FILE", help="What `peerturb coordinator serve --trace` wrote.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|PEER=FILE",
            help="A peer's data, once for each: in the order of slots, or by the peer's name or identity.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="The base model.", show_default="the run's")
    ] = None,
    eval: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out data of peers that evaluated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the log that is made.")] = Path("reproduced"),
    threads: Annotated[int, typer.Option(min=0, max=1_024, help="As the nodes had; 0: torch decides.")] = 0,
    rows: Annotated[int, typer.Option(min=0, max=65_536, help="As the nodes had; 0: the engine decides.")] = 0,
    compute_dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="As the nodes had: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Make the log of a real run again, from its trace, model and data, and compare it with the recorded one.

    Ends with 0 if all bytes are equal, 1 if not, naming the first difference.
    """
    from peerturb_sim.reproducing import Local
    from peerturb_sim.reproducing import reproduce as run_again

    local = Local(model=model, data=data, eval=eval, threads=threads, rows=rows, compute_dtype=compute_dtype)
    raise typer.Exit(run_again(log, trace, local, out=out, as_json=as_json))


app.command()(tools.compare)
app.command()(tools.plan)
app.command()(tools.report)
