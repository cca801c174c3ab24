"""The coordinator as a process: signals, progress, the port file, an orderly end.

It knows the operating system; the run lives in `peerturb_coordinator.server`.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from peerturb.errors import SpecError
from peerturb.spec import RunSpec
from peerturb.wire.channel import split_address
from peerturb_coordinator.events import Events
from peerturb_coordinator.server import Server
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_coordinator.store import SqliteLogStore

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
    events = Events(sys.stdout, as_json=as_json, level=settings.log_level)
    asyncio.run(_serve(spec, settings, events, port_file))


async def _serve(spec: RunSpec, settings: CoordinatorSettings, events: Events, port_file: Path | None) -> None:
    server = Server(spec, settings, SqliteLogStore(settings.data_dir), events)
    stop = asyncio.Event()
    try:
        await server.start()
        _listen_for_signals(stop, events)
        if port_file is not None:
            _write_port(port_file, split_address(server.address)[1])
        progress = asyncio.create_task(_report(server, events, settings.progress_every_ms / 1000))
        await stop.wait()
        progress.cancel()
    finally:
        await server.stop()
    events.info("stopped", records=server.store.head, round=server.runner.status().round)


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


async def _report(server: Server, events: Events, every_s: float) -> None:
    """Say every few seconds how the run goes, if anything changed."""
    loop = asyncio.get_running_loop()
    last: dict[str, Any] = {}
    last_round, last_s = server.runner.status().round, loop.time()
    while True:
        await asyncio.sleep(every_s)
        status, now_s = server.runner.status(), loop.time()
        fields: dict[str, Any] = {
            "round": status.round,
            "loss": None if status.loss != status.loss else round(status.loss, 6),
            "connected": status.connected,
            "probes": status.probes,
            "waiting_for": server.runner.fault or ("" if status.round > last_round else status.waiting_for),
        }
        if fields != last:
            pace = (status.round - last_round) / (now_s - last_s)
            events.info("progress", **fields, rounds_per_s=round(pace, 2))
        last, last_round, last_s = fields, status.round, now_s
