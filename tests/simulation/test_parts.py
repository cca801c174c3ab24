"""The simulator's shortcuts give what the long way gives: shared folds, counted bytes, measurements taken together."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from peerturb import codec, rng
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.records import RoundSealed
from peerturb.wire.messages import encode_payloads
from peerturb_coordinator.traffic import FRAMING_BYTES
from peerturb_sim import peer as peer_module
from peerturb_sim.checks import CONTRIBUTION_BYTES_MAX
from peerturb_sim.compute import Request
from peerturb_sim.events import Events, stream
from peerturb_sim.life import Life
from peerturb_sim.log import SharedLedger
from peerturb_sim.network import PACKET_BYTES, RETRANSMISSION_US, Host
from peerturb_sim.scenario import GroupSpec, LifeSpec, LineSpec, Scenario, ToySpec
from peerturb_sim.simulation import build, run_to_end
from peerturb_sim.toy import SIZE, ToyCompute
from peerturb_sim.world import World
from tests.conftest import REPOSITORY
from tests.simulation.small import (
    GROUP,
    ROUNDS,
    all_stopped,
    check_honest_end,
    make_spec,
    records_of,
    sealed_rounds,
    small_world,
)


@pytest.fixture
def ended(tmp_path: Path) -> World:
    """A world whose run is over."""
    world = small_world(tmp_path, seed=2, peers=3)
    for peer in world.peers:
        peer.start()
    assert world.run(until_s=1_000, done=lambda: all_stopped(world))
    return world


def test_a_position_in_the_shared_log_looks_like_a_fold_of_its_own(ended: World) -> None:
    own, shared = Ledger(), SharedLedger(ended.log, 0)
    for record in records_of(ended):
        assert (own.open, own.sealed_rounds, own.is_finished) == (shared.open, shared.sealed_rounds, shared.is_finished)
        own.apply(record)
        shared.apply(record)
        assert own.position == shared.position
    with pytest.raises(IllegalRecordError, match="not the one that the coordinator announced"):
        SharedLedger(ended.log, 3).apply(ended.log.records[1])


def test_counted_bytes_are_those_of_the_encoded_messages(ended: World) -> None:
    log = ended.log
    for first, last in ((0, 1), (0, len(log.payloads)), (5, 9)):
        assert log.message_bytes(first, last) == len(encode_payloads(log.payloads[first:last]).SerializeToString())
    assert log.batch_end(0, 1) == 1
    assert log.batch_end(3, 10**9) == len(log.payloads)


@pytest.mark.parametrize("objective", ["quadratic", "logistic"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_measurement_does_not_depend_on_what_is_measured_with_it(objective: str, rounding: str) -> None:
    spec = make_spec().model_copy(
        update={"perturbation": make_spec().perturbation.model_copy(update={"rounding": rounding})}
    )
    toy = ToySpec.model_validate({"objective": objective})
    answers = []
    for batches in ([[0], [1], [2]], [[0, 1, 2]], [[2, 0], [1]]):
        compute = ToyCompute(toy, spec, seed=7)
        requests = [
            Request(weights=compute.base, slot=slot, round=4, scale=0.25, count=count)  # type: ignore[arg-type]
            for slot, count in ((3, 5), (900, 1), (17, 16))
        ]
        for batch in batches:
            for index in batch:
                compute.expect(requests[index])
            for index in batch:
                compute.measure(requests[index])
        answers.append([request.answer for request in requests])
    assert answers[0] == answers[1] == answers[2]
    assert len({answer.codes for answer in answers[0] if answer is not None}) == 3


def test_the_update_is_numerics_v1_element_by_element(ended: World) -> None:
    compute = ToyCompute(ToySpec(), ended.spec, seed=2)
    weights = compute.base
    for sealed in sealed_rounds(ended)[:5]:
        total = np.zeros(SIZE, np.int64)
        for slot, codes in sealed.contributions():
            for sample, code in enumerate(codec.decode(codes)):
                signs = rng.linear_signs(
                    0, 0, SIZE, round=sealed.round, run_key=ended.spec.run_key, slots=[slot], samples=[sample]
                )
                total += int(code) * signs[0].astype(np.int64)
        by_hand = [
            np.float32(value - np.float32(np.float32(sealed.alpha) * np.float32(u)))
            for value, u in zip(weights.values, total, strict=True)
        ]
        weights = compute.apply(weights, sealed)
        assert weights.values.tolist() == by_hand


def has_rounds(world: World, rounds: int) -> bool:
    return world.peers[0].rounds == rounds


def test_a_joiner_that_takes_the_log_in_at_once_ends_as_one_that_takes_it_in_record_by_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for far in (10, 10_000):
        monkeypatch.setattr(peer_module, "FAR_RECORDS", far)
        folder = tmp_path / str(far)
        folder.mkdir()
        world = small_world(folder, spec=make_spec(rounds=60), seed=0, peers=3)
        for peer in world.peers[:2]:
            peer.start()
        world.run(until_s=1_000, done=partial(has_rounds, world, 30))
        world.peers[2].start()
        assert world.run(until_s=1_000, done=partial(all_stopped, world))
        check_honest_end(world)
        contributed = [record.round for record in sealed_rounds(world) if 2 in record.slots]
        assert len(contributed) > 20
        assert min(contributed) >= 30


def test_events_of_one_time_happen_in_their_order() -> None:
    events, seen = Events(), list[int]()
    for number in (3, 1, 2):
        events.after(5, seen.append, number)
    events.after(1, seen.append, 0)
    assert events.run(until_us=events.now_us + 5, done=lambda: len(seen) == 4)
    assert seen == [0, 3, 1, 2]


def test_streams_differ_by_purpose_and_index_and_repeat() -> None:
    assert stream(1, "a").random() == stream(1, "a").random()
    assert len({stream(*which).random() for which in ((1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))}) == 4


def test_a_line_takes_the_time_that_its_sums_say() -> None:
    line = LineSpec(latency_ms=10, jitter_ms=0, up_mbit=8, down_mbit=80, loss=0)
    host = Host(line, stream(0, "x"))
    assert host.up(930, 0.0) == pytest.approx(1_000 + 10_000)
    assert host.up(930, 0.0) == pytest.approx(2_000 + 10_000), "the second message waits for the first"
    assert host.down(930, 0.0) == pytest.approx(10_000 + 100)
    host.blocked_until_us = 50_000
    assert host.up(930, 20_000.0) == pytest.approx(21_000 + 10_000 + 30_000)


def test_loss_shows_as_retransmissions() -> None:
    lossy = Host(LineSpec(latency_ms=1, jitter_ms=0, loss=0.5), stream(0, "x"))
    times = [lossy.transit_us(100, 0.0) for _ in range(2_000)]
    late = sum(time_us >= RETRANSMISSION_US for time_us in times) / len(times)
    assert late == pytest.approx(0.5, abs=0.05)
    waits = {round(time_us) - 1_000 for time_us in times}
    assert waits == {RETRANSMISSION_US * (2**losses - 1) for losses in range(7)}, "each wait is twice the one before"


def test_an_overtaken_packet_comes_late_and_holds_back_what_follows(tmp_path: Path) -> None:
    mixed = Host(LineSpec(latency_ms=10, jitter_ms=0, loss=0, reordering=0.5), stream(0, "x"))
    times = [mixed.transit_us(100, 0.0) for _ in range(2_000)]
    late = [time_us for time_us in times if time_us > 10_000]
    assert len(late) / len(times) == pytest.approx(0.5, abs=0.05)
    assert 10_000 < max(late) <= 30_000, "at most a round trip"
    world = small_world(tmp_path, seed=0, peers=1, group=GROUP.model_copy(update={"line": mixed.spec}))
    line = world.connect(world.peers[0])
    arrivals = []
    for _ in range(50):
        world.up(line, b"x")
        arrivals.append(line.last_up_us)
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) < len(arrivals), "some waited for one before them"


def test_a_packet_that_comes_twice_takes_its_time_twice() -> None:
    """And nothing else of it is seen: a message of many packets has one of them again."""
    line = LineSpec(latency_ms=0, jitter_ms=0, up_mbit=8, down_mbit=8, loss=0, duplication=0.5)
    host, free_us, took = Host(line, stream(0, "x")), 0.0, []
    for _ in range(2_000):
        arrives_us = host.up(930, free_us)
        took.append(round(arrives_us - free_us))
        free_us = arrives_us
    assert set(took) == {1_000, 2_000}
    assert took.count(2_000) / len(took) == pytest.approx(0.5, abs=0.05)
    assert host.up(1_000_000, free_us) - free_us == pytest.approx(1_000_070 + PACKET_BYTES)


def test_bytes_are_counted_as_a_coordinator_does(ended: World) -> None:
    """A calm run: what was said is in the log, and each message has the framing that the metrics add."""
    sealed = sealed_rounds(ended)
    for peer in ended.peers:
        (slot,) = peer.tally.slots
        gave = [codes for record in sealed for one, codes in record.contributions() if one == slot]
        least = sum(len(codes) + CONTRIBUTION_BYTES_MAX - 10 + FRAMING_BYTES for codes in gave)
        most = sum(len(codes) + CONTRIBUTION_BYTES_MAX + FRAMING_BYTES for codes in gave) + 1_000
        assert least <= peer.traffic.up_bytes <= most
        assert peer.traffic.down_bytes >= ended.log.message_bytes(0, len(ended.log.payloads)) + FRAMING_BYTES * ROUNDS
    assert ended.up_bytes == sum(peer.traffic.up_bytes for peer in ended.peers)


def test_a_diurnal_peer_is_there_for_its_part_of_the_day(tmp_path: Path) -> None:
    life = LifeSpec(day_s=10, awake=0.3)
    world = small_world(tmp_path, spec=make_spec(rounds=0), seed=0, peers=0)
    group = GroupSpec(name="d", count=1, life=life)
    for _ in range(40):
        Life(world, world.add(group), None)
    there = []
    for second in range(1, 31):
        world.run(until_s=second)
        there.append(world.running)
    assert sum(there) / len(there) == pytest.approx(12, abs=2.5)
    assert min(there) > 2
    assert sum(peer.present_us() for peer in world.peers) / 40 == pytest.approx(9e6, rel=0.1)


@pytest.mark.slow
def test_ten_thousand_peers_fill_every_seat(tmp_path: Path) -> None:
    path = REPOSITORY / "sim" / "scenarios" / "ten-thousand.toml"
    scenario = Scenario.load(path)
    short = scenario.model_copy(update={"round": scenario.round.model_copy(update={"count": 40})})
    world = build(short, folder=path.parent, out=tmp_path)
    run_to_end(world, until_s=600)
    assert world.is_finished
    assert len(world.peers) == 10_000
    assert max(row.peers for row in world.recorder.rounds) > 1_000
    assert len(world.log.ledger.members) > 1_024
    assert isinstance(world.log.sealed[-1], RoundSealed)
