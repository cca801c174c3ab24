"""How long page and metrics hold the coordinator's event loop: the most that they can add to the sealing of a round.

A run of simulated peers is folded by a coordinator's parts, then what a second of watching asks for is timed again and
again: the changes that all watchers are told, everything that a new watcher is told, and a scrape. value: 99th
percentile in ms; reference: 5 ms; ratio: value / reference, below 1 wanted for 64 peers.
"""

import asyncio
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from prometheus_client import generate_latest

from peerturb.protocol.records import RunStarted
from peerturb.spec import RoundSpec, RunSpec
from peerturb.wire.metrics import new_registry
from peerturb.wire.records import RecordDecoder
from peerturb_bench.rows import Row
from peerturb_coordinator.events import Events
from peerturb_coordinator.live.broadcast import event_of
from peerturb_coordinator.live.history import History
from peerturb_coordinator.live.view import View
from peerturb_coordinator.metrics import Metrics
from peerturb_coordinator.recovery import recover
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.store import Entry, MemoryLogStore
from peerturb_coordinator.trace import Trace
from peerturb_coordinator.watching import Watchers
from peerturb_node.logsource import Source
from peerturb_sim.scenario import GroupSpec, Scenario
from peerturb_sim.simulation import LOG_NAME, simulate

LIMIT_MS = 5.0
PEERS = (64, 1_000)
ROUNDS = 1_000
"""More than the page's curve has points."""


def run(quick: bool = False) -> list[Row]:
    """Measure a small and a large run."""
    rounds, repeats = (50, 30) if quick else (ROUNDS, 300)
    rows: list[Row] = []
    for peers in PEERS[:1] if quick else PEERS:
        with tempfile.TemporaryDirectory() as name:
            spec, payloads = _log(Path(name), peers, rounds if peers < 100 else rounds // 4)
            rows += asyncio.run(_measured(spec, payloads, peers, repeats))
    return rows


def _log(folder: Path, peers: int, rounds: int) -> tuple[RunSpec, list[bytes]]:
    scenario = Scenario(
        name="watched", eval_every=10, round=RoundSpec(count=rounds + 1, probes_max=2, deadline_ms_max=4_000),
        peers=(GroupSpec(name="p", count=peers, evaluates=peers < 100),),
    )  # fmt: skip
    simulate(scenario, folder=folder, out=folder)
    payloads = list(Source(file=folder / LOG_NAME).payloads())
    started = RecordDecoder().decode(payloads[0])
    assert isinstance(started, RunStarted)
    return started.spec, payloads


async def _measured(spec: RunSpec, payloads: list[bytes], peers: int, repeats: int) -> list[Row]:
    store, events, history = MemoryLogStore(), Events(io.StringIO(), as_json=True), History()
    store.append([Entry(kind="", round=None, payload=payload) for payload in payloads])
    machine = recover(spec, store, hear=history.hear)
    trace = Trace(None, spec, events, records=store.head)
    runner = Runner(
        machine, store, events, trace=trace, watchers=Watchers(events), retry_s=1.0, now_s=time.monotonic
    )  # fmt: skip
    registry = new_registry()
    Metrics(registry, runner, history, Path())
    view = View(runner, history, join="", needs_token=False)

    def changes() -> None:
        view.forget()  # so that every peer has changed, as after a round with all of them
        event_of("changes", view.changes())

    parts: dict[str, Callable[[], object]] = {
        "changes for the page": changes,
        "everything for a new watcher": lambda: event_of("everything", view.everything()),
        "a scrape": lambda: generate_latest(registry),
    }
    found = {name: _p99_ms(work, repeats) for name, work in parts.items()}
    found["all three in a row"] = sum(found.values())
    return [
        Row(name=f"{peers:,} peers: {name}", value=value, unit="ms", reference=LIMIT_MS, ratio=value / LIMIT_MS)
        for name, value in found.items()
    ]


def _p99_ms(work: Callable[[], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        took.append(1e3 * (time.perf_counter() - began_s))
    return round(float(np.percentile(took, 99)), 4)
