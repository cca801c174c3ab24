"""Projected gradient <-> byte. The scale and the step that follow from bytes: `peerturb.stepping`.

Everything is computed in f64 by basic IEEE operations in the written order, so that every machine gets the same bits.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peerturb import rng
from peerturb.stepping import CODE_MAX, VOID, check_scale

Codes = bytes | NDArray[np.int8]


def encode(
    projected: ArrayLike, scale: float, *, rounding: Literal["nearest", "stochastic"] = "nearest",
    noise: NDArray[np.uint32] | None = None,
) -> NDArray[np.int8]:  # fmt: skip
    """Return the codes of projected gradients: round(g / scale) clipped to +-127, VOID where g is not finite.

    Args:
        projected: f32 or f64 [n].
        scale: The round's scale s.
        rounding: `nearest` (ties to even) or `stochastic` (floor(g / s + noise / 2**32)).
        noise: One word a probe, from `rounding_noise`; for `stochastic` only.

    Raises:
        LogError: the scale is outside its bounds.
    """
    check_scale(scale)
    values = np.asarray(projected, np.float64)
    is_finite = np.isfinite(values)
    # Beyond +-128 nothing can change the code, and clipping first keeps the quotient from overflowing.
    reach = scale * (CODE_MAX + 1)
    quotient = np.clip(np.where(is_finite, values, 0.0), -reach, reach) / scale
    if rounding == "stochastic":
        if noise is None:
            raise ValueError("stochastic rounding needs noise: peerturb.codec.rounding_noise makes it")
        rounded = np.floor(quotient + noise.astype(np.float64) * 2.0**-32)
    else:
        rounded = np.rint(quotient)
    codes = np.clip(rounded, -CODE_MAX, CODE_MAX).astype(np.int8)
    codes[~is_finite] = VOID
    return codes


def rounding_noise(*, run_key: int, slot: int, round: int, samples: ArrayLike) -> NDArray[np.uint32]:
    """Return one word for each sample: word 0 of block 0 of stream ffffffff. Local to the sender, repeatable."""
    return rng.philox(0, rng.CODE_STREAM, samples, round, key=(run_key, slot))[..., 0]


def decode(codes: Codes) -> NDArray[np.int8]:
    """Return the codes as int8 [n], void ones as zero: the factors c of the update."""
    values = np.frombuffer(codes, np.int8) if isinstance(codes, bytes) else np.asarray(codes, np.int8)
    return np.where(values == VOID, np.int8(0), values)
