"""Each checker sees what it is there for, and lies are what their names say."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from peerturb.errors import RejectCode
from peerturb.ids import RoundNumber
from peerturb.protocol.messages import Contribution
from peerturb.protocol.records import RoundSealed
from peerturb_sim.checks import BrokenInvariantError
from peerturb_sim.liars import Liar
from peerturb_sim.scenario import Lie, ToySpec
from peerturb_sim.swarm import must_end
from peerturb_sim.toy import ToyCompute
from peerturb_sim.world import World
from tests.simulation.small import all_stopped, make_spec, small_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world in the middle of its run, where no round is sealed twice with the same codes."""
    world = small_world(tmp_path, spec=make_spec(seed=2, rounds=0), seed=2, peers=3)
    for peer in world.peers:
        peer.start()
    world.run(until_s=1_000, done=lambda: world.log.ledger.sealed_rounds == 6)
    world.run(until_s=1_000, done=lambda: 6 in world.checks.digests)
    world.checks.restarted(len(world.log.records))  # nothing has been said of round 6 yet
    return world


def sealed_next(world: World, codes: bytes) -> RoundSealed:
    """What a coordinator might seal for the round that is open: one contribution, of slot 0."""
    last = world.log.sealed[-1]
    return replace(
        last, round=RoundNumber(last.round + 1), slots=last.slots[:1], counts=(len(codes),), codes=codes,
        digest=world.checks.digests[6],
    )  # fmt: skip


def contribute(
    world: World, *, round_: int = 6, codes: bytes = b"code", size: int = 0, slot: int = 0, digest: int = 0
) -> None:
    line = next(line for line in world.coordinator.lines.values() if line.peer.tally.slots == [slot])
    message = Contribution(round=RoundNumber(round_), codes=codes, loss=1.0, digest=digest or world.checks.digests[6])
    world.checks.heard(line, message, size or len(codes))


def last_codes(world: World) -> bytes:
    return next(iter(world.log.sealed[-1].contributions()))[1]


def seals_again(world: World) -> None:
    world.checks.announced(world.log.sealed[2], 0)


def leaves_a_round_out(world: World) -> None:
    world.checks.announced(replace(world.log.sealed[-1], round=RoundNumber(7)), 0)


def seals_codes_of_the_round_before(world: World) -> None:
    world.checks.announced(sealed_next(world, last_codes(world)), 0)


def seals_what_was_said_of_another_round(world: World) -> None:
    contribute(world, round_=5, codes=b"late")
    world.checks.announced(sealed_next(world, b"late"), 0)


def seals_what_a_minority_measured(world: World) -> None:
    contribute(world, slot=0, digest=99)
    contribute(world, slot=1)
    contribute(world, slot=2)
    world.checks.announced(replace(sealed_next(world, b"code"), digest=99), 0)


def hears_a_long_message(world: World) -> None:
    contribute(world, round_=6, codes=b"code", size=4 + 25)


def writes_a_long_record(world: World) -> None:
    contribute(world, round_=6, codes=b"code")
    world.log.payloads[0] = bytes(4 + 6 + 40 + 1)
    world.checks.announced(sealed_next(world, b"code"), 0)


def forgets_a_record(world: World) -> None:
    world.checks.restarted(len(world.log.records) - 1)


def measures_early(world: World) -> None:
    world.checks.measured_on(world.peers[1], world.peers[1].rounds + 1)


def applies_again(world: World) -> None:
    world.checks.applies(world.peers[1], world.log.sealed[world.peers[1].rounds - 1])


def goes_apart(world: World) -> None:
    peer = world.peers[1]
    peer.weights = world.compute.corrupt(peer.weights, 0)
    world.checks.agree(peer)


def damages_the_file(world: World) -> None:
    path = world.coordinator.disk.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    world.checks.ended(path)


def loses_the_end_of_the_file(world: World) -> None:
    path = world.coordinator.disk.path
    path.write_bytes(path.read_bytes()[:-1])
    world.checks.ended(path)


