"""The coordinator as a process: signals, progress, the port file, an orderly end.

It knows the operating system; the run lives in `peerturb_coordinator.server`.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from peerturb.errors import SpecError
from peerturb.spec import RunSpec
from peerturb.wire.channel import split_address
from peerturb_coordinator.events import Events
from peerturb_coordinator.progress import live_line, report
from peerturb_coordinator.server import Server
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_coordinator.store import SqliteLogStore

if TYPE_CHECKING:
    from rich.live import Live

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve_until_signal(
    spec: RunSpec, settings: CoordinatorSettings, *, as_json: bool, port_file: Path | None = None
) -> None:
    """Serve the run until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        as_json: events as JSON lines on standard output, otherwise lines for people.
        port_file: receives the bound port, in one atomic step, once peers can come.

    Raises:
        LogError, SpecError, UnreachableError: the run cannot be served; the message says why.
    """
    with live_line(is_wanted=not as_json) as live:
        events = Events(sys.stdout, as_json=as_json, level=settings.log_level, run=spec.name)
        asyncio.run(_serve(spec, settings, events, live, as_json=as_json, port_file=port_file))


async def _serve(
    spec: RunSpec,
    settings: CoordinatorSettings,
    events: Events,
    live: "Live | None",
    *,
    as_json: bool,
    port_file: Path | None,
) -> None:
    server = Server(spec, settings, SqliteLogStore(settings.data_dir), events)
    stop = asyncio.Event()
    try:
        await server.start()
        if as_json:
            events.info("serving", **server.introduction)
        else:
            _introduce(server)
        _listen_for_signals(stop, events)
        if port_file is not None:
            _write_port(port_file, split_address(server.address)[1])
        progress = asyncio.create_task(report(server.runner, events, live, every_s=settings.progress_every_ms / 1000))
        await stop.wait()
        progress.cancel()
    finally:
        await server.stop()
    events.info("stopped", records=server.store.head, round=server.runner.status().round)


def _introduce(server: Server) -> None:
    """Print what a person must know; the join command, with the token, stands on a line of its own, to be copied."""
    known = server.introduction
    begun = f"goes on at round {known['round']}" if known["round"] else "begins"
    print(
        f"Run {known['run']} {begun} on {known['address']} ({'TLS' if known['tls'] else 'plaintext'}).\n"
        f"RunSpec digest {known['run_digest']}\n"
        f"Peers join with\n\n  {server.join_command}\n\n"
        + (f"Live page http://{known['http']}/\n" if known["http"] else "")
        + "Ctrl-C stops in order; the run can go on later.\n",
        flush=True,
    )


def _listen_for_signals(stop: asyncio.Event, events: Events) -> None:
    """First signal: stop in order. Second: at once, with the exit code shells expect."""

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        events.info("stopping", signal=number.name, text="a second signal stops at once")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)


def _write_port(path: Path, port: int) -> None:
    """Write the port so that a reader never sees half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(f"{port}\n", encoding="ascii")
        draft.replace(path)
    except OSError as error:
        raise SpecError(f"cannot write the port file {path}: {error.strerror or error}") from error
