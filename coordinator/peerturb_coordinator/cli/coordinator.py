"""`peerturb coordinator`: serve a run, make its keys, restore its log."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Serve a run to peers; make its keys; restore its log."
)


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The RunSpec: what all peers agree on.")],
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address to bind; port 0 takes a free one.", show_default="127.0.0.1:7470"
        ),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST", help="Host peers use, for the printed join command.")
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve the live page, health and metrics there; by default none."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the run log; an existing run there goes on.", show_default="peerturb-coordinator"),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the membership trace there, for `peerturb sim reproduce`."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Certificate and join token, made there at the first start."),
    ] = None,
    tls_dir: Annotated[Path | None, typer.Option(help="Folder that `peerturb coordinator keys` filled.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext beyond loopback.")] = False,
    token: Annotated[
        str | None, typer.Option(metavar="FILE|TEXT", help="Join token, or the file that holds it.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of settings; flags and environment win over it.")
    ] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the bound port there once peers can come.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the settings as JSON and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")] = False,
) -> None:
    """Admit peers, seal their rounds and keep the run log, until SIGTERM or Ctrl-C.

    Started again on the same --data-dir, the run goes on where it stopped.
    """
    from peerturb.errors import SpecError
    from peerturb_coordinator.keys import read_token, ready_keys
    from peerturb_coordinator.settings import CoordinatorSettings

    if keys is not None:
        if tls_dir is not None or token is not None or insecure:
            raise SpecError("--keys stands for --tls-dir and --token, and means TLS; leave the others away")
        tls_dir = keys
        # To look at the settings makes no files.
        token = None if show_config else str(ready_keys(keys, [advertise] if advertise else []))
    flags = {
        "listen": listen,
        "advertise": advertise,
        "http": http,
        "data_dir": data_dir,
        "trace": trace,
        "tls_dir": tls_dir,
        "insecure": insecure or None,
        "token": None if token is None else read_token(token),
        "log_level": log_level,
    }
    chosen = CoordinatorSettings.load(file=settings, flags=flags)
    if show_config:
        typer.echo(json.dumps(chosen.shown(), indent=2))
        return
    from peerturb.spec import RunSpec
    from peerturb_coordinator.main import serve_until_signal

    serve_until_signal(RunSpec.from_toml(run), chosen, as_json=as_json, port_file=port_file)


@app.command()
def keys(
    out: Annotated[Path, typer.Option(help="Folder for certificate, key and token.")] = Path("peerturb-keys"),
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME_OR_IP", help="A name or address peers use; may be repeated, the first is printed."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port for the printed join command.")] = 7470,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite existing keys.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a self-signed certificate, its private key and a join token; print the commands that use them."""
    from peerturb_coordinator.keys import advertised_address, join_command, make_keys

    hosts = host or []
    made = make_keys(out, hosts, replace=replace)
    join = join_command(advertised_address(hosts, port), fingerprint=made.fingerprint, token=made.token)
    command = f"peerturb coordinator serve RUN.toml --listen 0.0.0.0:{port} --tls-dir {out} --token {made.token_file}"
    if hosts:
        command += f" --advertise {hosts[0]}"
    if as_json:
        rows = {
            "certificate": str(made.certificate),
            "key": str(made.key),
            "token_file": str(made.token_file),
            "fingerprint": made.fingerprint,
            "serve": command,
            "join": join,
        }
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"certificate  {made.certificate}\nprivate key  {made.key}\njoin token   {made.token_file}\n")
    typer.echo(f"Start the coordinator with\n\n  {command}\n\nVolunteers join with\n\n  {join}\n")
    if not hosts:
        typer.echo("HOST stands for this computer's name or address; --host puts it in.")


@app.command()
def restore(
    logs: Annotated[
        list[Path], typer.Argument(metavar="LOG...", help=".runlog files: a backup, or local.runlog of a node's state.")
    ],
    data_dir: Annotated[Path, typer.Option(help="Folder to make.")] = Path("peerturb-coordinator"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a data folder from the longest of some logs of a run; `serve` then goes on from there.

    What nodes have beyond that is lost: name a log of theirs too. While a coordinator runs, `peerturb log export
    DATA_DIR --out FILE.runlog` backs it up.
    """
    from peerturb_coordinator.restoring import restore as restore_from

    found = restore_from([path.expanduser() for path in logs], data_dir.expanduser())
    ledger = found.verified.ledger
    if as_json:
        row = {"log": str(found.log), "records": ledger.position, "rounds": ledger.sealed_rounds}
        typer.echo(json.dumps(row | {"chain": found.verified.chain.hex(), "data_dir": str(data_dir)}, indent=2))
        return
    typer.echo(f"{data_dir} holds {ledger.position} records, {ledger.sealed_rounds} rounds, from {found.log}\n")
    typer.echo(f"Go on with\n\n  peerturb coordinator serve RUN.toml --data-dir {data_dir}")
