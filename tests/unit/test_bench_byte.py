"""`peerturb bench byte`: the f32 yardstick is faithful, the trainer repeats itself, rounds are counted right."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb import stepping
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest, Parameter
from peerturb.spec import ModelSpec, RunSpec
from peerturb.zo.directions import Probes as Noise
from peerturb.zo.directions import left_signs, right_signs
from peerturb.zo.update import apply_update
from peerturb_bench import byte
from peerturb_bench.byte import Arm, Plan, Runs, interval, rounds_to, rows, smoothed
from peerturb_bench.registry import BENCHMARKS
from peerturb_bench.rows import Row
from peerturb_bench.single import ByteExchange, Case, FloatExchange, Round, Trainer, apply_floats, demo_case

MANIFEST: Manifest = (
    Parameter(index=0, name="a.weight", shape=(24, 40), dtype="float32"),
    Parameter(index=1, name="b.weight", shape=(130,), dtype="float32", exponent=-2),
    Parameter(index=2, name="c.weight", shape=(7, 3), dtype="float32", exponent=3),
)
SPEC = RunSpec(name="bench", model=ModelSpec(name="none", digest="0" * 64))
COUNTS = (20, 13)
PLAN = Plan(seeds=2, rounds=40, target_round=32, every=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models gain nothing from threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case() -> Case:
    return demo_case(slots=2, heldout=24)


def _weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(parameter.shape, generator=generator) for parameter in MANIFEST]


def _codes() -> NDArray[np.int8]:
    return np.random.default_rng(2).integers(-127, 128, sum(COUNTS)).astype(np.int8)


def _by_bytes(codes: NDArray[np.int8], scale: float) -> list[Tensor]:
    weights = _weights()
    alpha = float(stepping.step_size(SPEC.step, 5, scale, codes, 0))
    apply_update(
        weights, MANIFEST, family="rank1", run_key=SPEC.run_key, round=5, slots=(0, 1), counts=COUNTS, codes=codes,
        alpha=alpha,
    )  # fmt: skip
    return weights


def _by_floats(gradients: NDArray[np.float32]) -> list[Tensor]:
    weights = _weights()
    apply_floats(
        Round(number=RoundNumber(5), spec=SPEC, manifest=MANIFEST, engines=(), weights=weights), COUNTS, gradients
    )
    return weights


def _are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_multiples_of_a_power_of_two_give_the_same_bits_either_way() -> None:
    codes, scale = _codes(), 0.0625
    gradients = codes.astype(np.float32) * np.float32(scale)
    moved = _by_bytes(codes, scale)
    assert not _are_equal(moved, _weights())
    assert _are_equal(moved, _by_floats(gradients))
    gradients[7] += np.float32(scale / 4)  # what a byte cannot carry, the yardstick does
    assert not _are_equal(moved, _by_floats(gradients))


def test_void_probes_count_for_nothing_either_way() -> None:
    codes, scale = _codes(), 0.5
    gradients = codes.astype(np.float32) * np.float32(scale)
    codes[[3, 25]] = stepping.VOID
    gradients[[3, 25]] = np.nan, np.inf
    assert _are_equal(_by_bytes(codes, scale), _by_floats(gradients))


def test_the_yardstick_is_the_sum_of_g_z() -> None:
    gradients = np.random.default_rng(3).standard_normal(sum(COUNTS)).astype(np.float32)
    rate = SPEC.step.learning_rate / (len(gradients) * math.sqrt(float(np.mean(gradients.astype(np.float64) ** 2))))
    moved, expected = _by_floats(gradients), _weights()
    number = 0
    for slot, count in enumerate(COUNTS):
        for sample in range(count):
            noise = Noise.of(run_key=SPEC.run_key, round=5, slots=slot, samples=sample)
            for parameter, weight in zip(MANIFEST, expected, strict=True):
                left = left_signs(parameter, noise)[0].double()
                z = left if parameter.kind == "vector" else torch.outer(left, right_signs(parameter, noise)[0].double())
                weight.sub_(rate * float(gradients[number]) * 2.0**parameter.exponent * z)
            number += 1
    for moved_tensor, expected_tensor in zip(moved, expected, strict=True):
        torch.testing.assert_close(moved_tensor, expected_tensor, rtol=1e-5, atol=1e-6)


def test_scalars_that_are_all_zero_or_void_move_nothing() -> None:
    gradients = np.zeros(sum(COUNTS), np.float32)
    gradients[4] = np.nan
    assert _are_equal(_by_floats(gradients), _weights())


def test_on_a_model_both_arms_agree_on_what_a_byte_can_carry(case: Case) -> None:
    """As above with everything real: tied embeddings, norms, the engine's own codes."""
    spec = case.run_spec(seed=0, probes_max=6)
    ends = []
    for exchange in (_Quantised(as_floats=True), _Quantised(as_floats=False)):
        with Trainer(case, exchange, spec) as trainer:
            trainer.step()
            ends.append({name: tensor.clone() for name, tensor in case.model.named_parameters()})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


