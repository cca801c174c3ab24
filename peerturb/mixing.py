"""Rounds in which codes of both estimators meet: a scale for each, so that a code's size is what it is worth.

The update adds all codes alike. Let r be the root mean square of an estimator's projected gradients: the best weight
of each is 1 / r**2 (docs/numerics.md, section 11), and codes of a scale proportional to r**2 have just this weight.
Nothing but sealed counts and codes is used. Everything in f64 by basic operations in the written order, as in
`peerturb.stepping`.
"""

import math
from collections.abc import Sequence

from peerturb.floats import f32
from peerturb.spec import StepSpec
from peerturb.stepping import (
    FACTOR_MAX,
    FACTOR_MIN,
    SCALE_MAX,
    SCALE_MIN,
    STEP_MAX,
    TARGET_RMS,
    Codes,
    check_scale,
    learning_rate,
    next_scale,
    step_size,
    valid_squares,
)

RMS_MIN = 4.0
"""Below this rms(c) rounding would be a sizable part of a code: noisier codes count for more than they are worth."""


def target_rms(scale: float, smallest: float) -> float:
    """Return the rms(c) at which an estimator of this scale is kept; `smallest`: the lower of both scales.

    With r = 32 `smallest` for the less noisy estimator, a scale of r_other**2 / (32 r) makes its rms(c)
    r_other / scale = 32 sqrt(smallest / scale).
    """
    return max(TARGET_RMS * math.sqrt(smallest / scale), RMS_MIN)


def next_scales(scales: Sequence[float], codes: Sequence[Codes]) -> tuple[float, ...]:
    """Return the scales of the next round, one for each estimator, from this round's scales and sealed codes.

    s' = f32(s * clamp(sqrt(rms(c) / target), 1/4, 2)), kept in [2^-100, 2^100]. Where an estimator has no valid code
    it follows the other one; where there are none at all the scales stay.

    Args:
        scales: of this round; two of them.
        codes: each estimator's, all contributions together.

    Raises:
        LogError: a scale is outside its bounds.
    """
    for scale in scales:
        check_scale(scale)
    smallest = min(scales)
    factors: list[float | None] = []
    for scale, part in zip(scales, codes, strict=True):
        count, squares = valid_squares(part)
        if not count:
            factors.append(None)
            continue
        factor = math.sqrt(math.sqrt(squares / count) / target_rms(scale, smallest))
        factors.append(min(max(factor, FACTOR_MIN), FACTOR_MAX))
    first = next((factor for factor in factors if factor is not None), 1.0)
    return tuple(
        f32(min(max(scale * (first if factor is None else factor), SCALE_MIN), SCALE_MAX))
        for scale, factor in zip(scales, factors, strict=True)
    )


def worth(scales: Sequence[float], counts: Sequence[int]) -> float:
    """Return how many codes of the smaller scale a round's codes are worth: sum of n * (smallest scale / scale)."""
    smallest, total = min(scales), 0.0
    for scale, count in zip(scales, counts, strict=True):
        total += count * (smallest / scale)
    return total


def scales_after(scales: tuple[float, float], codes: tuple[bytes, bytes]) -> tuple[float, float]:
    """Return a run's scales of the round after, f32 values.

    Args:
        scales: that of all codes and 0 where the run allows one estimator, else those of `spsa` and `exact`.
        codes: of `spsa` and of `exact`.
    """
    if not scales[1]:
        return next_scale(scales[0], codes[0] or codes[1]), 0.0
    spsa, exact = next_scales(scales, codes)
    return spsa, exact


def alpha_after(
    step: StepSpec, round: int, scales: tuple[float, float], codes: tuple[bytes, bytes], total_rounds: int, *,
    fraction: float = 1.0,
) -> float:  # fmt: skip
    """Return a sealed round's step size, an f32 value; arguments as for `scales_after` and `mixed_step_size`."""
    if not scales[1]:
        return step_size(step, round, scales[0], codes[0] or codes[1], total_rounds, fraction=fraction)
    return mixed_step_size(step, round, scales, codes, total_rounds, fraction=fraction)


def mixed_step_size(
    step: StepSpec, round: int, scales: Sequence[float], codes: Sequence[Codes], total_rounds: int, *,
    fraction: float = 1.0,
) -> float:  # fmt: skip
    """Return alpha of a sealed round with a scale for each estimator; see `peerturb.stepping.step_size`.

    With e the codes' worth, h = `half_codes`, S the sum of all squares: `sgd`: lr * smallest scale / (e + h);
    `normalized`: lr / ((e + h) * sqrt(S / e)).

    Raises:
        LogError: a scale is outside its bounds.
    """
    for scale in scales:
        check_scale(scale)
    tallies = [valid_squares(part) for part in codes]
    squares = sum(tally[1] for tally in tallies)
    if squares == 0:
        return f32(0.0)
    rate = learning_rate(step, round, total_rounds, fraction=fraction)
    amount = worth(scales, [tally[0] for tally in tallies])
    whole = amount + step.half_codes
    alpha = rate * min(scales) / whole if step.rule == "sgd" else rate / (whole * math.sqrt(squares / amount))
    return f32(min(alpha, STEP_MAX))
