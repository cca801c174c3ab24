"""The commands of `peerturb sim` that simulate nothing: compare logs, plan a run, make a report. They turn words into
calls."""

import json
from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A log file, or a coordinator's, node's or simulation's folder.")
    ],
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


def plan(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN.toml", help="The run's rules; flags stand above them.")
    ] = None,
    cards: Annotated[
        str, typer.Option(metavar="COUNT:CARD,...", help="Peers, such as 3:rtx4090,10:laptop-cpu; `this` is measured.")
    ] = "",
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the base model.")] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="N", help="Size of the model instead, such as 7e9.")
    ] = None,
    trained: Annotated[
        float | None, typer.Option(metavar="N", help="Parameters that are trained (of an adapter).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16", help="Type of the weights.", show_default="the run's")
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the losses.", show_default="the weights'")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of an example.", show_default="the run's longest")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples of a probe.", show_default="the run's")] = None,
    probes: Annotated[int | None, typer.Option(help="Probes of a contribution.", show_default="the run's")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds to do.", show_default="the run's")] = None,
    line: Annotated[
        str, typer.Option(metavar="NAME|DOWN/UP", help="Of each peer: home, fibre, mobile, ... or Mbit/s.")
    ] = "home",
    coordinator_line: Annotated[str, typer.Option(metavar="NAME|DOWN/UP", help="Of the coordinator.")] = "fibre",
    latency: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="One way, of each peer.", show_default="the line's")
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option(metavar="PART", help="Part of their peak that the table's cards reach, 0 to 1.")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0, help="Of the card `this`.")] = None,
    table: Annotated[Path | None, typer.Option(metavar="CARDS.toml", help="Cards of your own.")] = None,
    device: Annotated[str, typer.Option(help="Of the card `this`: cpu, cuda, cuda:N or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of `this`; 0: torch decides.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would take: round time, bytes, energy and the bottleneck, with every sum written out."""
    from peerturb_sim.cards import known_cards, parse_cards, read_cards
    from peerturb_sim.jobs import job_of
    from peerturb_sim.plan import plan as work_out
    from peerturb_sim.planned import lines
    from peerturb_sim.planning import groups_of, line_of

    known = known_cards() if table is None else read_cards(table)
    chosen = parse_cards(cards, known) if cards else {}
    job = job_of(
        run, model=model, parameters=parameters, trained=trained, dtype=dtype, compute_dtype=compute_dtype,
        tokens=tokens, examples=examples, probes=probes, rounds=rounds,
    )  # fmt: skip
    own_line = line_of(line, latency, flag="--line")
    far_line = line_of(coordinator_line, None, flag="--coordinator-line")
    groups = groups_of(job, chosen, known, efficiency=efficiency, watts=watts, device=device, threads=threads)
    found = work_out(job, groups, line=own_line, coordinator_line=far_line)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2))
        return
    for text in lines(found):
        typer.echo(text)


def report(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT.json", help="What `peerturb sim run` wrote, or its folder.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page.", show_default="report.html beside the result")
    ] = None,
) -> None:
    """Make the report of a simulated run: one HTML file with curves, faults and what each peer gave."""
    from peerturb_sim.report import write_report
    from peerturb_sim.result import Result

    path = result / "result.json" if result.is_dir() else result
    found = Result.read(path)
    page = out or path.with_name("report.html")
    write_report(page, found)
    typer.echo(f"report written to {page}")
