"""Each fault does what its name says: a world that is kinder than it claims would prove nothing."""

import random
from pathlib import Path

import pytest

from peerturb.ids import PeerKey
from peerturb_sim.disk import TornWriteError
from peerturb_sim.events import START_US
from peerturb_sim.life import populate
from peerturb_sim.peer import UNSYNCED_RECORDS_MAX, Peer
from peerturb_sim.scenario import FaultSpec, GroupSpec, LineSpec, Scenario
from peerturb_sim.world import SILENCE_US, World
from tests.simulation.small import GROUP, make_spec, small_world

SEED = 2
SLOW = GROUP.model_copy(update={"probes_per_s": (5.0, 10.0)})
"""Peers whose rounds take seconds, as those of people do: minutes are simulated in no time."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Three peers in the middle of a run without an end."""
    world = small_world(tmp_path, spec=make_spec(seed=SEED, rounds=0), seed=SEED, peers=3)
    for peer in world.peers:
        peer.start()
    run_rounds(world, 8)
    return world


def run_rounds(world: World, rounds: int) -> None:
    wanted = world.log.ledger.sealed_rounds + rounds
    assert world.run(until_s=world.events.elapsed_s + 1_000, done=lambda: world.log.ledger.sealed_rounds >= wanted)


def key_of(peer: Peer) -> PeerKey:
    assert peer.machine is not None
    return peer.machine.hello(bytes(32)).key


def contributions(world: World, peer: Peer) -> int:
    return sum(world.log.ledger.members[slot].contributions for slot in peer.tally.slots)


