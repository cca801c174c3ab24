"""What a `rank1` perturbation does to activations on a CPU, by Numba: each activation is read and written once.

Optional (`peerturb[fast]`); import it through `peerturb.zo.fast`. torch needs several passes for the same, and those
in half precision are slow ones. Sums are f32, rounded to the type of the activations once; a row's result does not
depend on the number of threads. Knows addresses, signs and steps, nothing of models.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import types
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from peerturb.zo import crew
from peerturb.zo.vectors import FEATURES, SIZES, add_of, affine_of, dot_of, factor_kind, power_sum_of, row_of

KINDS: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Types of activations."""
TILE_ROWS: Final = 64
"""Rows that share one conversion of their factors to f32; few enough that every thread has several tiles."""
_TASK: Final = struct.Struct("16q4d")
"""What its readers unpack below: int64 numbers and addresses, then float64 numbers. 0: there is no such row.
`..._next`: how many bytes further the next probe's row lies."""
_WHOLE, _ALL = 16, 20
"""Numbers of a task: those that are int64, and all."""

_thread_number, _thread_count = crew.thread_number(), crew.thread_count()


@numba.njit
def _share(tiles: int) -> tuple[int, int]:
    """Return the first tile of this thread and the first of the next.

    Each has a stretch, as in torch's own operations: what a core has just written is still in its cache.
    """
    number, count = _thread_number(), _thread_count()
    return tiles * number // count, tiles * (number + 1) // count


def _linear_of(kind: str) -> Callable[[Any], None]:
    row, sign_row, dot = row_of(kind), row_of(kind, made=factor_kind(kind)), dot_of(kind)
    add, add_shifted = add_of(kind, is_shifted=False), add_of(kind, is_shifted=True)
    size = SIZES[kind]

    def linear(pointer: Any) -> None:
        task = numba.carray(pointer, _ALL)
        tiles, parts, rows, per_side, x, y, columns, out = to_fixed_tuple(task[:8], 8)
        a, a_next, b, b_next, c, c_next, shift, _ = to_fixed_tuple(task[8:_WHOLE], 8)
        step, c_step, _, _ = to_fixed_tuple(task.view(np.float64)[_WHOLE:], 4)
        scratch = np.empty(columns + 2 * out, np.float32)
        b_row = np.int64(scratch.ctypes.data)
        a_row, c_row = b_row + 4 * columns, b_row + 4 * (columns + out)
        zero, one = np.float32(0), np.float32(1)
        for tile in range(*_share(tiles)):
            probe, part = divmod(tile, parts)
            sign_row(b_row, 0, zero, b + probe * b_next, one, columns)
            row(a_row, 0, zero, a + probe * a_next, one, out)
            last = 0.0
            for number in range(part * TILE_ROWS, min((part + 1) * TILE_ROWS, rows)):
                sign = 1.0 if number < per_side else -1.0
                if sign != last and (c or shift):
                    last = sign
                    signs = c + probe * c_next if c else 0
                    row(c_row, shift, zero, signs, np.float32(sign * c_step), out)
                at = probe * rows + number
                d = dot(x + at * columns * size, b_row, columns) * np.float32(sign * step)
                if c or shift:
                    add_shifted(y + at * out * size, a_row, d, c_row, out)
                else:
                    add(y + at * out * size, a_row, d, c_row, out)
        scratch[0] = 0  # its addresses alone would not keep it until here

    return linear


def _affine_rows_of(kind: str) -> Callable[[Any], None]:
    row, affine = row_of(kind), affine_of(kind)
    total, squares = power_sum_of(kind, 1), power_sum_of(kind, 2)
    size = SIZES[kind]

    def affine_rows(pointer: Any) -> None:
        task = numba.carray(pointer, _ALL)
        tiles, parts, rows, per_side, x, y, columns, is_normalised = to_fixed_tuple(task[:8], 8)
        a, a_next, is_centred, _, c, c_next, scale, shift = to_fixed_tuple(task[8:_WHOLE], 8)
        step, c_step, plain, epsilon = to_fixed_tuple(task.view(np.float64)[_WHOLE:], 4)
        scratch = np.empty(2 * columns, np.float32)
        a_row = np.int64(scratch.ctypes.data)
        c_row = a_row + 4 * columns
        for tile in range(*_share(tiles)):
            probe, part = divmod(tile, parts)
            last = 0.0
            for number in range(part * TILE_ROWS, min((part + 1) * TILE_ROWS, rows)):
                sign = 1.0 if number < per_side else -1.0
                if sign != last:
                    last = sign
                    row(a_row, scale, np.float32(plain), a + probe * a_next, np.float32(sign * step), columns)
                    row(c_row, shift, np.float32(0), c + probe * c_next, np.float32(sign * c_step), columns)
                at = (probe * rows + number) * columns * size
                r, m = np.float32(1), np.float32(0)
                if is_normalised:
                    mean = np.float32(0)
                    if is_centred:
                        mean = total(x + at, np.float32(0), columns) / np.float32(columns)
                    variance = squares(x + at, mean, columns) / np.float32(columns)
                    r = np.float32(1 / np.sqrt(variance + epsilon))
                    m = -mean * r
                affine(y + at, x + at, r, m, a_row, c_row, columns)
        scratch[0] = 0  # its addresses alone would not keep it until here

    return affine_rows


