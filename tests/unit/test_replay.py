"""Replay: base weights and sealed rounds give what applying them one by one gives, or an error that says where."""

import pytest
import torch

from peerturb.errors import LogError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest, Parameter
from peerturb.protocol.ledger import step_size
from peerturb.protocol.records import RoundSealed
from peerturb.spec import ModelSpec, RunSpec
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.replay import replay
from peerturb.zo.update import apply_update

SPEC = RunSpec(name="unit", model=ModelSpec(name="toy", digest="ab" * 32))
MANIFEST: Manifest = (
    Parameter(index=0, name="matrix", shape=(6, 5), dtype="float32"),
    Parameter(index=1, name="vector", shape=(7,), dtype="float32"),
)
ROUNDS = 40


def base() -> list[torch.Tensor]:
    return [torch.arange(30, dtype=torch.float32).reshape(6, 5) / 7, torch.linspace(-1, 1, 7)]


def train() -> tuple[list[RoundSealed], bytes]:
    """Sealed rounds with the digests of the weights before them, and the digest at the end."""
    weights, rounds = base(), []
    for number in range(ROUNDS):
        codes = bytes((number * 37 + sample * 11) % 256 for sample in range(6))
        sealed = RoundSealed(
            round=RoundNumber(number),
            alpha=step_size(SPEC, RoundNumber(number), 0.05, codes),
            loss=1.0,
            digest=short_digest(run_digest(MANIFEST, weights)),
            slots=(Slot(0), Slot(2)),
            counts=(2, 4),
            codes=codes,
        )
        apply_update(
            weights,
            MANIFEST,
            family=SPEC.perturbation.family,
            run_key=SPEC.run_key,
            round=number,
            slots=sealed.slots,
            counts=sealed.counts,
            codes=sealed.codes,
            alpha=sealed.alpha,
        )
        rounds.append(sealed)
    return rounds, run_digest(MANIFEST, weights)


def test_replay_gives_the_weights_of_the_run() -> None:
    rounds, digest = train()
    seen: list[int] = []
    assert replay(rounds, base(), MANIFEST, SPEC, progress=seen.append) == digest
    assert seen == list(range(1, ROUNDS + 1))


def test_replay_in_two_parts_is_replay_in_one() -> None:
    rounds, digest = train()
    weights = base()
    middle = replay(rounds, weights, MANIFEST, SPEC, until_round=17)
    assert short_digest(middle) == rounds[17].digest
    assert replay(rounds, weights, MANIFEST, SPEC, first_round=17) == digest


def test_other_base_weights_are_noticed_at_once() -> None:
    rounds, _ = train()
    weights = base()
    weights[0][0, 0] += 1
    before = run_digest(MANIFEST, weights)
    with pytest.raises(LogError, match=r"before round 0 .* not the run's weights"):
        replay(rounds, weights, MANIFEST, SPEC)
    assert run_digest(MANIFEST, weights) == before


@pytest.mark.parametrize(("check_every", "where"), [(1, "between rounds 5 and 6"), (16, "between rounds 0 and 16")])
def test_a_changed_round_is_noticed_at_the_next_check(check_every: int, where: str) -> None:
    rounds, _ = train()
    changed = {name: getattr(rounds[5], name) for name in rounds[5].__slots__} | {"codes": b"\x7f" * 6}
    rounds[5] = RoundSealed(**changed)
    with pytest.raises(LogError, match=where):
        replay(rounds, base(), MANIFEST, SPEC, check_every=check_every)


def test_a_missing_round_is_named() -> None:
    rounds, _ = train()
    with pytest.raises(LogError, match="round 8 where round 7 should be"):
        replay(rounds[:7] + rounds[8:], base(), MANIFEST, SPEC)


@pytest.mark.parametrize("check_every", [1, 16])
def test_a_false_digest_that_a_later_round_contradicts_is_no_damage(check_every: int) -> None:
    rounds, digest = train()
    for number in (16, 17):
        fields = {name: getattr(rounds[number], name) for name in rounds[number].__slots__}
        rounds[number] = RoundSealed(**fields | {"digest": 7})
    assert replay(rounds, base(), MANIFEST, SPEC, check_every=check_every) == digest


@pytest.mark.parametrize("false_rounds", [1, 8])
def test_false_digests_in_the_last_rounds_are_told_and_lose_nothing(false_rounds: int) -> None:
    rounds, digest = train()
    _spoil(rounds, false_rounds)
    doubts: list[str] = []
    assert replay(rounds, base(), MANIFEST, SPEC, check_every=1, doubt=doubts.append) == digest
    first = ROUNDS - false_rounds
    assert len(doubts) == 1
    assert f"between rounds {first - 1} and {first}; the log ends {false_rounds} rounds on" in doubts[0]


def test_more_rounds_that_differ_than_chance_and_a_liar_explain_are_an_error() -> None:
    rounds, _ = train()
    _spoil(rounds, 9)
    with pytest.raises(LogError, match=f"between rounds {ROUNDS - 10} and {ROUNDS - 9}"):
        replay(rounds, base(), MANIFEST, SPEC, check_every=1)


def _spoil(rounds: list[RoundSealed], last: int) -> None:
    """Put false digests into the last rounds."""
    for number in range(len(rounds) - last, len(rounds)):
        fields = {name: getattr(rounds[number], name) for name in rounds[number].__slots__}
        rounds[number] = RoundSealed(**fields | {"digest": 7})