def test_a_short_partition_is_silence_and_a_long_one_ends_the_stream(tmp_path: Path) -> None:
    world = small_world(tmp_path, spec=make_spec(seed=SEED, rounds=0, lease_ms=300_000), seed=SEED, peers=3, group=SLOW)
    for peer in world.peers:
        peer.start()
    run_rounds(world, 8)
    victim = world.peers[1]
    line, heard = victim.line, victim.kept
    world.partition([victim], SILENCE_US // 2)
    world.run(until_s=world.events.elapsed_s + SILENCE_US / 2e6 - 0.5)
    assert victim.kept - heard <= 2, "what was under way still arrived"
    world.run(until_s=world.events.elapsed_s + 10)
    assert victim.line is line, "the stream stood still, and goes on"
    assert victim.kept > heard + 2
    world.partition([victim], 3 * SILENCE_US)
    world.run(until_s=world.events.elapsed_s + 2 * SILENCE_US / 1e6)
    assert victim.line is not line
    gave = contributions(world, victim)
    world.run(until_s=world.events.elapsed_s + SILENCE_US / 1e6 - 1)
    assert contributions(world, victim) == gave, "nobody gets through"
    world.run(until_s=world.events.elapsed_s + 200)
    assert contributions(world, victim) > gave, "and then it is back"


def test_an_end_that_a_partition_hides_is_heard_of_by_its_silence(tmp_path: Path) -> None:
    world = small_world(tmp_path, spec=make_spec(seed=SEED, rounds=0), seed=SEED, peers=2, group=SLOW)
    for peer in world.peers:
        peer.start()
    run_rounds(world, 4)
    leaver = world.peers[1]
    line, began_s = leaver.line, world.events.elapsed_s
    assert line is not None
    world.partition([leaver], 3 * SILENCE_US)
    world.run(until_s=began_s + 10)
    leaver.leave()
    world.run(until_s=began_s + 9 + SILENCE_US / 1e6)
    assert line.session in world.coordinator.lines
    world.run(until_s=began_s + 11 + SILENCE_US / 1e6)
    assert line.session not in world.coordinator.lines
    refused = dict(world.coordinator.refusals)
    world.coordinator.hear(line, b"what comes when the partition ends")
    assert world.coordinator.refusals == refused


def test_what_is_under_way_when_a_stream_is_cut_arrives_or_does_not(world: World) -> None:
    lost = []
    for _ in range(40):
        line = world.connect(world.peers[0])
        before = world.peers[0].traffic.up_bytes
        world.up(line, b"")
        world.cut(line)
        world.up(line, b"said after the cut")
        world.run(until_s=world.events.elapsed_s + 0.05)
        lost.append(not line.is_open)
        assert not line.takes
        assert world.peers[0].traffic.up_bytes >= before
    assert 5 < sum(lost) < 35, "now and then"


def test_one_end_may_hear_of_a_cut_much_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[list[float]] = [[], []]
    monkeypatch.setattr(world, "_coordinator_hears_end", lambda line, delay_us: delays[0].append(delay_us))
    monkeypatch.setattr(world, "_peer_hears_end", lambda line, delay_us: delays[1].append(delay_us))
    for _ in range(200):
        world.cut(world.connect(world.peers[0]))
    ends = list(zip(*delays, strict=True))
    for late in (0, 1):
        share = sum(both[late] == SILENCE_US and both[1 - late] < 100_000 for both in ends) / len(ends)
        assert share == pytest.approx(0.1, abs=0.06)
    assert sum(max(both) < 100_000 for both in ends) / len(ends) == pytest.approx(0.8, abs=0.08)


def test_a_crash_takes_the_unsynced_end_of_the_local_log_and_rounds_not_saved(world: World) -> None:
    victim, taken, unsaved = world.peers[1], set(), set()
    for _ in range(40):
        run_rounds(world, 3)
        kept, key = victim.kept, key_of(victim)
        victim.crash()
        taken.add(kept - victim.kept)
        sealed = world.log.state(victim.kept)[2]
        victim.start()
        unsaved.add(sealed - victim.rounds)
        assert key_of(victim) == key
    assert taken == set(range(UNSYNCED_RECORDS_MAX + 1))
    assert len(unsaved) > 5
    run_rounds(world, 30)
    assert len(victim.tally.slots) == 1
    assert victim.tally.crashes == 40


def test_with_its_disk_a_peer_loses_log_and_identity(world: World) -> None:
    victim = world.peers[1]
    key = key_of(victim)
    victim.crash(disk=True)
    assert victim.kept == 0
    victim.start()
    assert key_of(victim) != key
    assert victim.rounds == 0
    run_rounds(world, 60)
    assert len(victim.tally.slots) == 2
    assert victim.kept > 20, "it has the log again"


def test_a_clock_that_drifts_is_wrong_by_at_most_so_much(tmp_path: Path) -> None:
    group = GROUP.model_copy(update={"drift_ppm": 50_000.0})
    world = small_world(tmp_path, spec=make_spec(seed=SEED, rounds=0), seed=SEED, peers=40, group=group)
    world.run(until_s=1_000)
    wrong = [peer.now_ms() / world.now_ms - 1 for peer in world.peers]
    assert all(abs(one) <= 0.0501 for one in wrong)
    assert min(wrong) < -0.03 < 0.03 < max(wrong)


def test_power_lost_in_a_write_leaves_a_part_of_it_which_a_restart_cuts(world: World) -> None:
    coordinator, disk = world.coordinator, world.coordinator.disk
    left, partly = set(), set()
    for part in (0.0, 0.3, 0.7, 0.99):
        run_rounds(world, 2)
        whole, announced = disk.path.stat().st_size, len(world.log.records)
        coordinator.crash(tear_at=part)
        assert world.run(until_s=world.events.elapsed_s + 60, done=lambda: coordinator.machine is None)
        torn = disk.path.stat().st_size - whole
        left.add(torn > 0)
        assert len(world.log.payloads) >= announced
        disk.recover()
        cut = disk.path.stat().st_size - whole
        assert 0 <= cut <= torn
        partly.add(cut < torn)
        coordinator.start()
    assert left == partly == {False, True}
    run_rounds(world, 5)
    world.checks.ended(disk.path)


def test_a_torn_write_is_a_part_of_what_was_to_be_written(world: World) -> None:
    disk = world.coordinator.disk
    whole = disk.path.read_bytes()
    disk.tear_at = 0.5
    with pytest.raises(TornWriteError):
        disk.append([world.log.records[0]] * 3)
    torn = disk.path.read_bytes()
    assert torn.startswith(whole)
    assert len(whole) < len(torn)
    assert disk.recover() == len(world.log.payloads) >= len(world.log.records)


def lives(folder: Path, group: GroupSpec, *faults: FaultSpec) -> World:
    """A world with a scenario's chances, some minutes old."""
    scenario = Scenario(name="lives", seed=SEED, peers=(SLOW.model_copy(update={"count": 4}), group), faults=faults)
    world = small_world(folder, spec=make_spec(seed=SEED, rounds=0), seed=SEED, peers=0)
    populate(world, scenario, folder=folder)
    return world


def victims(world: World) -> list[Peer]:
    return [peer for peer in world.peers if peer.group.name == "victim"]


def test_a_paused_process_does_nothing_until_it_goes_on(tmp_path: Path) -> None:
    world = lives(tmp_path, GroupSpec(name="victim", count=1, line=GROUP.line, pauses_per_hour=120, pause_s=20))
    (victim,) = victims(world)
    assert world.run(until_s=1_000, done=lambda: victim.resumes_us > world.events.now_us + 5_000_000)
    until_s, said = (victim.resumes_us - START_US) / 1e6, victim.traffic.up_bytes
    world.run(until_s=world.events.elapsed_s + 0.1)  # what is under way
    said, kept = victim.traffic.up_bytes, victim.kept
    world.run(until_s=until_s - 0.01)
    assert (victim.traffic.up_bytes, victim.kept) == (said, kept)
    world.run(until_s=until_s + 60)
    assert victim.traffic.up_bytes > said
    assert victim.kept > kept


def test_chances_of_a_group_happen_about_as_often_as_it_says(tmp_path: Path) -> None:
    group = GroupSpec(
        name="victim", count=8, line=LineSpec(cuts_per_hour=60), crashes_per_hour=60, down_s=1, disk_losses=0.5,
        pauses_per_hour=60, pause_s=1,
    )  # fmt: skip
    world = lives(tmp_path, group)
    world.run(until_s=300)
    kinds = [row.kind for row in world.recorder.faults]
    assert {row.who.partition("-")[0] for row in world.recorder.faults} == {"victim"}
    for kind, expected in (("cut", 40), ("pause", 40), ("peer_crash", 20), ("disk_loss", 20)):
        assert expected / 2 < kinds.count(kind) < 2 * expected, kind
    lost = sum(len(peer.tally.slots) - 1 for peer in victims(world))
    assert 0 < lost <= kinds.count("disk_loss")
    assert sum(peer.tally.sessions for peer in victims(world)) > 8 + len(kinds) / 3


def test_set_faults_strike_whom_they_name(tmp_path: Path) -> None:
    group = GroupSpec(name="victim", count=4, line=GROUP.line)
    world = lives(
        tmp_path, group,
        FaultSpec(kind="partition", at_s=5, for_s=40, group="victim", share=0.5),
        FaultSpec(kind="store_refuses", at_s=60, for_s=5),
        FaultSpec(kind="peer_crash", at_s=80, for_s=5, group="victim"),
    )  # fmt: skip
    world.run(until_s=6)
    blocked = [peer for peer in world.peers if peer.host.blocked_until_us > world.events.now_us]
    assert {peer.group.name for peer in blocked} == {"victim"}
    assert len(blocked) == 2
    world.run(until_s=60.1)
    rounds = world.log.ledger.sealed_rounds
    world.run(until_s=64.9)
    assert world.log.ledger.sealed_rounds == rounds
    assert world.coordinator.disk.refuses
    world.run(until_s=81)
    assert world.log.ledger.sealed_rounds > rounds
    assert [peer.is_running for peer in world.peers] == [True] * 4 + [False] * 4
    world.run(until_s=86)
    assert all(peer.is_running for peer in world.peers)


def test_stays_and_absences_are_drawn_around_their_means(tmp_path: Path) -> None:
    draws = random.Random(0)
    life = {"arrive_s": (0.0, 10.0), "stay_s": 20.0, "away_s": 10.0}
    group = GroupSpec.model_validate({"name": "victim", "count": 60, "line": GROUP.line, "life": life})
    world = lives(tmp_path, group)
    there = []
    for _ in range(60):
        world.run(until_s=world.events.elapsed_s + draws.uniform(2, 8))
        there.append(sum(peer.is_running for peer in victims(world)) / 60)
    assert sum(there[5:]) / len(there[5:]) == pytest.approx(2 / 3, abs=0.08)
    assert sum(peer.tally.sessions for peer in victims(world)) > 300
