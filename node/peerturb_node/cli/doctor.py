"""`peerturb doctor`: what would keep this computer from joining a run, before it tries."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def doctor(
    coordinator: Annotated[str, typer.Option(metavar="HOST:PORT", help="The run's coordinator.")],
    data: Annotated[Path | None, typer.Option(help="Data file to try with the run's template.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the base model.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    state: Annotated[Path, typer.Option(help="State folder the node will use.")] = Path("~/.peerturb/node"),
    token: Annotated[str | None, typer.Option(help="Join token.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds the join token.")] = None,
    fingerprint: Annotated[str, typer.Option(help="SHA-256 of the coordinator's certificate.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext beyond this computer.")] = False,
    fields: Annotated[str | None, typer.Option(metavar="FIELD=COLUMN,...", help="Names of the fields.")] = None,
    template: Annotated[str | None, typer.Option(help="Template for this data, instead of the RunSpec's.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch decides.")] = 0,
    compute_dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type in which losses are computed.")
    ] = "auto",
    skip_speed: Annotated[bool, typer.Option("--skip-speed", help="Do not measure probes per second.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of checks.")] = False,
) -> None:
    """Check network, TLS, version, token, model, data, memory and disk; say what to do about each fault.

    Ends with 0 if everything is in order, 1 otherwise.
    """
    from peerturb_node import settings as settings_module
    from peerturb_node.doctor.report import print_checks

    flags = {
        "coordinator": coordinator,
        "data": data,
        "model": model,
        "device": device,
        "state": state,
        "token": token,
        "token_file": token_file,
        "fingerprint": fingerprint,
        "insecure": insecure,
        "fields": fields,
        "template": template,
        "threads": threads,
        "compute_dtype": compute_dtype,
    }
    settings = settings_module.load(flags)

    from peerturb.zo.heap import keep_large_blocks
    from peerturb_node.doctor.checks import examine

    keep_large_blocks()  # as a node does, whose speed is told
    is_well = print_checks(examine(settings, is_speed_measured=not skip_speed), as_json=as_json)
    raise typer.Exit(0 if is_well else 1)
