"""Whether the compiled loops are there: the one place that knows Numba is optional."""

from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def compiled() -> ModuleType | None:
    """Return `peerturb.zo.compiled`, or None where Numba is not installed. The first call compiles or loads a cache."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    from peerturb.zo import compiled

    return compiled
