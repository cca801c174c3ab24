"""Small worlds for tests: a few peers on quick lines, and what their log says."""

from pathlib import Path

from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec
from peerturb_sim.peer import Peer
from peerturb_sim.scenario import GroupSpec, LineSpec, ToySpec
from peerturb_sim.toy import ToyCompute, base_digest
from peerturb_sim.world import Chaos, World

ROUNDS = 30
LINE = LineSpec(latency_ms=0.5, jitter_ms=2, loss=0)
GROUP = GroupSpec(
    name="peer", count=1, line=LINE, probes_per_s=(200, 1_000), apply_ms=1, evaluate_ms=15, evaluates=True
)


def make_spec(
    *, seed: int = 0, rounds: int = ROUNDS, min_peers: int = 1, budget_ms: int = 0, lease_ms: int = 3_000
) -> RunSpec:
    return RunSpec(
        name="world",
        model=ModelSpec(name="toy", digest=base_digest(seed).hex()),
        round=RoundSpec(
            count=rounds,
            probes_max=8,
            budget_ms=budget_ms,
            min_peers=min_peers,
            deadline_ms_min=50,
            deadline_ms_max=2_000,
            lease_ms=lease_ms,
        ),
        objective=ObjectiveSpec(eval_every=7),
    )


def small_world(
    folder: Path,
    *,
    seed: int,
    peers: int,
    spec: RunSpec | None = None,
    chaos: Chaos | None = None,
    group: GroupSpec = GROUP,
) -> World:
    """A world in which nobody runs yet."""
    spec = spec or make_spec(seed=seed)
    world = World(spec, ToyCompute(ToySpec(), spec, seed=seed), folder / "run.log", seed=seed, chaos=chaos)
    for _ in range(peers):
        world.add(group)
    return world


def records_of(world: World) -> list[Record]:
    """What stands in the log file."""
    return list(read_records(world.coordinator.disk.path))


def sealed_rounds(world: World) -> list[RoundSealed]:
    return [record for record in records_of(world) if isinstance(record, RoundSealed)]


def all_stopped(world: World) -> bool:
    return all(peer.stop is not None for peer in world.peers)


def check_honest_end(world: World, *, honest: list[Peer] | None = None) -> None:
    """The log is legal and whole, and these peers (or all) have the weights that base and log give."""
    world.checks.ended(world.coordinator.disk.path)
    ledger = Ledger.fold(records_of(world))
    assert ledger.is_finished
    assert ledger.sealed_rounds == world.spec.round.count
    compute = ToyCompute(ToySpec(), world.spec, seed=world.seed)
    weights = compute.base
    for record in sealed_rounds(world):
        weights = compute.apply(weights, record)
    for peer in world.peers if honest is None else honest:
        assert peer.stop is not None
        assert peer.stop.code is None, peer.stop
        assert (peer.rounds, peer.weights.digest) == (weights.rounds, weights.digest)
