"""Loops of `peerturb.zo.compiled` on torch's own threads, each thread its share: the same bits.

In a forward threads of our own would wait for a core while torch's spin, and a single large tensor leaves them idle.
Import it through `peerturb.zo.fast`. Knows addresses and counters, nothing of parameters.
"""

import struct
from functools import lru_cache
from typing import Any, Final

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple
from numpy.typing import NDArray

from peerturb.rng import I8, U64
from peerturb.zo import compiled, crew

_SIGNS_TASK: Final = struct.Struct("11q")
_SUBTRACT_TASK: Final = struct.Struct("3qd")

SHARED_ELEMENTS: Final = 2**17
"""Elements of a subtraction from which on it pays to share them."""

_fill, _subtract = compiled.fill_signs, compiled.subtract_float32

_thread_number, _thread_count = crew.thread_number(), crew.thread_count()


def _pointer_to(kind: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return pointer


@lru_cache(maxsize=1)
def _signs_body() -> Any:
    """Compile one thread's share: a stretch of the rows, which it will read itself, or of the columns of few rows."""
    to_words, to_bytes = _pointer_to(types.uint64), _pointer_to(types.int8)

    def share(pointer: Any) -> None:
        task = numba.carray(pointer, 11)
        eights, rows, columns, blocks, streams, samples, slots, factors, scaled, round, key = to_fixed_tuple(task, 11)
        number, count = _thread_number(), _thread_count()
        top, bottom, left, right = 0, rows, columns * number // count, columns * (number + 1) // count
        if rows >= count:
            top, bottom, left, right = rows * number // count, rows * (number + 1) // count, 0, columns
        if left < right:
            _fill(
                numba.carray(to_words(eights), (rows, 16 * columns)), top, bottom, left, right,
                numba.carray(to_words(blocks), (columns,)), numba.carray(to_words(streams), (columns,)),
                numba.carray(to_words(samples), (rows,)), numba.carray(to_words(slots), (rows,)),
                numba.carray(to_bytes(factors), (rows,)), scaled, round, key,
            )  # fmt: skip

    return numba.cfunc(types.void(types.CPointer(types.int64)))(share)


def fill_signs(
    eights: U64, blocks: U64, streams: U64, samples: U64, slots: U64, factors: I8, scaled: int, round: int, run_key: int
) -> None:
    """Write the linear signs of all probes and counters; see `peerturb.zo.compiled.fill_signs`.

    Args:
        eights: int8[n, 128 * B] seen as uint64[n, 16 * B], contiguous like all others.
        blocks, streams: uint64[B].
        samples, slots: uint64[n].
        factors: int8[n].
    """
    assert all(array.flags.c_contiguous for array in (eights, blocks, streams, samples, slots, factors))
    task = _SIGNS_TASK.pack(
        eights.ctypes.data, len(samples), len(blocks),
        *(array.ctypes.data for array in (blocks, streams, samples, slots, factors)), scaled, round, run_key,
    )  # fmt: skip
    crew.run(_signs_body().address, task)


@lru_cache(maxsize=1)
def _subtract_body() -> Any:
    """Compile one thread's share: a stretch of the elements."""
    to_floats, to_integers = _pointer_to(types.float32), _pointer_to(types.int32)

    def share(pointer: Any) -> None:
        task = numba.carray(pointer, 4)
        weights, total, elements = to_fixed_tuple(task[:3], 3)
        scale: Any = np.float32(task.view(np.float64)[3])
        number, count = _thread_number(), _thread_count()
        first, stop = elements * number // count, elements * (number + 1) // count
        _subtract(
            numba.carray(to_floats(weights + 4 * first), (stop - first,)),
            numba.carray(to_integers(total + 4 * first), (stop - first,)),
            scale,
        )

    return numba.cfunc(types.void(types.CPointer(types.int64)))(share)


def subtract_float32(weights: NDArray[np.float32], total: NDArray[np.int32], scale: float) -> None:
    """W - f32(scale * U), two roundings, in place; see `peerturb.zo.compiled.subtract_float32`."""
    if len(weights) < SHARED_ELEMENTS:
        _subtract(weights, total, scale)
        return
    assert weights.flags.c_contiguous
    assert total.flags.c_contiguous
    task = _SUBTRACT_TASK.pack(weights.ctypes.data, total.ctypes.data, len(weights), scale)
    crew.run(_subtract_body().address, task)
