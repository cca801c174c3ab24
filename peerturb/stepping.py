"""The shared scale, the step and the loss of a sealed round, from its codes.

Everything is computed in f64 by basic IEEE operations in the written order and rounded once to f32, so that every
machine gets the same bits. It knows nothing of weights, peers or the network, and does without numpy, which is a sixth
of a coordinator's memory.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Protocol

from peerturb.errors import LogError
from peerturb.floats import f32
from peerturb.spec import StepSpec

VOID = -128
"""The code of a probe whose loss was not finite; it counts for nothing."""
CODE_MAX = 127
TARGET_RMS = 32.0
"""Where the automatic gain keeps rms(c): 12 dB below clipping, 5 bits above rounding."""
FACTOR_MIN, FACTOR_MAX = 0.25, 2.0
"""What a scale is multiplied by from one round to the next, at least and at most."""
SCALE_MIN = 2.0**-100
SCALE_MAX = 2.0**100
STEP_MAX = 2.0**64
"""Keeps alpha * 2**k * U below 2**104, so that no update is infinite and no weight becomes NaN."""

_COSINE_TERMS = 12


_VOID_BYTE = VOID & 0xFF
_MANY = 1 << 17
"""Bytes from which numpy counts them ten times faster, and is worth its memory."""


class _Array(Protocol):
    def tobytes(self) -> bytes: ...


Codes = bytes | _Array
"""int8 codes as bytes, or as a numpy array."""


def next_scale(scale: float, codes: Codes) -> float:
    """Return the scale of the next round from this round's scale and sealed codes.

    r = sqrt(sum c^2 / n) over the n valid codes; s' = f32(s * clamp(sqrt(r / 32), 1/4, 2)), kept in [2^-100, 2^100];
    without a valid code s stays.

    Raises:
        LogError: the scale is outside its bounds.
    """
    check_scale(scale)
    count, squares = valid_squares(codes)
    if count == 0:
        return f32(scale)
    factor = min(max(math.sqrt(math.sqrt(squares / count) / TARGET_RMS), FACTOR_MIN), FACTOR_MAX)
    return f32(min(max(float(scale) * factor, SCALE_MIN), SCALE_MAX))


def learning_rate(step: StepSpec, round: int, total_rounds: int, *, fraction: float = 1.0) -> float:
    """Return the learning rate of a round in f64.

    With w warm-up rounds: lr * (round + 1) / (w + 1) before round w. From then on t = (round - w) / (total - w), at
    most 1, and lr * (f + (1 - f) * shape), f the final fraction, shape 1 - t (linear) or (1 + cos(pi t)) / 2 (cosine).
    The plateau schedule has lr * `fraction`, which `peerturb.plateau.Plateau` finds from the rounds before this one.
    """
    rate, warmup = step.learning_rate, step.warmup_rounds
    if round < warmup:
        return rate * (round + 1) / (warmup + 1)
    if step.schedule == "constant":
        return rate
    if step.schedule == "plateau":
        return rate * fraction
    progress = min((round - warmup) / max(total_rounds - warmup, 1), 1.0)
    shape = 1.0 - progress if step.schedule == "linear" else _raised_cosine(progress)
    return rate * (step.final_fraction + (1.0 - step.final_fraction) * shape)


def _raised_cosine(t: float) -> float:
    """Return (1 + cos(pi t)) / 2 = cos(pi t / 2)^2 for t in [0, 1] by a Taylor sum in nested form.

    Not `math.cos`: C libraries differ in the last bit, and everybody must get the same step. Twelve terms leave 3e-22.
    """
    half = t * (math.pi / 2)
    square = half * half
    cosine = 1.0
    for term in range(_COSINE_TERMS, 0, -1):
        cosine = 1.0 - square / ((2 * term - 1) * (2 * term)) * cosine
    return cosine * cosine


def step_size(
    step: StepSpec, round: int, scale: float, codes: Codes, total_rounds: int, *, fraction: float = 1.0
) -> float:
    """Return alpha of a sealed round: what the integer sum of codes x signs is multiplied by.

    `sgd`: lr * s / (n + h); `normalized`: lr / ((n + h) * rms(c)), rms from the exact integer sum of squares; n counts
    valid codes, h is the RunSpec's `half_codes`. Zero if no valid code differs from zero; at most 2^64. `fraction` is
    for the plateau schedule: see `learning_rate`. Where both estimators are allowed: `peerturb.mixing`.

    Raises:
        LogError: the scale is outside its bounds.
    """
    check_scale(scale)
    count, squares = valid_squares(codes)
    if squares == 0:
        return f32(0.0)
    rate = learning_rate(step, round, total_rounds, fraction=fraction)
    whole = count + step.half_codes
    alpha = rate * float(scale) / whole if step.rule == "sgd" else rate / (whole * math.sqrt(squares / count))
    return f32(min(alpha, STEP_MAX))


def mean_loss(parts: Iterable[tuple[Codes, float]], *, exact: Collection[int] = (), exact_weight: float = 1.0) -> float:
    """Return the loss of a sealed round in f64, before it is rounded to f32; NaN if nothing counts.

    The mean of the finite losses in the order given, each weighted by the examples behind it: its contribution's valid
    codes, or `exact_weight` for an exact one with any.

    Args:
        parts: codes and loss, an f32 value, of each contribution, in the order of slots.
        exact: which of them are exact, by number.
        exact_weight: examples of an exact contribution over those of a probe.
    """
    total, weights = 0.0, 0.0
    for number, (codes, loss) in enumerate(parts):
        given = _bytes_of(codes)
        valid = len(given) - given.count(_VOID_BYTE)
        weight = min(valid, 1) * exact_weight if number in exact else valid
        if weight and math.isfinite(loss):
            total += loss * weight
            weights += weight
    return total / weights if weights else math.nan


def _bytes_of(codes: Codes) -> bytes:
    return codes if isinstance(codes, bytes) else codes.tobytes()


def valid_squares(codes: Codes) -> tuple[int, int]:
    """Return how many codes are valid, and the exact sum of their squares."""
    given = _bytes_of(codes)
    if len(given) < _MANY:
        counts = Counter(given)
        void = counts.pop(_VOID_BYTE, 0)
        return len(given) - void, sum(count * min(byte, 256 - byte) ** 2 for byte, count in counts.items())
    import numpy as np

    values = np.frombuffer(given, np.int8)
    wide = values[values != VOID].astype(np.int64)
    return len(wide), int(np.dot(wide, wide))


def check_scale(scale: float) -> None:
    """Raise `LogError` for a scale outside of its bounds."""
    if not SCALE_MIN <= scale <= SCALE_MAX:
        raise LogError(f"the scale of a round is {scale!r}; it must lie between 2**-100 and 2**100")