@pytest.mark.parametrize(
    ("happens", "name", "words"),
    [
        (seals_again, "rounds_once", "round 2 is sealed where 6 is due"),
        (leaves_a_round_out, "rounds_once", "round 7 is sealed where 6 is due"),
        (seals_codes_of_the_round_before, "contributions_once", "round 6 holds codes of slot 0"),
        (seals_what_was_said_of_another_round, "contributions_once", "never heard from it"),
        (seals_what_a_minority_measured, "majority_holds", "weights 63000000, though 2 of 3 peers have measured it on"),
        (hears_a_long_message, "byte_budget", "29 bytes carry a contribution of 4 codes"),
        (writes_a_long_record, "byte_budget", "round 6 takes 51 bytes for 4 codes"),
        (forgets_a_record, "announced_stays", "are there after a restart"),
        (measures_early, "measured_on_its_round", "peer-1 measured round"),
        (applies_again, "applied_once", "peer-1 applies round"),
        (goes_apart, "replicas_agree", "rounds peer-1 has weights"),
        (damages_the_file, "log_verifies", "run.log"),
        (loses_the_end_of_the_file, "announced_stays", "records were announced, the file has"),
    ],
)
def test_a_checker_names_what_it_sees(world: World, happens: Callable[[World], None], name: str, words: str) -> None:
    with pytest.raises(BrokenInvariantError, match=words) as broken:
        happens(world)
    assert broken.value.name == name


def test_in_a_tie_nobody_can_know(world: World) -> None:
    contribute(world, slot=0, digest=99)
    contribute(world, slot=1)
    world.checks.announced(replace(sealed_next(world, b"code"), digest=99), len(world.log.payloads) - 1)
    assert world.checks.outvoted == 1


def test_what_may_be_is_not_called_broken(world: World) -> None:
    peer = world.peers[1]
    contribute(world, round_=6, codes=b"code", size=4 + 24)
    world.log.payloads[0] = bytes(4 + 6 + 40)
    world.checks.announced(sealed_next(world, b"code"), 0)
    world.checks.restarted(len(world.log.records))
    world.checks.measured_on(peer, peer.rounds)
    world.checks.agree(peer)
    peer.corrupt()
    world.checks.agree(peer)  # its memory is faulty, and it has not noticed yet
    world.checks.ended(world.coordinator.disk.path)


def test_a_peer_that_ends_with_other_weights_or_gives_up_is_found(tmp_path: Path) -> None:
    world = small_world(tmp_path, seed=2, peers=3)
    for peer in world.peers:
        peer.start()
    assert world.run(until_s=1_000, done=lambda: all_stopped(world))
    compute = ToyCompute(ToySpec(), world.spec, seed=2)
    must_end(world, compute)
    victim = world.peers[1]
    right = victim.weights
    victim.weights = world.compute.corrupt(right, 0)
    with pytest.raises(BrokenInvariantError, match="peer-1 ended with 30 rounds and other weights than a replay"):
        must_end(world, compute)
    victim.weights = right
    assert victim.stop is not None
    victim.stop = replace(victim.stop, code=RejectCode.SUPERSEDED, why="it had enough")
    with pytest.raises(BrokenInvariantError, match="peer-1 has stopped: it had enough"):
        must_end(world, compute)


HONEST = [
    Contribution(round=RoundNumber(number), codes=bytes([number, 250, 127, 0]), loss=float(number), digest=9)
    for number in (3, 4)
]


def told(lie: Lie) -> list[Contribution | None]:
    liar = Liar(lie, random.Random(5))
    return [liar.falsify(one) for one in HONEST]


def test_every_lie_is_what_its_name_says() -> None:
    third, fourth = HONEST
    assert told("flipped") == [replace(one, codes=bytes([256 - one.codes[0], 6, 129, 0])) for one in HONEST]
    assert told("replayed") == [third, replace(fourth, codes=third.codes, loss=third.loss)]
    assert told("stale") == [replace(third, round=RoundNumber(2)), replace(fourth, round=RoundNumber(3))]
    assert told("silent") == [None, None]
    for one, said in zip(HONEST, told("digest"), strict=True):
        assert said == replace(one, digest=said.digest if said else 0) != one
    for lie in ("random", "extreme"):
        codes = [said.codes for said in told(lie) if said is not None]
        assert [len(one) for one in codes] == [4, 4]
        assert len({*codes, *(one.codes for one in HONEST)}) == 4, "neither honest nor twice the same"
        assert [replace(one, codes=code) for one, code in zip(HONEST, codes, strict=True)] == told(lie)
        assert lie != "extreme" or set(b"".join(codes)) == {127, 129}
    assert {"random", "flipped", "extreme", "replayed", "stale", "silent", "digest"} == set(get_args(Lie))
