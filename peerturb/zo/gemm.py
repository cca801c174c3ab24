"""Exact integer matrix products of codes and signs, by the quickest arithmetic a device offers.

It knows two int8 operands and returns their product as exact integers. Every partial sum of at most
`PROBES_PER_UPDATE_MAX` terms stays below 2**24, so f32 (and TF32, and bf16 with f32 sums) is exact where int8 is
missing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from peerturb.limits import PROBES_PER_UPDATE_MAX

_CUDA_MULTIPLE = 8
"""Inner and right extents a CUDA int8 product must be a multiple of."""
_CUDA_ROWS_MIN = 17
"""CUDA refuses int8 products with fewer rows."""


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Return leftT @ right for int8[n, rows] and int8[n, columns]: exact integers [rows, columns], in int32 or f32.

    n is at most PROBES_PER_UPDATE_MAX, one operand holds codes (+-127), the other signs or bits.
    """
    assert left.shape[0] <= PROBES_PER_UPDATE_MAX
    if has_int8(left.device):
        return int8_product(left, right)
    return float_product(left, right)


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The same as an f32 product: every sum of a subset of the terms is below 2**24, so no order of addition rounds."""
    return left.t().to(torch.float32) @ right.to(torch.float32)


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """The same as an int8 product."""
    if left.device.type == "cpu":
        return torch._int_mm(_settled(left.t()), _settled(right))
    return padded_product(left, right)


def padded_product(left: Tensor, right: Tensor) -> Tensor:
    """The int8 product as CUDA takes it."""
    rows, columns = left.shape[1], right.shape[1]
    # cuBLASLt takes int8 with both operands contiguous along the summed dimension and padded extents.
    wide = _padded(left.t(), max(rows, _CUDA_ROWS_MIN))
    high = _padded(right.t(), -(-columns // _CUDA_MULTIPLE) * _CUDA_MULTIPLE)
    product: Tensor = torch._int_mm(wide, high.t())
    return product[:rows, :columns]


def _settled(operand: Tensor) -> Tensor:
    """Give an operand with an extent of 1 the strides of a fresh tensor.

    torch's CPU kernel takes the leading dimension from the stride of that extent, which means nothing, and then leaves
    the result unwritten (seen with [1, k] transposed from [k, 1] in torch 2.13).
    """
    if 1 not in operand.shape:
        return operand
    fresh = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
    return fresh.copy_(operand)


def _padded(operand: Tensor, rows: int) -> Tensor:
    """Copy [r, n] into a contiguous [rows, n padded to a multiple of 8], zeros around it."""
    depth = -(-operand.shape[1] // _CUDA_MULTIPLE) * _CUDA_MULTIPLE
    if operand.shape == (rows, depth):
        return operand.contiguous()
    padded = torch.zeros((rows, depth), dtype=operand.dtype, device=operand.device)
    padded[: operand.shape[0], : operand.shape[1]] = operand
    return padded


@lru_cache(maxsize=64)
def has_int8(device: torch.device) -> bool:
    """Tell whether the device offers exact int8 products (some old CPUs add pairs in saturating 16 bits)."""
    left = torch.full((64, 48), 127, dtype=torch.int8, device=device)
    left[:, ::2] = -127
    right = torch.ones((64, 24), dtype=torch.int8, device=device)
    right[:, ::3] = -1
    try:
        product = int8_product(left, right)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product.to(torch.float32), float_product(left, right))