@lru_cache(maxsize=32)
def _body(make: Callable[[str], Callable[[Any], None]], dtype: torch.dtype) -> int:
    """Compile one thread's share; return its address."""
    compiled = numba.cfunc(types.void(types.CPointer(types.int64)))(make(KINDS[dtype]))
    _kept.append(compiled)
    return int(compiled.address)


_kept: list[Any] = []
"""Machine code lives as long as its object."""

SignRows = tuple[Tensor, int]
"""int8[probes, width], each row without gaps, and the first column that counts: cutting it out would take longer."""


def takes(x: Tensor, y: Tensor | None = None) -> bool:
    """Tell whether this module can work on activations: one type that it knows, on a CPU, without gaps."""
    if x.dtype not in KINDS or not x.is_cpu or not x.is_contiguous():
        return False
    if y is not None and (y.dtype != x.dtype or not y.is_contiguous()):  # under autocast a product has another type
        return False
    return x.dtype != torch.float16 or bool(FEATURES.get("f16c"))


def _signs(signs: SignRows | None) -> tuple[int, int]:
    """Return where the first row begins and how far the next one is."""
    if signs is None:
        return 0, 0
    rows, first = signs
    following, inner = rows.stride()
    assert rows.dtype == torch.int8
    assert inner == 1
    return rows.data_ptr() + first, following


def add_linear(
    x: Tensor, y: Tensor, a: SignRows, b: SignRows, *, step: float, sides: int,
    bias: SignRows | None, bias_step: float, shift: Tensor | None = None,
) -> None:  # fmt: skip
    """y += s * step * (x . b) * a + s * bias_step * bias + shift, in place; s is 1 on the first side, -1 on the second.

    Args:
        x: [probes, rows, columns], contiguous; a probe's rows lie side by side, side after side.
        y: [probes, rows, out] of the same type, contiguous.
        a: signs [probes, out].
        b: signs [probes, columns].
        bias: signs [probes, out], or None.
        shift: [out] of the same type, contiguous, or None.
    """
    probes, rows, columns = x.shape
    parts = -(-rows // TILE_ROWS)
    task = _TASK.pack(
        probes * parts, parts, rows, rows // sides, x.data_ptr(), y.data_ptr(), columns, y.shape[2],
        *_signs(a), *_signs(b), *_signs(bias), 0 if shift is None else shift.data_ptr(), 0, step, bias_step, 0.0, 0.0,
    )  # fmt: skip
    crew.run(_body(_linear_of, x.dtype), task)


def affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, *, sides: int,
    scale_signs: SignRows | None, scale_step: float, shift_signs: SignRows | None, shift_step: float,
    epsilon: float | None = None, is_centred: bool = True, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return x * (offset + scale + s * scale_step * scale_signs) + (shift + s * shift_step * shift_signs); s as above.

    If there is an epsilon for the variance, each row of x is normalised before: to mean 0 and variance 1, or not
    centred to a mean square of 1.

    Args:
        x: [probes, rows, columns], contiguous; a probe's rows lie side by side, side after side.
        scale, shift: [columns] of the same type, contiguous, or None: 1 (without the offset) and 0.
        scale_signs, shift_signs: signs [probes, columns], or None: not perturbed.
    """
    probes, rows, columns = x.shape
    parts = -(-rows // TILE_ROWS)
    y = torch.empty_like(x)
    task = _TASK.pack(
        probes * parts, parts, rows, rows // sides, x.data_ptr(), y.data_ptr(), columns, epsilon is not None,
        *_signs(scale_signs), is_centred, 0, *_signs(shift_signs),
        0 if scale is None else scale.data_ptr(), 0 if shift is None else shift.data_ptr(), scale_step, shift_step,
        1.0 if scale is None else offset, epsilon or 0.0,
    )  # fmt: skip
    crew.run(_body(_affine_rows_of, x.dtype), task)
    return y
