"""Whether compiled loops and CUDA kernels are there: the one place that knows Numba and Triton are optional."""

import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
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


def rowwise(device: torch.device) -> ModuleType | None:
    """Return what corrects activations on a device in one pass: `peerturb.zo.rowwise` or `peerturb.zo.cuda.rowwise`.

    None where torch's own operations must: Numba is not installed or cannot use torch's threads, or see `kernels`.
    """
    if device.type == "cuda":
        return None if kernels(device) is None else _cuda_rowwise()
    return _cpu_rowwise() if _has_crew() else None


@lru_cache(maxsize=1)
def _cpu_rowwise() -> ModuleType:
    from peerturb.zo import rowwise

    return rowwise


@lru_cache(maxsize=1)
def _cuda_rowwise() -> ModuleType:
    from peerturb.zo.cuda import rowwise

    return rowwise


def crew_loops() -> ModuleType | None:
    """Return `peerturb.zo.crew_loops`, or None as above, and where torch has one thread: there is nothing to share."""
    if torch.get_num_threads() == 1 or not _has_crew():
        return None
    from peerturb.zo import crew_loops

    return crew_loops


@lru_cache(maxsize=1)
def _has_crew() -> bool:
    from peerturb.zo import crew

    return compiled() is not None and crew.is_usable()


def kernels(device: torch.device) -> ModuleType | None:
    """Return `peerturb.zo.cuda.launch` for a CUDA device on which Triton's kernels give the right bits, else None.

    The first call for a device compiles kernels, or loads Triton's cache, and tries each one.
    """
    return _kernels(device) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from peerturb.zo.cuda import check, launch

    try:
        wrong = check.wrong_kernel(device)
    # A card too old, no C compiler, a driver without the instructions: whatever is wrong, torch makes the same bits.
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong is None:
        return launch
    warnings.warn(
        f"Triton's kernels do not work on {device}, so updates and noise take torch's slower way, with the same result"
        f" ({wrong}); a C compiler and a card of compute capability 8.0 or newer are needed",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def settled(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Return the array as compiled signatures want it: a slice has strides, a broadcast one cannot be written."""
    return np.require(array, requirements=["C", "W"])
