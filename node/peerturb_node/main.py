"""Start to end of a node's process: settings in, exit code out. The assembly; every part is made elsewhere."""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import TextIO

import peerturb
from peerturb.errors import DataError, PeerturbError, RefusedError, RejectCode, SpecError
from peerturb.spec import RunSpec
from peerturb_node.client import Address, describe
from peerturb_node.compute.base import Compute
from peerturb_node.events import Events, JsonSink, PlainSink, Sink
from peerturb_node.folder import StateFolder, set_aside
from peerturb_node.idle.watch import watched
from peerturb_node.local import open_log, restore
from peerturb_node.session import Ended, Node
from peerturb_node.settings import NodeSettings
from peerturb_node.stopping import StopSignals

MakeCompute = Callable[[RunSpec], Compute]
"""How a program of one's own gives a node its compute; see `peerturb_node.compute.custom`."""


def run_node(
    settings: NodeSettings,
    *,
    is_json: bool = False,
    is_verbose: bool = False,
    stream: TextIO = sys.stdout,
    make_compute: MakeCompute | None = None,
) -> int:
    """Take part in the run until it ends or a signal comes; return the exit code.

    Args:
        settings: the node's.
        is_json: print events as JSON lines.
        is_verbose: print details too.
        stream: where to print.
        make_compute: gives the compute for the run's RunSpec, instead of the settings' model and data.

    Raises:
        PeerturbError: what keeps the node from taking part; it has been told as an event, too.
    """
    events = Events(_sink(is_json=is_json, least="debug" if is_verbose else "info", stream=stream))
    try:
        return asyncio.run(_monitored(settings, events, make_compute))
    except PeerturbError as error:
        events.emit("error", message=str(error), code=type(error).__name__)
        raise
    finally:
        events.close()


async def _monitored(settings: NodeSettings, events: Events, make_compute: MakeCompute | None) -> int:
    if not settings.http:
        return await _run(settings, events, make_compute)
    from peerturb_node.monitor import monitored  # brings aiohttp, which a node without it can do without

    async with monitored(settings.http, events):
        return await _run(settings, events, make_compute)


async def _run(settings: NodeSettings, events: Events, make_compute: MakeCompute | None) -> int:
    with StateFolder(settings.state) as folder:
        token = settings.join_token()
        address = Address.of(
            settings.coordinator,
            insecure=settings.insecure,
            fingerprint=settings.fingerprint,
            authority_file=settings.authority_file,
            token=token,
        )
        description = await describe(address, wait_s=settings.wait_s)
        spec = description.spec
        events.bind(run=spec.name)
        events.emit(
            "start",
            version=peerturb.__version__,
            name=settings.name,
            key=folder.identity.public.hex(),
            coordinator=settings.coordinator,
            run=spec.name,
            spec=spec.digest.hex(),
            rounds=spec.round.count,
            state=str(folder.path),
            compute="custom" if make_compute is not None else settings.compute,
            device=settings.device,
        )
        if description.needs_token and not token:
            raise RefusedError(
                RejectCode.BAD_TOKEN, f"the run at {settings.coordinator} needs a join token; give --token-file"
            )
        if make_compute is not None:
            compute = await asyncio.to_thread(make_compute, spec)
        else:
            compute = await asyncio.to_thread(_make_compute, settings, spec, events)
        if choice := getattr(compute, "choice", ""):  # of computes on tensors
            events.emit("notice", code="estimator", text=choice)
        if (slowness := getattr(compute, "slowness", None)) is not None:  # of computes on tensors
            events.emit("notice", code="slow", text=slowness)
        try:
            ended, signals = await _take_part(settings, address, spec, folder, compute, events)
            if settings.export is not None:
                with signals.held_off(f"the model is written to {settings.export}"):
                    await asyncio.to_thread(compute.export, settings.export.expanduser())
                events.emit("export", folder=str(settings.export))
        finally:
            compute.close()
    if ended.refusal is not None:
        raise RefusedError(ended.refusal, ended.why)
    return 0


async def _take_part(
    settings: NodeSettings, address: Address, spec: RunSpec, state: StateFolder, compute: Compute, events: Events
) -> tuple[Ended, StopSignals]:
    """Run until the end; return it with the signals in force.

    A local log that is not on the run's chain is set aside, once, and everything fetched anew.
    """
    folder = state.run_folder(spec)
    signals: StopSignals | None = None
    while True:
        log = await asyncio.to_thread(open_log, folder, spec, events)
        try:
            unapplied = await asyncio.to_thread(restore, folder, log, compute, events)
            node = Node(
                settings=settings,
                address=address,
                spec=spec,
                identity=state.identity,
                compute=compute,
                log=log,
                unapplied=unapplied,
                events=events,
            )
            is_second = signals is not None
            if signals is None:
                signals = StopSignals(node, events)
                signals.install()
            else:
                signals.hand_on(node)
            async with watched(node, settings, compute, events):
                ended = await node.run()
        finally:
            log.close()
        if ended.refusal is not RejectCode.LOG_DIVERGED or is_second or not log.ledger.position:
            return ended, signals
        kept = set_aside(log.path)
        compute.reset()
        checkpoint = folder / compute.checkpoint_name
        names = kept.name
        if checkpoint.exists():  # they may be the last copy of the trained weights
            names += f", the checkpoint as {set_aside(checkpoint).name}"
        events.emit(
            "notice",
            code="log_set_aside",
            text=f"{ended.why}; the local log is kept as {names}; everything is fetched again",
        )


def _make_compute(settings: NodeSettings, spec: RunSpec, events: Events) -> Compute:
    """Load what the settings ask for, and check its base weights against the RunSpec's."""
    started_s = time.perf_counter()
    if settings.compute == "stub":
        from peerturb_node.compute.stub import StubCompute

        return StubCompute(spec)
    if settings.compute == "toy":
        from peerturb_node.compute.toy import ToyCompute

        return ToyCompute(spec, estimator=settings.estimator)
    if settings.data is None:
        raise SpecError("no training data given: --data FILE (JSON Lines or text) says what this node learns from")
    for file in (settings.data, settings.eval):
        # Said before torch and the model are loaded, which takes seconds.
        if file is not None and not file.expanduser().is_file():
            raise DataError(f"there is no data file {file}")

    from peerturb_node.compute.torch_compute import TorchCompute

    compute = TorchCompute(spec, settings)
    events.emit(
        "model",
        parameters=sum(entry.elements for entry in compute.manifest),
        tensors=len(compute.manifest),
        dtype=spec.model.dtype,
        digest=compute.base_digest.hex(),
        seconds=round(time.perf_counter() - started_s, 3),
        quantised=None if compute.packing is None else compute.packing.text,
    )
    if compute.warning is not None:
        events.emit("notice", code="epsilon", text=compute.warning)
    return compute


def _sink(*, is_json: bool, least: str, stream: TextIO) -> Sink:
    if is_json:
        return JsonSink(stream, least=least)
    if stream.isatty():
        from rich.console import Console

        from peerturb_node.view import LiveSink

        return LiveSink(Console(file=stream), least=least)
    return PlainSink(stream, least=least)
