"""What a `rank1` perturbation does to activations on a CUDA device: launches of `peerturb.zo.cuda.rowwise_kernels`.

The counterpart of `peerturb.zo.rowwise`, with the same functions; import it through `peerturb.zo.fast`. Activations
are not shared between peers, so their last bits may differ from the CPU's.
"""

from typing import Any, Final

import torch
from torch import Tensor

from peerturb.zo.cuda import rowwise_kernels as kernels

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
LINEAR_TILES: Final = ((2_048, (4, 1_024, 4)), (0, (2, 512, 2)))
"""Fewest columns -> rows, columns and warps of a product's correction, the fastest of twelve on an H200 (docs/LOG.md):
16 or 32 values a thread on their way at once; more rows of short ones only wait for each other."""
AFFINE_ELEMENTS = 4096
"""Elements of a norm's program, at least one row."""
COLUMNS_MAX = 65_536
"""Longest row that a norm's program holds in registers: 64 values for each of 1 024 threads."""

SignRows = tuple[Tensor, int]
"""int8[probes, width], each row without gaps, and the first column that counts."""


def takes(x: Tensor, y: Tensor | None = None) -> bool:
    """Tell whether this module can work on activations: one type that it knows, on a CUDA device, without gaps."""
    if not x.is_cuda or x.dtype not in DTYPES or not x.is_contiguous() or x.shape[-1] > COLUMNS_MAX:
        return False
    return y is None or (y.dtype == x.dtype and y.is_contiguous())


def add_linear(
    x: Tensor, y: Tensor, a: SignRows, b: SignRows, *, step: float, sides: int,
    bias: SignRows | None, bias_step: float, shift: Tensor | None = None,
) -> None:  # fmt: skip
    """Do what `peerturb.zo.rowwise.add_linear` does, for tensors on one CUDA device."""
    probes, rows, columns = x.shape
    out, per_side = y.shape[2], rows // sides
    if x.numel() == 0 or out == 0:
        return
    height, width, warps = next(tile for least, tile in LINEAR_TILES if min(columns, out) >= least)
    (left, left_next), (right, right_next) = _signs(a), _signs(b)
    added, added_next = (left, 0) if bias is None else _signs(bias)
    _launch(
        kernels.add_linear, (-(-per_side // height), probes * sides), x, y, left, right, added,
        x if shift is None else shift, rows, per_side, sides, columns, out, left_next, right_next, added_next, step,
        bias_step, HAS_BIAS=bias is not None, HAS_SHIFT=shift is not None, ROWS=height, COLUMNS=width,
        num_warps=warps,
    )  # fmt: skip


def affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, *, sides: int,
    scale_signs: SignRows | None, scale_step: float, shift_signs: SignRows | None, shift_step: float,
    epsilon: float | None = None, is_centred: bool = True, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return what `peerturb.zo.rowwise.affine` returns, for tensors on one CUDA device."""
    probes, rows, columns = x.shape
    per_side, y = rows // sides, torch.empty_like(x)
    if x.numel() == 0:
        return y
    width = 1 << (columns - 1).bit_length()
    height = max(1, AFFINE_ELEMENTS // width)
    scaling, scaling_next = (x, 0) if scale_signs is None else _signs(scale_signs)
    shifting, shifting_next = (x, 0) if shift_signs is None else _signs(shift_signs)
    _launch(
        kernels.affine, (-(-per_side // height), probes * sides), x, y, x if scale is None else scale,
        x if shift is None else shift, scaling, shifting, rows, per_side, sides, columns, scaling_next, shifting_next,
        1.0 if scale is None else offset, scale_step, shift_step, epsilon or 0.0, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, HAS_SCALE_SIGNS=scale_signs is not None,
        HAS_SHIFT_SIGNS=shift_signs is not None, IS_NORMALISED=epsilon is not None, IS_CENTRED=is_centred,
        ROWS=height, COLUMNS=width, num_warps=min(max(4, width // 1024), 32),
    )  # fmt: skip
    return y


def _signs(signs: SignRows) -> tuple[Tensor, int]:
    """Return signs from their first column on, and how far the next row is."""
    rows, first = signs
    following, inner = rows.stride()
    assert rows.dtype == torch.int8
    assert inner == 1
    return (rows[:, first:] if first else rows), following


def _launch(kernel: Any, grid: tuple[int, int], first: Tensor, *arguments: object, **options: object) -> None:
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **options)
