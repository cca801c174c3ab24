"""Whole runs with faults from a seed: safety while anything may fail, then everything heals and the run must end."""

import random
from functools import partial
from pathlib import Path

import pytest

from peerturb.errors import RejectCode
from peerturb.protocol.records import PeerLeft
from peerturb_sim.coordinator import Coordinator
from peerturb_sim.liars import Liar
from peerturb_sim.peer import Peer
from peerturb_sim.world import Chaos, World
from tests.simulation.small import (
    ROUNDS,
    all_stopped,
    check_honest_end,
    make_spec,
    records_of,
    sealed_rounds,
    small_world,
)

LONG_S = 10_000


def tell_false_digests(peer: Peer) -> None:
    peer.lie(Liar("digest", random.Random(0)))


@pytest.mark.parametrize("seed", range(8))
def test_a_calm_run_ends_with_every_peer_in_most_rounds(tmp_path: Path, seed: int) -> None:
    world = small_world(tmp_path, seed=seed, peers=4)
    for peer in world.peers:
        peer.start()
    assert world.run(until_s=LONG_S, done=lambda: all_stopped(world))
    check_honest_end(world)
    sealed = sealed_rounds(world)
    full = sum(len(record.slots) == len(world.peers) for record in sealed)
    assert full >= ROUNDS - 4, [record.slots for record in sealed]


def cuts_of(seed: int) -> int:
    """Cuts per thousand messages: seldom or often."""
    return (2, 10, 40)[seed % 3]


@pytest.mark.parametrize("seed", range(24))
def test_faults_never_break_the_run(tmp_path: Path, seed: int) -> None:
    """Crashes of peers and coordinator, cut lines, a store that refuses: then all heals and the run must end."""
    spec = make_spec(seed=seed, rounds=250, min_peers=1 + seed % 2, budget_ms=10 * (seed % 3))
    world = small_world(tmp_path, spec=spec, seed=seed, peers=4, chaos=Chaos(cut=cuts_of(seed), store=20))
    for peer in world.peers[:3]:
        peer.start()
    world.events.after(1_500_000, world.peers[3].start)
    plan_crashes(world, random.Random(seed))
    world.run(until_s=15)
    world.chaos = Chaos()
    for peer in world.peers:
        peer.start()
    world.coordinator.start()
    assert world.run(until_s=615, done=lambda: all_stopped(world)), world.coordinator.notices
    check_honest_end(world)
    assert RejectCode.LOG_DIVERGED not in world.coordinator.refusals
    assert RejectCode.SUPERSEDED not in [peer.stop.code for peer in world.peers if peer.stop]


def plan_crashes(world: World, draws: random.Random) -> None:
    """Twenty crashes in eight seconds, each mended within four; half of the coordinator's tear a write."""
    victims: list[Peer | Coordinator] = [*world.peers[:3], world.coordinator]
    for number in range(20):
        victim = draws.choice(victims)
        at_us = draws.randrange(8_000_000)
        if isinstance(victim, Coordinator) and number % 2:
            world.events.after(at_us, partial(victim.crash, tear_at=draws.random()))
        else:
            world.events.after(at_us, victim.crash)
        world.events.after(at_us + draws.randrange(4_000_000), victim.start)


@pytest.mark.parametrize("seed", range(10))
def test_a_peer_whose_weights_flip_rebuilds_and_goes_on(tmp_path: Path, seed: int) -> None:
    world = small_world(tmp_path, seed=seed, peers=4)
    for peer in world.peers:
        peer.start()
    world.run(until_s=LONG_S, done=lambda: world.peers[2].rounds == 10)
    world.peers[2].corrupt()
    assert world.run(until_s=LONG_S, done=lambda: all_stopped(world))
    check_honest_end(world)
    assert [peer.tally.rebuilds for peer in world.peers] == [0, 0, 1, 0]


@pytest.mark.parametrize("seed", range(10))
def test_a_liar_among_two_never_decides_which_weights_are_right(tmp_path: Path, seed: int) -> None:
    """One peer, mostly slot 0, names false weights from the start; the honest one goes on and its codes count."""
    world = small_world(tmp_path, seed=seed, peers=2)
    world.peers[0].start()
    tell_false_digests(world.peers[0])
    world.events.after(5_000, world.peers[1].start)
    assert world.run(until_s=LONG_S, done=lambda: all_stopped(world))
    check_honest_end(world, honest=world.peers[1:])
    # A deadline the honest peer misses leaves the liar alone in a round, seldom.
    machine = world.peers[1].machine
    assert machine is not None
    assert sum(record.slots == (machine.slot,) for record in sealed_rounds(world)) >= ROUNDS - 3


@pytest.mark.parametrize("seed", range(10))
def test_what_a_lone_liar_sealed_does_not_stop_those_who_join_later(tmp_path: Path, seed: int) -> None:
    world = small_world(tmp_path, spec=make_spec(seed=seed, rounds=60), seed=seed, peers=3)
    liar, *honest = world.peers
    liar.start()
    world.run(until_s=LONG_S, done=lambda: liar.rounds == 3)
    tell_false_digests(liar)
    world.run(until_s=LONG_S, done=lambda: liar.rounds == 25)
    for peer in honest:
        peer.start()
    assert world.run(until_s=LONG_S, done=lambda: all_stopped(world))
    check_honest_end(world, honest=honest)
    false = [record.round for record in sealed_rounds(world) if record.digest != world.checks.digests[record.round]]
    assert 15 <= len(false) <= 40, false
    assert max(false) < 50, "once two honest peers take part, their weights hold"


def test_the_same_seed_gives_the_same_log(tmp_path: Path) -> None:
    logs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        world = small_world(tmp_path / name, seed=5, peers=3, chaos=Chaos(cut=30, store=10))
        for peer in world.peers:
            peer.start()
        assert world.run(until_s=LONG_S, done=partial(all_stopped, world))
        logs.append(world.coordinator.disk.path.read_bytes())
    assert logs[0] == logs[1]


def test_a_killed_peer_is_not_waited_for_and_leaves_when_its_lease_ends(tmp_path: Path) -> None:
    world = small_world(tmp_path, spec=make_spec(seed=3, rounds=0), seed=3, peers=3)
    for peer in world.peers:
        peer.start()
    world.run(until_s=LONG_S, done=lambda: world.peers[0].rounds == 10)
    world.peers[1].crash()
    killed_s, rounds = world.events.elapsed_s, world.peers[0].rounds
    world.run(until_s=LONG_S, done=lambda: world.peers[0].rounds == rounds + 10)
    assert world.events.elapsed_s - killed_s < 1
    world.run(until_s=killed_s + world.spec.round.lease_ms / 1000 + 0.5)
    assert len([record for record in records_of(world) if isinstance(record, PeerLeft)]) == 1


def test_a_joiner_with_a_long_log_does_not_stall_the_others_and_is_awaited_in_the_end(tmp_path: Path) -> None:
    world = small_world(tmp_path, spec=make_spec(seed=4, rounds=0), seed=4, peers=3)
    for peer in world.peers:
        peer.probes_per_s = 1_000
    world.peers[2].probes_per_s = 200
    for peer in world.peers[:2]:
        peer.start()
    world.run(until_s=LONG_S, done=lambda: world.peers[0].rounds == 200)
    world.peers[2].start()
    world.run(until_s=LONG_S, done=lambda: world.peers[0].rounds == 260)
    assert all(len(record.slots) == 3 for record in sealed_rounds(world)[230:])