class _Quantised:
    """One round of engine codes in units of 1/4, applied as bytes or as the f32 numbers that they stand for."""

    def __init__(self, *, as_floats: bool) -> None:
        self.as_floats = as_floats

    def step(self, round: Round) -> None:
        codes = [
            engine.contribute(round.number, slot=Slot(i), scale=0.25).codes for i, engine in enumerate(round.engines)
        ]
        sealed, counts = np.concatenate(codes), [len(part) for part in codes]
        assert np.count_nonzero(sealed) > len(sealed) // 2
        if self.as_floats:
            apply_floats(round, counts, sealed.astype(np.float32) * np.float32(0.25))
            return
        alpha = float(stepping.step_size(round.spec.step, round.number, 0.25, sealed, 0))
        apply_update(
            round.weights, round.manifest, family="rank1", run_key=round.spec.run_key, round=round.number,
            slots=range(len(counts)), counts=counts, codes=sealed, alpha=alpha,
        )  # fmt: skip


def test_runs_repeat_by_seed_and_leave_the_base_weights(case: Case) -> None:
    before = [parameter.clone() for parameter in case.model.parameters()]

    def losses(seed: int, arm: Arm) -> list[float]:
        plan = Plan(seeds=1, rounds=2, target_round=1, every=1, slots=2, probes=8)
        found: list[float] = byte.losses(case, plan, seed=seed, arm=arm).tolist()
        return found

    first = losses(0, "byte")
    assert len(first) == 3
    assert first == losses(0, "byte")
    assert first[0] == losses(1, "byte")[0]
    assert first[1:] != losses(1, "byte")[1:]
    floats = losses(0, "f32")
    assert floats[1:] != first[1:]
    # Same perturbations and data: after two rounds the arms differ far less than either has moved.
    assert abs(floats[2] - first[2]) < abs(first[2] - first[0]) / 3
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


def test_the_scale_follows_the_codes_and_noise_moves_the_yardstick(case: Case) -> None:
    spec = case.run_spec(seed=0, probes_max=4)
    exchange = ByteExchange(spec)
    before = exchange.scale
    with Trainer(case, exchange, spec) as trainer:
        trainer.step()
        assert exchange.scale != before
        assert trainer.round_number == 1
    settled = ByteExchange(spec, is_settled=True)
    with Trainer(case, settled, spec) as trainer:
        trainer.step()
    again = ByteExchange(spec)
    again.scale = settled.scale
    with Trainer(case, again, spec) as trainer:
        trainer.step()
    assert again.scale == pytest.approx(settled.scale, rel=0.02)  # where the gain rests
    ends = []
    for noise in (0.0, 0.1):
        with Trainer(case, FloatExchange(noise=noise), spec) as trainer:
            trainer.step()
            ends.append(trainer.heldout_loss())
    assert ends[0] != ends[1]


def test_a_seed_changes_the_run_key_and_nothing_else(case: Case) -> None:
    one, two = case.run_spec(seed=1, probes_max=4), case.run_spec(seed=2, probes_max=4)
    assert one.run_key != two.run_key
    assert one.model_dump(exclude={"seed"}) == two.model_dump(exclude={"seed"})


def _falling(rounds: int, *, slower: float = 1.0) -> NDArray[np.float64]:
    return 5 - 0.02 * np.arange(0.0, rounds + 1, PLAN.every, dtype=np.float64) / slower


def test_rounds_are_interpolated_on_the_smoothed_curve() -> None:
    assert rounds_to(_falling(40), 4.7, 4) == pytest.approx(15)
    assert rounds_to(_falling(40), 5.0, 4) == 0
    assert rounds_to(_falling(40), 4.1, 4) is None
    bumpy = _falling(40)
    bumpy[3] -= 0.3  # one lucky evaluation is not the target reached
    found = rounds_to(bumpy, 4.7, 4)
    assert found is not None
    assert found == pytest.approx(10)  # unsmoothed it would be 9.5
    assert smoothed(bumpy)[3] == pytest.approx(_falling(40)[3] - 0.1)


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert 3 - found.low == pytest.approx(found.high - 3)


def _runs(*, byte: float = 1.0, settled: float = 1.0) -> Runs:
    return Runs(f32=_falling(40), byte=_falling(40, slower=byte), settled=_falling(40, slower=settled))


def _table(*runs: Runs) -> dict[str, Row]:
    return {row.name: row for row in rows(PLAN, runs, name="a line")}


def test_equal_arms_have_the_ratio_one() -> None:
    table = _table(_runs(), _runs())
    head = table["rounds to target"]
    assert head.value == pytest.approx(1)
    assert head.reference == 1.01
    assert head.ratio == pytest.approx(1 / 1.01)
    assert table["f32, median"].value == pytest.approx(32)
    assert table["byte, median"].value == pytest.approx(32)
    assert table["byte's last loss above f32's"].value == pytest.approx(0)


def test_a_slower_arm_is_seen_for_what_it_is() -> None:
    table = _table(_runs(byte=1.05), _runs(byte=1.15, settled=1.02))
    assert table["rounds to target"].value == pytest.approx(1.10)
    assert table["seed 1"].ratio == pytest.approx(1.15)
    assert (table["rounds to target, 95 % high"].value or 0) > 1.15
    assert (table["byte's last loss above f32's"].value or 0) > 0
    assert table["settled scale, mean"].value == pytest.approx(math.sqrt(1.02))


def test_an_arm_that_never_arrives_is_an_error() -> None:
    with pytest.raises(byte.TargetMissedError, match="after 40 rounds"):
        _table(_runs(byte=2), _runs())


def test_the_benchmark_is_listed() -> None:
    assert "byte" in BENCHMARKS
