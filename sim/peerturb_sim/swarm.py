"""Swarm testing: every seed draws a small network and its own mix of faults; the checkers look on.

First anything may fail. Then all faults end, and what is left must train on within a bounded time: every honest peer
must reach the end of the run with the weights that the log gives.
"""

import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from peerturb.errors import RejectCode
from peerturb.spec import RoundSpec, StepSpec
from peerturb_sim.checks import BrokenInvariantError
from peerturb_sim.compute import Compute
from peerturb_sim.events import stream
from peerturb_sim.fidelity import compute_of
from peerturb_sim.liveness import GOES_ON_S
from peerturb_sim.peer import Peer
from peerturb_sim.scenario import FaultSpec, GroupSpec, Lie, LifeSpec, LineSpec, Scenario, ToySpec
from peerturb_sim.simulation import build
from peerturb_sim.world import Chaos, World

SAFETY_S = 60.0
"""Virtual time in which anything may fail."""
ROUNDS = 60
NOTICED_ROUNDS = 3
"""Rounds with the others in which a peer must notice that its memory was faulty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A seed that broke something."""

    seed: int
    name: str
    text: str
    at_s: float

    @property
    def command(self) -> str:
        """What repeats it."""
        return f"peerturb sim swarm --first {self.seed} --seeds 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One seed's world."""

    seed: int
    mix: str
    """What was drawn, in words."""
    rounds: int
    crashes: int
    unnoticed: tuple[str, ...]
    """Peers that ended with a flipped bit which nobody could tell them of: no digest follows the last round."""
    outvoted: int
    """Rounds that faulty memory or liars decided because no majority had the right weights."""
    broken: Broken | None


def draw(seed: int) -> tuple[Scenario, Chaos]:
    """Return the network and the faults of a seed."""
    draws = stream(seed, "swarm")
    groups = [_group(draws, "honest", draws.randint(1, 6))]
    groups += [
        _group(draws, f"{lie}-liar", 1, lie=lie)
        for lie in draws.sample(get_args(Lie), draws.choice((0, 0, 1, 2)))
        if groups[0].count > 2  # liars in the majority decide which weights are right: no bug
    ]
    faults = tuple(_fault(draws, groups[0].count) for _ in range(draws.choice((0, 1, 3, 6))))
    scenario = Scenario(
        name=f"swarm {seed}",
        seed=seed,
        round=RoundSpec(
            count=ROUNDS,
            probes_max=draws.choice((1, 4, 16)),
            budget_ms=draws.choice((0, 20, 200)),
            min_peers=draws.randint(1, max(1, groups[0].count - 1)),
            deadline_ms_min=draws.choice((50, 500)),
            deadline_ms_max=draws.choice((1_000, 5_000)),
            lease_ms=draws.choice((500, 3_000, 30_000)),
        ),
        step=StepSpec(learning_rate=0.1),
        compute=ToySpec(objective=draws.choice(("quadratic", "logistic"))),
        eval_every=draws.choice((0, 1, 7)),
        peers=tuple(groups),
        faults=faults,
    )
    return scenario, Chaos(cut=draws.choice((0, 0, 2, 20)), store=draws.choice((0, 0, 20)))


def _group(draws: random.Random, name: str, count: int, *, lie: Lie | None = None) -> GroupSpec:
    often = (0.0, 0.0, 60.0, 600.0)
    line = LineSpec(
        latency_ms=draws.choice((0.5, 20, 200)),
        jitter_ms=draws.choice((0, 5, 50)),
        up_mbit=draws.choice((0.1, 10)),
        loss=draws.choice((0, 0.01, 0.1)),
        duplication=draws.choice((0, 0.1)),
        reordering=draws.choice((0, 0.1)),
        cuts_per_hour=draws.choice(often),
    )
    life = LifeSpec(arrive_s=(0.0, draws.choice((0.0, 30.0))))
    if draws.random() < 0.3:
        life = LifeSpec(arrive_s=(0.0, 5.0), stay_s=15.0, away_s=5.0)
    return GroupSpec(
        name=name,
        count=count,
        line=line,
        probes_per_s=(draws.choice((20, 200)), 400),
        apply_ms=draws.choice((1, 30)),
        evaluates=draws.random() < 0.5,
        life=life,
        lie=lie,
        crashes_per_hour=draws.choice(often),
        down_s=draws.choice((0.2, 5)),
        disk_losses=draws.choice((0, 0.3)),
        pauses_per_hour=draws.choice(often),
        pause_s=draws.choice((0.5, 8)),
        drift_ppm=draws.choice((0, 100, 50_000)),
    )


def _fault(draws: random.Random, honest: int) -> FaultSpec:
    kind = draws.choice(
        ("coordinator_crash", "coordinator_crash", "partition", "store_refuses", "corruption", "peer_crash")
    )
    if kind == "corruption":  # of a minority: weights that most peers have are the canonical ones
        kind = kind if honest > 2 else "peer_crash"
        return FaultSpec(kind=kind, at_s=draws.uniform(0, SAFETY_S), group="honest", share=0.01)
    return FaultSpec(
        kind=kind,
        at_s=draws.uniform(0, SAFETY_S),
        for_s=draws.choice((0.1, 3, 15, 55)),  # the last: streams die of silence
        torn=draws.random() < 0.7,
        share=draws.choice((0.1, 0.5, 1.0)),
    )


