"""Single-precision values as Python floats: what stands in a record survives the wire unchanged."""

import math
import struct

_F32 = struct.Struct("<f")


def f32(value: float) -> float:
    """Round to the nearest f32, beyond its range to infinity. NaN becomes `math.nan`: equal records compare equal."""
    if math.isnan(value):
        return math.nan
    try:
        rounded: float = _F32.unpack(_F32.pack(value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def is_f32(value: float) -> bool:
    """Tell whether the value is finite and exactly a single-precision number."""
    return math.isfinite(value) and f32(value) == value
