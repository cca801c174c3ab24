"""Codes, scale rule and step size."""

import math
from itertools import pairwise

import numpy as np
import pytest

from peerturb import codec, stepping
from peerturb.errors import LogError
from peerturb.spec import StepSpec

SCALE = float(np.float32(0.05))


def test_codes_are_rounded_clipped_and_void() -> None:
    projected = np.array([0.0, 0.5, 1.5, -2.5, 126.6, 127.6, 1e300, -1e300, math.nan, math.inf, -math.inf])
    codes = codec.encode(projected, 1.0)
    assert codes.dtype == np.int8
    assert codes.tolist() == [0, 0, 2, -2, 127, 127, 127, -127, stepping.VOID, stepping.VOID, stepping.VOID]


def test_f32_and_f64_of_the_same_value_give_the_same_code() -> None:
    projected = np.random.default_rng(0).normal(0, 2, 1000).astype(np.float32)
    assert np.array_equal(codec.encode(projected, SCALE), codec.encode(projected.astype(np.float64), SCALE))


def test_the_smallest_scale_does_not_overflow() -> None:
    assert codec.encode(np.array([1e308, -1e308]), stepping.SCALE_MIN).tolist() == [127, -127]


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    samples = np.arange(40_000)
    noise = codec.rounding_noise(run_key=3, slot=1, round=9, samples=samples)
    codes = codec.encode(np.full(len(samples), 2.3), 1.0, rounding="stochastic", noise=noise)
    assert set(codes.tolist()) == {2, 3}
    assert abs(codes.mean() - 2.3) < 4 * math.sqrt(0.3 * 0.7 / len(samples))
    again = codec.rounding_noise(run_key=3, slot=1, round=9, samples=samples[100:200])
    assert np.array_equal(again, noise[100:200])


def test_stochastic_rounding_keeps_integers() -> None:
    noise = np.array([0, 2**32 - 1], np.uint32)
    assert codec.encode(np.array([5.0, 5.0]), 1.0, rounding="stochastic", noise=noise).tolist() == [5, 5]


def test_stochastic_rounding_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="needs noise"):
        codec.encode(np.array([1.0]), 1.0, rounding="stochastic")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 2.0**101, 2.0**-101])
def test_a_scale_out_of_bounds_is_refused(scale: float) -> None:
    with pytest.raises(LogError, match="scale of a round"):
        codec.encode(np.array([1.0]), scale)
    with pytest.raises(LogError, match="scale of a round"):
        stepping.next_scale(scale, b"\x01")
    with pytest.raises(LogError, match="scale of a round"):
        stepping.step_size(StepSpec(), 0, scale, b"\x01", 0)


def test_decode_makes_void_codes_zero() -> None:
    assert codec.decode(bytes([128, 1, 255])).tolist() == [0, 1, -1]


def test_gain_moves_the_rms_towards_its_target_within_limits() -> None:
    grown = stepping.next_scale(1.0, np.full(10, 64, np.int8))
    assert grown == np.float32(math.sqrt(2))
    assert stepping.next_scale(1.0, np.full(10, 32, np.int8)) == 1
    assert stepping.next_scale(1.0, np.zeros(10, np.int8)) == np.float32(0.25)
    assert stepping.next_scale(1.0, np.full(10, 127, np.int8)) == np.float32(math.sqrt(127 / 32))
    assert stepping.next_scale(SCALE, np.full(3, stepping.VOID, np.int8)) == np.float32(SCALE)
    assert stepping.next_scale(SCALE, b"") == np.float32(SCALE)


def test_scale_stays_inside_its_bounds() -> None:
    assert stepping.next_scale(stepping.SCALE_MIN, np.zeros(4, np.int8)) == np.float32(stepping.SCALE_MIN)
    assert stepping.next_scale(stepping.SCALE_MAX, np.full(4, 127, np.int8)) == np.float32(stepping.SCALE_MAX)


def test_the_gain_settles_on_a_steady_signal() -> None:
    projected = np.random.default_rng(1).normal(0, 7.0, 512)
    scale = 1e-6
    for _ in range(40):
        scale = float(stepping.next_scale(scale, codec.encode(projected, scale)))
    codes = codec.encode(projected, scale).astype(np.float64)
    assert abs(math.sqrt(np.mean(codes**2)) - stepping.TARGET_RMS) < 1


def test_step_sizes() -> None:
    codes = np.array([30, -40, stepping.VOID], np.int8)
    sgd = StepSpec(rule="sgd", learning_rate=0.5)
    assert stepping.step_size(sgd, 0, SCALE, codes, 0) == np.float32(0.5 * SCALE / 2)
    normalized = StepSpec(rule="normalized", learning_rate=0.5)
    rms = math.sqrt((30**2 + 40**2) / 2)
    assert stepping.step_size(normalized, 0, SCALE, codes, 0) == np.float32(0.5 / (2 * rms))
    assert stepping.step_size(normalized, 0, 1000.0, codes, 0) == np.float32(0.5 / (2 * rms))


@pytest.mark.parametrize("codes", [b"", b"\x80\x80", b"\x00\x80"])
def test_a_round_that_says_nothing_makes_no_step(codes: bytes) -> None:
    for step in (StepSpec(rule="sgd"), StepSpec(rule="normalized")):
        assert stepping.step_size(step, 0, SCALE, codes, 0) == 0


def test_step_size_is_bounded() -> None:
    assert stepping.step_size(StepSpec(rule="sgd", learning_rate=1e3), 0, 2.0**100, b"\x01", 0) == np.float32(2.0**64)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_start_full_and_end_at_their_fraction(schedule: str) -> None:
    step = StepSpec.model_validate({"learning_rate": 2.0, "schedule": schedule, "final_fraction": 0.25})
    last = 2.0 if schedule == "constant" else 0.5
    assert stepping.learning_rate(step, 0, 100) == 2.0
    assert stepping.learning_rate(step, 100, 100) == pytest.approx(last, rel=1e-15)
    assert stepping.learning_rate(step, 10_000, 100) == stepping.learning_rate(step, 100, 100)
    rates = [stepping.learning_rate(step, round_, 100) for round_ in range(100)]
    assert all(a >= b for a, b in pairwise(rates))


def test_cosine_is_the_cosine() -> None:
    step = StepSpec(learning_rate=1.0, schedule="cosine")
    for round_ in range(0, 1001, 37):
        expected = (1 + math.cos(math.pi * round_ / 1000)) / 2
        assert stepping.learning_rate(step, round_, 1000) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    step = StepSpec(learning_rate=1.0, warmup_rounds=3, schedule="linear")
    assert [stepping.learning_rate(step, round_, 13) for round_ in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.9]


def test_many_codes_are_counted_like_few() -> None:
    """From `_MANY` codes on numpy counts them."""
    codes = np.random.default_rng(0).integers(-128, 128, 3 * stepping._MANY // 2).astype(np.int8)
    half = len(codes) // 2
    whole, parts = (
        stepping.valid_squares(codes),
        [stepping.valid_squares(part) for part in (codes[:half], codes[half:])],
    )
    assert len(codes) > stepping._MANY > half
    assert whole == tuple(map(sum, zip(*parts, strict=True)))
    valid = codes[codes != stepping.VOID].astype(np.int64)
    assert whole == (len(valid), int((valid**2).sum()))
    assert stepping.valid_squares(codes.tobytes()) == whole
