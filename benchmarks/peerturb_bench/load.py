"""What 64 peers at a round a second ask of a coordinator: memory of its process, and its share of a core.

The coordinator is a process of its own, with page and metrics; one watcher follows the page, a scrape comes every five
seconds. The peers are the product's nodes, all in this process, with a stub for a compute that takes a second. value:
MB resident, and percent of a core, over a minute; reference: 100 MB and 5 %; ratio: value / reference, at most 1. In
a third row the rounds a second that there were.
"""

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil

from peerturb.ids import Slot
from peerturb.protocol.outputs import Measure
from peerturb.spec import RunSpec
from peerturb_bench.cluster import Cluster, cluster, stub_for
from peerturb_bench.rows import Row
from peerturb_node.client import Address, describe
from peerturb_node.compute.base import Measured
from peerturb_node.compute.stub import StubCompute
from peerturb_node.events import Events, JsonSink
from peerturb_node.folder import StateFolder
from peerturb_node.local import open_log, restore
from peerturb_node.session import Node
from peerturb_node.settings import NodeSettings

PEERS, PROBES = 64, 32
MEASURED_S, QUICK_S = 60.0, 5.0
MEASURE_S = 0.95
"""What a peer takes for its probes: with all the rest about a second."""
SCRAPE_S = 5.0
LIMIT_MB, LIMIT_PERCENT = 100.0, 5.0


def run(quick: bool = False) -> list[Row]:
    """Measure and return rows `memory`, `processor` and `rounds`."""
    return asyncio.run(_run(PEERS, QUICK_S if quick else MEASURED_S))


async def _run(peers: int, seconds: float) -> list[Row]:
    with TemporaryDirectory(prefix="peerturb-load-") as name:
        async with (
            cluster(probes=PROBES, has_page=True) as run_,
            _nodes(run_, Path(name), peers),
            stub_for(run_.address) as stub,
            _watched(run_),
        ):
            begin = (await run_.until(stub, round_=3, peers=peers)).round
            process = psutil.Process(run_.coordinator.pid)
            before_s, began_s = _cpu_s(process), time.monotonic()
            await asyncio.sleep(seconds)
            spent_s, took_s = _cpu_s(process) - before_s, time.monotonic() - began_s
            resident_mb = process.memory_info().rss / 1e6
            rounds = (await run_.until(stub, round_=begin, peers=peers)).round - begin
    per_s, percent = rounds / took_s, 100 * spent_s / took_s
    return [
        _row(f"{peers} peers: memory", resident_mb, "MB", LIMIT_MB),
        _row(f"{peers} peers: processor, at one round a second", percent / per_s, "% of a core", LIMIT_PERCENT),
        Row(name=f"{peers} peers: rounds", value=round(per_s, 3), unit="1/s"),
    ]


def _row(name: str, value: float, unit: str, limit: float) -> Row:
    return Row(name=name, value=round(value, 2), unit=unit, reference=limit, ratio=round(value / limit, 3))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class _Slow(StubCompute):
    """A stub that takes as long as real probes; the event loop does not wait for it."""

    is_blocking = True

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        """Wait, then return codes."""
        time.sleep(MEASURE_S)
        return super().measure(work, slot, is_cancelled)


@contextlib.asynccontextmanager
async def _nodes(run_: Cluster, folder: Path, count: int) -> AsyncIterator[None]:
    """Let so many nodes take part for as long as the block runs."""
    address = Address.of(run_.address, insecure=True, fingerprint="", authority_file=None, token="")
    spec = (await describe(address, wait_s=30.0)).spec
    nodes: list[Node] = []
    async with asyncio.TaskGroup() as group:  # one that fails ends all
        for number in range(count):
            settings = NodeSettings(
                coordinator=run_.address, state=folder / f"{number}", name=f"node-{number}", compute="stub"
            )
            group.create_task(_take_part(nodes, settings, address, spec))
        yield
        for node in nodes:
            node.leave("the benchmark is over")


async def _take_part(nodes: list[Node], settings: NodeSettings, address: Address, spec: RunSpec) -> None:
    events, compute = Events(JsonSink(io.StringIO())), _Slow(spec)
    with StateFolder(settings.state) as state:
        own = state.run_folder(spec)
        log = open_log(own, spec, events)
        try:
            unapplied = restore(own, log, compute, events)
            node = Node(
                settings=settings, address=address, spec=spec, identity=state.identity, compute=compute, log=log,
                unapplied=unapplied, events=events,
            )  # fmt: skip
            nodes.append(node)
            await node.run()
        finally:
            log.close()


@contextlib.asynccontextmanager
async def _watched(run_: Cluster) -> AsyncIterator[None]:
    """Follow the page and scrape the metrics for as long as the block runs."""
    async with aiohttp.ClientSession() as client:

        async def follow() -> None:
            async with client.get(f"{run_.page}/events", timeout=aiohttp.ClientTimeout(total=None)) as answer:
                async for _ in answer.content.iter_any():
                    pass

        async def scrape() -> None:
            while True:
                async with client.get(f"{run_.page}/metrics") as answer:
                    await answer.read()
                await asyncio.sleep(SCRAPE_S)

        tasks = [asyncio.create_task(follow()), asyncio.create_task(scrape())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
