"""From a scenario to its result: builds the world, lets it run to its end, gathers the rows. Knows no terminal."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peerturb.spec import RunSpec
from peerturb_sim.checks import BrokenInvariantError
from peerturb_sim.compute import Compute
from peerturb_sim.fidelity import compute_of
from peerturb_sim.life import populate
from peerturb_sim.liveness import Liveness
from peerturb_sim.peer import Peer
from peerturb_sim.result import BrokenRow, LogRow, PeerRow, Result
from peerturb_sim.scenario import Scenario
from peerturb_sim.world import Chaos, World

LOG_NAME = "run.log"
RESULT_NAME = "result.json"

CROWD = 200
"""Peers from which joins and leaves wait for the next round's records."""
FAREWELL_S = 10.0
"""Time after the end of the run in which those who take part hear of it. Who still knocks goes home."""
FAREWELL_STEP_S = 0.05
STEP_S = 1.0
"""Virtual time between two looks at the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a world has come."""

    virtual_s: float
    rounds: int
    loss: float
    running: int


def build(scenario: Scenario, *, folder: Path, out: Path, chaos: Chaos | None = None) -> World:
    """Make a scenario's world; nothing has happened in it.

    Args:
        scenario: what shall happen.
        folder: where its traces lie.
        out: an existing folder for the log.
        chaos: faults per event, beside the scenario's.

    Raises:
        PeerturbError: a trace, a model, data or a cluster cannot be used.
    """
    spec, compute = compute_of(scenario, folder=folder)
    return populated(scenario, spec, compute, folder=folder, out=out, chaos=chaos)


def populated(
    scenario: Scenario, spec: RunSpec, compute: Compute, *, folder: Path, out: Path, chaos: Chaos | None = None
) -> World:
    """Make a scenario's world with a compute that is there already; see `build`."""
    world = World(
        spec,
        compute,
        out / LOG_NAME,
        seed=scenario.seed,
        coordinator=scenario.coordinator,
        chaos=chaos,
        holds_membership=scenario.total_peers >= CROWD,
    )
    populate(world, scenario, folder=folder)
    return world


def simulate(
    scenario: Scenario, *, folder: Path, out: Path, progress: Callable[[Progress], None] = lambda _: None
) -> Result:
    """Let a scenario happen; write its log into `out` and return its result, also where Ctrl-C cuts it short.

    Raises:
        PeerturbError: a trace, a model, data or a cluster cannot be used.
    """
    world = build(scenario, folder=folder, out=out)
    broken: list[BrokenRow] = []
    is_interrupted = False
    with _quiet_collector():
        try:
            run_to_end(world, until_s=scenario.until_s, progress=progress)
        except BrokenInvariantError as error:
            broken.append(BrokenRow(at_s=world.events.elapsed_s, name=error.name, text=error.text))
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            world.compute.close()
    return gather(world, scenario, broken, is_interrupted=is_interrupted)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from walking over thousands of peers again and again; events leave no cycles."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def run_to_end(world: World, *, until_s: float, progress: Callable[[Progress], None] = lambda _: None) -> None:
    """Let events happen until the run is over and its peers have heard so, or the time is.

    Raises:
        BrokenInvariantError: what a checker saw.
    """
    liveness = Liveness(world)
    while not world.is_finished and world.events.elapsed_s < until_s:
        world.run(until_s=min(until_s, world.events.elapsed_s + STEP_S), done=lambda: world.is_finished)
        liveness.look()
        ledger = world.log.ledger
        progress(
            Progress(
                virtual_s=world.events.elapsed_s,
                rounds=ledger.sealed_rounds,
                loss=ledger.loss,
                running=world.running,
            )
        )
    until_s = min(until_s, world.events.elapsed_s + FAREWELL_S)
    taking_part = {line.peer.index: line.peer for line in world.coordinator.lines.values() if line.is_welcome}
    if world.is_finished:
        world.is_calm = True
        for peer in world.peers:
            if peer.index not in taking_part:
                peer.leave()
    while (
        world.is_finished and world.events.elapsed_s < until_s and any(peer.is_running for peer in taking_part.values())
    ):
        world.run(until_s=min(until_s, world.events.elapsed_s + FAREWELL_STEP_S))
    world.checks.ended(world.coordinator.disk.path)


def gather(world: World, scenario: Scenario, broken: list[BrokenRow], *, is_interrupted: bool = False) -> Result:
    """Put a world's rows together."""
    log, coordinator = world.log, world.coordinator
    world.recorder.ended()
    return Result(
        name=scenario.name,
        seed=world.seed,
        compute=scenario.compute.kind,
        scenario=scenario.model_dump(mode="json"),
        spec_digest=world.spec.digest.hex(),
        is_finished=world.is_finished,
        is_interrupted=is_interrupted,
        waiting_for="" if world.is_finished else world.waiting_for,
        virtual_s=world.events.elapsed_s,
        log=LogRow(
            file=LOG_NAME,
            records=len(log.payloads),
            bytes=coordinator.disk.path.stat().st_size,
            chain=log.chains[-1].hex(),
        ),
        rounds=world.recorder.rounds,
        evaluations=world.recorder.evaluations,
        faults=world.recorder.faults,
        peers=[_row(world, peer) for peer in world.peers],
        broken=broken,
        seals={reason.value: count for reason, count in coordinator.seals.items() if count},
        rejects={code.name.lower(): count for code, count in sorted(coordinator.refusals.items())},
        bytes_up=world.up_bytes,
        bytes_down=world.down_bytes,
    )


def _row(world: World, peer: Peer) -> PeerRow:
    members = [world.log.ledger.members[slot] for slot in peer.tally.slots]
    stop = peer.stop
    return PeerRow(
        peer=peer.index,
        name=peer.name,
        group=peer.group.name,
        slots=list(peer.tally.slots),
        lie=peer.group.lie or "",
        estimator=peer.group.estimator,
        probes_per_s=round(peer.probes_per_s, 3),
        present_s=peer.present_us() / 1e6,
        sessions=peer.tally.sessions,
        measured=peer.tally.measured,
        contributions=sum(member.contributions for member in members),
        codes=sum(member.probes for member in members),
        refused=peer.tally.refused,
        crashes=peer.tally.crashes,
        rebuilds=peer.tally.rebuilds,
        bytes_up=peer.traffic.up_bytes,
        bytes_down=peer.traffic.down_bytes,
        stopped="" if stop is None or stop.code is None else f"{stop.code.name.lower()}: {stop.why}",
    )
