"""`peerturb node run`: take part in a run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Join a run with this computer's replica and data.")


@app.callback()
def _group() -> None:
    """Keep `run` a sub-command."""


@app.command()
def run(
    coordinator: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The run's coordinator.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Private training data: JSON Lines (.gz too) or plain text.")
    ] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="Held-out data; results go to the log.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the base model, instead of the RunSpec's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="auto")] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of identity key, local log and checkpoint.", show_default="~/.peerturb/node"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Display name.", show_default="this computer's")] = None,
    token: Annotated[str | None, typer.Option(help="Join token; other users of this computer can see it.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds the join token.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="SHA-256 of the coordinator's certificate, from its join command.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow plaintext beyond this computer.", show_default=False)
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve health and metrics there; by default none."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: torch decides.", show_default="0")] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Most sequences in one pass, fewer need less memory; 0: the engine decides.", show_default="0"
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="Type in which losses are computed. One other than the weights' costs memory for a cast copy of them "
            "(2 or 4 bytes a parameter); auto: theirs, float16 on a GPU without bfloat16.",
            show_default="auto",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            metavar="auto|spsa|exact",
            help="Exact projected gradients by backward passes, or estimates by pairs of forward passes; auto: exact "
            "where the run allows it and memory suffices.",
            show_default="auto",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="auto|keep|recompute",
            help="In a backward pass: keep activations, or compute them twice to spare memory.",
            show_default="auto",
        ),
    ] = None,
    carry: Annotated[
        float | None,
        typer.Option(
            help="What is left of an exact contribution's gradient in the next round's, 0 to below 1; needs memory for "
            "a second set of gradients.",
            show_default="0",
        ),
    ] = None,
    probes: Annotated[
        int | None, typer.Option(help="Most codes a round; 0: the RunSpec's maximum.", show_default="0")
    ] = None,
    checkpoint_rounds: Annotated[
        int | None, typer.Option(help="Rounds between checkpoints; 0: only at the end.", show_default="200")
    ] = None,
    checkpoint_s: Annotated[
        float | None, typer.Option(help="Seconds between checkpoints; 0: count rounds only.", show_default="300")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(metavar="FIELD=COLUMN,...", help="Names of the template's fields in this data.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Template for this data, instead of the RunSpec's.")] = None,
    export: Annotated[Path | None, typer.Option(help="At the end, write a Hugging Face folder here.")] = None,
    wait_s: Annotated[
        float | None, typer.Option(help="Seconds to try to reach the coordinator at start.", show_default="30")
    ] = None,
    idle: Annotated[
        bool | None,
        typer.Option(
            "--idle",
            help="Give way: pause while other processes use the card (or the CPU), or on battery.",
            show_default=False,
        ),
    ] = None,
    idle_pause_percent: Annotated[
        float | None, typer.Option(help="Use by others from which on it pauses.", show_default="20")
    ] = None,
    idle_resume_percent: Annotated[
        float | None, typer.Option(help="Use by others up to which it goes on.", show_default="10")
    ] = None,
    idle_pause_s: Annotated[
        float | None, typer.Option(help="Seconds over which the first is averaged.", show_default="10")
    ] = None,
    idle_resume_s: Annotated[
        float | None, typer.Option(help="Seconds over which the second is averaged.", show_default="60")
    ] = None,
    compute: Annotated[str | None, typer.Option(hidden=True, help="torch, toy or stub.")] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="PEERTURB_NODE_CONFIG", help="TOML file with any of these settings.")
    ] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the merged settings and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for every event; rounds at most once a second.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Details, too: measurements, every round.")] = False,
) -> None:
    """Join a run: hold a replica, measure probes on private data, apply what everybody measured.

    Settings come from the --config file, then the environment (PEERTURB_NODE_*), then these flags; the last one wins.
    Ctrl-C leaves in order; a second Ctrl-C stops at once. SIGTERM never cuts an export off.
    """
    from peerturb_node import settings as settings_module

    flags: dict[str, Any] = {
        key: value
        for key, value in locals().items()
        if key in settings_module.NodeSettings.model_fields and value is not None
    }
    if eval_ is not None:
        flags["eval"] = eval_
    settings = settings_module.load(flags, config=config)
    if show_config:
        typer.echo(json.dumps(settings.shown(), indent=2))
        return

    from peerturb.zo.heap import keep_large_blocks
    from peerturb_node.main import run_node

    keep_large_blocks()
    raise typer.Exit(run_node(settings, is_json=as_json, is_verbose=verbose, stream=sys.stdout))
