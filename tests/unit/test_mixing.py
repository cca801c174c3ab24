"""Codes of both estimators in one round: each counts for what it is worth, from sealed counts and codes alone."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from peerturb import codec, mixing, stepping
from peerturb.errors import LogError
from peerturb.spec import RunSpec, StepSpec

STEP = StepSpec(half_codes=512, learning_rate=0.02)


def gaussian(rms: float, scale: float, count: int, seed: int) -> bytes:
    """Codes of projected gradients of this root mean square."""
    return codec.encode(np.random.default_rng(seed).normal(0.0, rms, count), scale).tobytes()


def settled(
    spsa: float, exact: float, *, counts: tuple[int, int] = (512, 4_096), start: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float]:
    """Scales after 60 rounds of projected gradients of these sizes."""
    scales = start
    for round_ in range(60):
        parts = [
            gaussian(rms, scale, count, 2 * round_ + number)
            for number, (rms, scale, count) in enumerate(zip((spsa, exact), scales, counts, strict=True))
        ]
        scales = tuple(map(float, mixing.next_scales(scales, parts)))  # type: ignore[assignment]
    return scales


@pytest.mark.parametrize("start", [(0.5, 0.5), (1e-6, 1e3), (1e3, 1e-6)])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 5.0, 0.3])
def test_scales_settle_where_a_codes_size_is_its_worth(ratio: float, start: tuple[float, float]) -> None:
    spsa, exact = settled(3.0 * ratio, 3.0, start=start)
    assert spsa / exact == pytest.approx(ratio**2, rel=0.1)
    assert min(spsa, exact) == pytest.approx(3.0 * min(ratio, 1.0) / 32, rel=0.1)


def test_very_noisy_codes_stay_above_their_rounding() -> None:
    spsa, exact = settled(3.0 * 50, 3.0)
    assert exact == pytest.approx(3.0 / 32, rel=0.05)
    assert spsa == pytest.approx(150 / mixing.RMS_MIN, rel=0.05)


def test_an_estimator_nobody_uses_follows_the_other() -> None:
    codes = gaussian(7.0, 0.5, 300, 1)
    alone = stepping.next_scale(0.5, codes)
    assert mixing.next_scales((0.5, 0.5), (codes, b"")) == (alone, alone)
    assert mixing.next_scales((0.5, 0.25), (b"", b"\x80")) == (0.5, 0.25)
    # So a mixed run in which only one kind is there is a run of that kind.
    assert mixing.mixed_step_size(STEP, 3, (0.5, 0.5), (codes, b""), 0) == stepping.step_size(STEP, 3, 0.5, codes, 0)


def weighted(parts: list[tuple[NDArray[np.float64], NDArray[np.float64]]], weights: list[float]) -> NDArray[np.float64]:
    """Sum of w g z over all codes, divided by the sum of weights."""
    total = sum(weight * (g @ z) for weight, (g, z) in zip(weights, parts, strict=True))
    return np.asarray(total / sum(weight * len(g) for weight, (g, _) in zip(weights, parts, strict=True)))


@pytest.mark.parametrize(("laptops", "exacts"), [(64, 1_024), (2_048, 1_024), (20_000, 256)])
def test_no_kind_drowns_the_other(laptops: int, exacts: int) -> None:
    """Simulated contributions: with the scales' weights the estimate is better than of either kind alone, and than with
    equal weights."""
    draw = np.random.default_rng(3)
    size, noise, batch = 400, 6.0, 32
    gradient = draw.normal(0.0, 1.0, size) / math.sqrt(size)
    errors: dict[str, list[float]] = {"spsa": [], "exact": [], "equal": [], "mixed": []}
    scales = settled(math.sqrt(1 + noise**2), math.sqrt(1 + noise**2 / batch))
    for _ in range(30):
        z = [np.where(draw.random((count, size)) < 0.5, 1.0, -1.0) for count in (laptops, exacts)]
        own = gradient + draw.normal(0.0, noise / math.sqrt(size), (1, size)) / math.sqrt(batch)
        luck = draw.normal(0.0, noise, laptops)  # the projection of an example's own gradient
        projected = [z[0] @ gradient + luck, z[1] @ own[0]]
        codes = [codec.encode(g, s).astype(float) for g, s in zip(projected, scales, strict=True)]
        values = [(c * s, signs) for c, s, signs in zip(codes, scales, z, strict=True)]
        weights = {"spsa": [1.0, 0.0], "exact": [0.0, 1.0], "equal": [1.0, 1.0], "mixed": [1 / s for s in scales]}
        for name, chosen in weights.items():
            errors[name].append(float(np.sum((weighted(values, chosen) - gradient) ** 2)))
    mean = {name: float(np.mean(found)) for name, found in errors.items()}
    assert mean["mixed"] < 1.01 * min(mean.values())
    if laptops > exacts:
        assert mean["mixed"] < 0.98 * min(mean["spsa"], mean["exact"])
        assert mean["mixed"] < 0.95 * mean["equal"]


def test_a_noisy_crowd_does_not_shorten_the_step() -> None:
    scales = settled(12.0, 3.0)
    exact, crowd = gaussian(3.0, scales[1], 4_096, 1), gaussian(12.0, scales[0], 40_960, 2)

    def expected_move(codes: tuple[bytes, bytes]) -> float:
        """How far the weights move along the gradient: alpha times the sum of n / scale."""
        alpha = float(mixing.mixed_step_size(STEP, 0, scales, codes, 0))
        return alpha * sum(len(part) / scale for part, scale in zip(codes, scales, strict=True))

    alone, together = expected_move((b"", exact)), expected_move((crowd, exact))
    few = expected_move((crowd[:64], b""))
    assert alone < together < 1.1 * alone
    assert few < 0.02 * alone  # a round of a few noisy codes moves little


def test_codes_by_the_thousand_make_full_steps() -> None:
    codes = gaussian(3.0, 3.0 / 32, 16_384, 1)
    parts = {n: float(stepping.step_size(STEP, 0, 0.1, codes[:n], 0)) * n for n in (16, 512, 16_384)}
    rms = {n: math.sqrt(np.mean(codec.decode(codes[:n]).astype(float) ** 2)) for n in parts}
    for n, moved in parts.items():
        assert moved == pytest.approx(0.02 * n / (n + 512) / rms[n], rel=1e-6)


def test_scales_out_of_bounds_are_errors() -> None:
    with pytest.raises(LogError):
        mixing.next_scales((0.5, 0.0), (b"\x01", b"\x01"))
    with pytest.raises(LogError):
        mixing.mixed_step_size(STEP, 0, (2.0**101, 0.5), (b"\x01", b"\x01"), 0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"perturbation": {"estimators": ["spsa", "exact"]}}, "step.half_codes"),
        ({"perturbation": {"estimators": ["exact", "spsa"]}}, "must be"),
        ({"perturbation": {"estimators": []}}, "at least 1"),
        ({"perturbation": {"exact": {"codes": 5}}}, "not allowed"),
        ({"perturbation": {"estimators": ["exact"], "exact": {"codes": 65_537}}}, "65536"),
    ],
)
def test_specs_of_estimators(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RunSpec.model_validate({"name": "x", "model": {"name": "m", "digest": "0" * 64}, **changes})


def test_a_spec_without_estimators_keeps_its_digest() -> None:
    plain = RunSpec.model_validate({"name": "x", "model": {"name": "m", "digest": "0" * 64}})
    assert b"estimators" not in plain.canonical
    assert b"half_codes" not in plain.canonical
    mixed = {"perturbation": {"estimators": ["spsa", "exact"]}, "step": {"half_codes": 8}}
    other = RunSpec.model_validate({**plain.model_dump(), **mixed})
    assert RunSpec.from_canonical(other.canonical) == other
    assert other.perturbation.exact is not None