def run_seed(seed: int, out: Path) -> Outcome:
    """Let one seed's world happen in an empty folder."""
    scenario, chaos = draw(seed)
    world = build(scenario, folder=out, out=out, chaos=chaos)
    broken = None
    try:
        world.run(until_s=SAFETY_S)
        heal(world)
        must_end(world, compute_of(scenario, folder=out)[1])
    except BrokenInvariantError as error:
        broken = Broken(seed=seed, name=error.name, text=error.text, at_s=world.events.elapsed_s)
    except Exception:
        # A machine's assertion or a refusal to decode is what is looked for: it must name its seed, like all others.
        text = traceback.format_exc(limit=-4).strip()
        broken = Broken(seed=seed, name="exception", text=text, at_s=world.events.elapsed_s)
    return Outcome(
        seed=seed,
        mix=_in_words(scenario, chaos),
        rounds=world.log.ledger.sealed_rounds,
        crashes=world.coordinator.crashes + sum(peer.tally.crashes for peer in world.peers),
        unnoticed=tuple(world.recorder.ended()),
        outvoted=world.checks.outvoted,
        broken=broken,
    )


def heal(world: World) -> None:
    """End all faults: everybody is up, nothing breaks any more, liars have gone home."""
    world.chaos = Chaos()
    world.is_calm = True
    world.coordinator.disk.refuses = False
    world.coordinator.disk.tear_at = None
    world.coordinator.start()
    for peer in world.peers:
        peer.host.blocked_until_us = peer.resumes_us = 0
        if peer.liar is not None:
            peer.crash()
        else:
            peer.start()


def must_end(world: World, compute: Compute) -> None:
    """Require that the run ends, and that honest peers end it with the weights of the log.

    Where wrong weights were not in a minority, sound peers may have given up, and who has them may keep them: the
    protocol promises nothing else. Those who stay sound must end right all the same.

    Args:
        world: after `heal`.
        compute: one that no peer has used, to replay the log.

    Raises:
        BrokenInvariantError: they do not.
    """
    honest = [peer for peer in world.peers if peer.liar is None]
    healed_at = world.log.ledger.sealed_rounds
    measured = {peer.index: peer.tally.measured for peer in honest}
    until_s = world.events.elapsed_s + GOES_ON_S
    if not world.run(until_s=until_s, done=lambda: world.is_finished and not any(p.is_running for p in honest)):
        if world.checks.outvoted and any(_gave_up(peer) for peer in honest):
            return
        raise BrokenInvariantError("goes_on", _stalled(world, honest))
    world.checks.ended(world.coordinator.disk.path)
    weights = compute.base
    for sealed in world.log.sealed:
        weights = compute.apply(weights, sealed)
    for peer in honest:
        assert peer.stop is not None
        if world.checks.outvoted and _gave_up(peer):
            continue
        if peer.stop.code is not None:
            raise BrokenInvariantError("goes_on", f"{peer.name} has stopped: {peer.stop.why}")
        was_with_others = weights.rounds - healed_at >= NOTICED_ROUNDS and peer.tally.measured > measured[peer.index]
        if peer.is_corrupt and (world.checks.outvoted or not was_with_others):
            continue  # nothing to compare with: the log states no digest after its last round, or a wrong one
        if (peer.rounds, peer.weights.digest) != (weights.rounds, weights.digest):
            text = f"{peer.name} ended with {peer.rounds} rounds and other weights than a replay of {weights.rounds}"
            raise BrokenInvariantError("replicas_agree", text)


def _gave_up(peer: Peer) -> bool:
    """Whether it stopped because others sealed on other weights."""
    return peer.stop is not None and peer.stop.code is RejectCode.DIGEST_MISMATCH


def _stalled(world: World, honest: list[Peer]) -> str:
    ledger = world.log.ledger
    waiting = ", ".join(peer.name for peer in honest if peer.is_running)
    return (
        f"{GOES_ON_S:.0f} s after the faults {ledger.sealed_rounds} of {world.spec.round.count} rounds are sealed; "
        f"the coordinator: {world.waiting_for}; still running: {waiting or 'nobody'}"
    )


def run_swarm(
    *, first: int, seeds: int, seconds: float | None, show: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Run seeds first, first + 1, ... until all are done or the (real) time is over; the first one in any case."""
    outcomes: list[Outcome] = []
    began_s = time.monotonic()
    for seed in range(first, first + seeds):
        if outcomes and seconds is not None and time.monotonic() - began_s > seconds:
            break
        with TemporaryDirectory(prefix="peerturb-swarm-") as folder:
            outcomes.append(run_seed(seed, Path(folder)))
        show(outcomes[-1])
    return outcomes


def _in_words(scenario: Scenario, chaos: Chaos) -> str:
    peers = ", ".join(f"{group.count} {group.name}" for group in scenario.peers)
    kinds = [fault.kind for fault in scenario.faults]
    faults = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{peers}; {faults or 'no set faults'}; {chaos.cut} cuts and {chaos.store} refusals per thousand"
