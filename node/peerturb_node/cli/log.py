"""`peerturb log`: read a run log. It may be a .runlog file, a coordinator's data folder, or a coordinator that runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peerturb.runlog.verify import Verified
    from peerturb_node.logsource import Source

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Read a run log: show, verify, replay, export.")

LogArgument = Annotated[
    Path | None, typer.Argument(metavar="LOG", help="A .runlog file, or a coordinator's data folder.")
]
CoordinatorOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Fetch the log from a running coordinator instead.")
]
TokenOption = Annotated[Path | None, typer.Option(help="File that holds the join token (with --coordinator).")]
FingerprintOption = Annotated[str, typer.Option(help="SHA-256 of the coordinator's certificate.")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Plaintext beyond this computer.")]
ModelOption = Annotated[
    str | None, typer.Option(help="Folder or hub name of the base model, instead of the RunSpec's.")
]
UntilOption = Annotated[int | None, typer.Option(min=0, metavar="ROUND", help="Stop after so many rounds.")]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="Of a run with an adapter: write the whole model, the adapter put into it.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(
    log: LogArgument = None,
    coordinator: CoordinatorOption = None,
    token_file: TokenOption = None,
    fingerprint: FingerprintOption = "",
    insecure: InsecureOption = False,
    rounds: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only records of rounds A to B; either may be left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List records: one line each."""
    from peerturb_node.logsource import record_row, rounds_between

    source = _source(log, coordinator, token_file, fingerprint, insecure)
    for position, record in rounds_between(source.records(), rounds):
        row = record_row(position, record)
        typer.echo(json.dumps(row) if as_json else f"{position:>8}  {row['text']}")


@app.command()
def verify(
    log: LogArgument = None,
    coordinator: CoordinatorOption = None,
    token_file: TokenOption = None,
    fingerprint: FingerprintOption = "",
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check bytes, hash chain, order of records, step sizes and scales; name the first bad record (exit code 3)."""
    from peerturb.runlog.verify import verify as verify_file

    with _source(log, coordinator, token_file, fingerprint, insecure).as_file() as path:
        found = verify_file(path)
    if as_json:
        typer.echo(json.dumps(_summary(found), indent=2))
        return
    summary = _summary(found)
    typer.echo(
        f"sound: {summary['records']} records, {summary['rounds']} rounds, {summary['probes']} probes of "
        f"{summary['peers']} peers, {summary['bytes']} bytes; chain {summary['chain'][:16]}"
    )
    if found.torn_bytes:
        typer.echo(f"the last {found.torn_bytes} bytes belong to a record that was not written whole: not part of it")


@app.command()
def replay(
    log: LogArgument = None,
    coordinator: CoordinatorOption = None,
    token_file: TokenOption = None,
    fingerprint: FingerprintOption = "",
    insecure: InsecureOption = False,
    model: ModelOption = None,
    until: UntilOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the model here (Hugging Face folder).")] = None,
    merge: MergeOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Apply a log to the base model: print the digest of the weights, and write them if --out is given."""
    source = _source(log, coordinator, token_file, fingerprint, insecure)
    _replay(source, model=model, until=until, out=out, merge=merge, device=device, as_json=as_json)


@app.command()
def export(
    log: LogArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Folder of the model, or (ending in .runlog) file of the log. Required."),
    ] = None,
    coordinator: CoordinatorOption = None,
    token_file: TokenOption = None,
    fingerprint: FingerprintOption = "",
    insecure: InsecureOption = False,
    model: ModelOption = None,
    until: UntilOption = None,
    merge: MergeOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write the fine-tuned model (or adapter) as a Hugging Face folder, or the log as a portable .runlog file."""
    from peerturb.errors import SpecError

    if out is None:
        raise SpecError("--out says where to write: a folder for the model, or a file ending in .runlog for the log")
    source = _source(log, coordinator, token_file, fingerprint, insecure)
    if out.suffix != ".runlog":
        _replay(source, model=model, until=until, out=out, merge=merge, device=device, as_json=as_json)
        return
    records = source.write(out)
    typer.echo(json.dumps({"records": records, "file": str(out)}) if as_json else f"{records} records written to {out}")


def _source(
    log: Path | None, coordinator: str | None, token_file: Path | None, fingerprint: str, insecure: bool
) -> "Source":
    from peerturb_node.logsource import Source

    return Source.of(log, coordinator=coordinator, token_file=token_file, fingerprint=fingerprint, is_insecure=insecure)


def _summary(found: "Verified") -> dict[str, Any]:
    ledger = found.ledger
    assert ledger.spec is not None
    return {
        "run": ledger.spec.name,
        "spec_digest": ledger.spec.digest.hex(),
        "records": ledger.position,
        "rounds": ledger.sealed_rounds,
        "probes": ledger.probes,
        "void_codes": ledger.void_codes,
        "peers": len(ledger.members),
        "is_finished": ledger.is_finished,
        "bytes": found.size,
        "torn_bytes": found.torn_bytes,
        "chain": found.chain.hex(),
    }


def _replay(
    source: "Source",
    *,
    model: str | None,
    until: int | None,
    out: Path | None,
    merge: bool,
    device: str,
    as_json: bool,
) -> None:
    from peerturb_node.replaying import replay_log

    with source.as_file() as path:
        result = replay_log(
            path, model=model, until=until, out=out, merge=merge, device=device, show_progress=not as_json
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    # Nodes, `status` and `log show` give the first eight digits of it.
    typer.echo(f"weights after {result['rounds']} rounds: digest {result['digest']}")
    if out is not None:
        typer.echo(f"model written to {out}")
