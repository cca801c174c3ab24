"""Whether the compiled loops are there: the one place that knows Numba is optional."""

from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound="np.generic[Any]")


@lru_cache(maxsize=1)
def compiled() -> ModuleType | None:
    """Return `peerturb.zo.compiled`, or None where Numba is not installed. The first call compiles or loads a cache."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    from peerturb.zo import compiled

    return compiled


def settled(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Return the array as compiled signatures want it: a slice has strides, a broadcast one cannot be written."""
    return np.require(array, requirements=["C", "W"])
