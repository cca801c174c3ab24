"""`peerturb status`: ask a coordinator how its run goes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peerturb.ids import short_hex

if TYPE_CHECKING:
    from peerturb.wire.v1 import coordinator_pb2 as pb
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

app = typer.Typer(add_completion=False)

_PIPE_COLUMNS = 200
"""Holds a row with the longest name."""

_TIMEOUT_S = 10.0


@app.command()
def status(
    coordinator: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the coordinator.")
    ] = "127.0.0.1:7470",
    fingerprint: Annotated[str, typer.Option(help="sha256:... of its certificate, as in the join command.")] = "",
    authority: Annotated[
        Path | None, typer.Option(help="PEM file of the authority that signed its certificate.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="It serves without TLS.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the join token; with it --json has whole identity keys.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print round, loss, peers and what the open round waits for."""
    import asyncio

    from peerturb.wire.channel import security_for
    from peerturb_coordinator.keys import read_token

    trust = security_for(coordinator, insecure=insecure, fingerprint=fingerprint, authority_file=authority)
    token = "" if token_file is None else read_token(str(token_file.expanduser().absolute()))
    answer = asyncio.run(_ask(coordinator, trust, token))
    if as_json:
        typer.echo(json.dumps(_as_json(answer), indent=2))
    else:
        _show(answer)


async def _ask(address: str, trust: Any, token: str) -> "pb.RunStatus":
    """Make the call.

    Raises:
        UnreachableError: no answer.
        RefusedError: the token is wrong.
    """
    import grpc.aio

    from peerturb.errors import RefusedError, RejectCode, UnreachableError
    from peerturb.wire.channel import open_channel, token_metadata
    from peerturb.wire.v1 import coordinator_pb2 as pb
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorStub

    async with await open_channel(address, trust) as channel:
        stub: CoordinatorAsyncStub = CoordinatorStub(channel)
        try:
            return await stub.Status(pb.StatusRequest(), timeout=_TIMEOUT_S, metadata=token_metadata(token))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                why = f"{address} refuses: {error.details()}; the coordinator's operator has the right one"
                raise RefusedError(RejectCode.BAD_TOKEN, why) from error
            raise UnreachableError(
                f"{address} does not answer as a coordinator: {error.details() or error.code().name}; "
                "is it running there? With TLS it needs the --fingerprint of its join command, without TLS on another "
                "computer --insecure"
            ) from error


def _as_json(answer: "pb.RunStatus") -> dict[str, Any]:
    """Return the answer as JSON values: digests in hex, a loss that does not exist as null."""
    return {
        "run": answer.run,
        "run_digest": answer.spec_digest.hex(),
        "round": answer.round,
        "records": answer.head,
        "chain": answer.chain.hex(),
        "finished": answer.finished,
        "fault": answer.fault,
        "warning": answer.warning,
        "waiting_for": answer.waiting_for,
        "loss": _number(answer.loss),
        "scale": answer.scale,
        "alpha": answer.alpha,
        "digest": short_hex(answer.digest),
        "probes": answer.probes,
        "void_codes": answer.void_codes,
        "digest_mismatches": answer.digest_mismatches,
        "rejects": dict(sorted(answer.rejects.items())),
        "seals": dict(sorted(answer.seals.items())),
        "uptime_ms": answer.uptime_ms,
        "peers": [
            {
                "slot": peer.slot,
                "name": peer.name,
                "key": peer.key.hex(),
                "state": peer.state,
                "probes": peer.probes,
                "last_round": peer.last_round if peer.probes else None,
                "loss": _number(peer.loss),
            }
            for peer in answer.peers
        ],
    }


def _number(value: float) -> float | None:
    """Return the value, None for NaN and the infinities, which JSON does not have."""
    return value if value - value == 0 else None


def _show(answer: "pb.RunStatus") -> None:
    """Print for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # whoever reads a pipe wants whole words, however long the lines
        console = Console(width=_PIPE_COLUMNS)
    state = "finished" if answer.finished else "running"
    if answer.fault:
        state = f"[bold red]stopped: {escape(answer.fault)}[/]"
    loss = _number(answer.loss)
    weights = short_hex(answer.digest) if answer.round else "-"
    console.print(f"[bold]{escape(answer.run)}[/]  {answer.spec_digest.hex()[:16]}  {state}", soft_wrap=True)
    console.print(
        f"round {answer.round}   loss {'-' if loss is None else f'{loss:.4f}'}   probes {answer.probes}"
        f"   weights {weights}   records {answer.head}"
    )
    if answer.warning:
        console.print(f"[bold red]warning:[/] {escape(answer.warning)}", soft_wrap=True)
    console.print(f"{escape(answer.waiting_for)}\n", soft_wrap=True)
    table = Table("slot", "name", "identity", "state", "probes", "last round", "loss", box=None)
    for peer in answer.peers:
        peer_loss = _number(peer.loss)
        table.add_row(
            str(peer.slot),
            # A name is a stranger's text: no markup from it.
            escape(peer.name),
            peer.key.hex()[:16],
            peer.state,
            str(peer.probes),
            str(peer.last_round) if peer.probes else "-",
            "-" if peer_loss is None else f"{peer_loss:.4f}",
        )
    console.print(table)
