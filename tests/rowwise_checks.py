"""What corrections of activations must give, whoever makes them: right on odd shapes, rounded once."""

from types import ModuleType

import torch
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 2, 1, 1), (3, 10, 77, 45), (2, 130, 33, 64), (5, 6, 128, 31)]
"""Probes, rows of each, columns, outputs."""
NORMS: list[tuple[float | None, bool, float]] = [(None, True, 0.0), (1e-5, True, 0.0), (2.0, False, 1.0)]
"""Epsilon, whether the mean is subtracted, offset of the scale."""


def signs_of(probes: int, count: int, seed: int) -> Tensor:
    """Signs whose rows lie apart, as those of a page do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (probes, count + 7), generator=generator).mul(2).sub(1).to(torch.int8)


def check_linear(
    rowwise: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int, int], *, has_bias: bool, device: str = "cpu"
) -> None:
    """Compare a corrected linear layer with float64, with a bias and its perturbation or with neither."""
    probes, rows, columns, out = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(probes, rows, columns, generator=generator).to(dtype)
    y = torch.randn(probes, rows, out, generator=generator).to(dtype)
    shift = torch.linspace(-1, 3, out).to(dtype)
    a, b, bias = signs_of(probes, out, 2), signs_of(probes, columns, 3), signs_of(probes, out, 4)
    dots = (x.double() * b[:, None, 3 : columns + 3]).sum(2, keepdim=True)
    added = (0.5 * bias[:, None, 1 : out + 1]) if has_bias else 0
    exact = y.double() + _sides_of(rows) * (0.25 * dots * a[:, None, :out] + added)
    if has_bias:
        exact = exact + shift.double()
    y = y.to(device)
    rowwise.add_linear(
        x.to(device), y, (a.to(device), 0), (b.to(device), 3), step=0.25, sides=2,
        bias=(bias.to(device), 1) if has_bias else None, bias_step=0.5, shift=shift.to(device) if has_bias else None,
    )  # fmt: skip
    assert is_rounded_once(y.cpu(), exact, 1e-5 * columns**0.5)


def check_affine(
    rowwise: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    norm: tuple[float | None, bool, float],
    *,
    device: str = "cpu",
) -> None:
    """Compare scaled and shifted rows, and rows that are neither, with float64."""
    probes, rows, columns, _ = shape
    epsilon, is_centred, offset = norm
    x = (torch.randn(probes, rows, columns, generator=torch.Generator().manual_seed(1)) * 2 + 5).to(dtype)
    scale, shift = (torch.linspace(low, 2, columns).to(dtype) for low in (0.5, -1))
    up, down = signs_of(probes, columns, 2), signs_of(probes, columns, 3)
    wide = x.double()
    if epsilon is not None:
        normalise = nn.functional.layer_norm if is_centred else nn.functional.rms_norm
        wide = normalise(wide, (columns,), eps=epsilon)
    exact = wide * (offset + scale.double() + _sides_of(rows) * 0.125 * up[:, None, 2 : columns + 2])
    exact = exact + shift.double() + _sides_of(rows) * 0.25 * down[:, None, :columns]
    found = rowwise.affine(
        x.to(device), scale.to(device), shift.to(device), sides=2, scale_signs=(up.to(device), 2), scale_step=0.125,
        shift_signs=(down.to(device), 0), shift_step=0.25, epsilon=epsilon, is_centred=is_centred, offset=offset,
    )  # fmt: skip
    assert is_rounded_once(found.cpu(), exact, 1e-5)
    bare = rowwise.affine(
        x.to(device), None, None, sides=2, scale_signs=None, scale_step=0.0, shift_signs=None, shift_step=0.0,
        epsilon=epsilon, is_centred=is_centred, offset=offset,
    )  # fmt: skip
    assert is_rounded_once(bare.cpu(), wide, 1e-5)


def is_rounded_once(found: Tensor, exact: Tensor, accumulated: float) -> bool:
    """Tell whether a result is as near to the exact one as its type allows, f32 sums being a little off."""
    unit = torch.finfo(found.dtype).eps / 2
    return bool(((found.double() - exact).abs() <= unit * exact.abs() * 1.001 + accumulated).all())


def _sides_of(rows: int) -> Tensor:
    sides = torch.ones(rows, 1, dtype=torch.float64)
    sides[rows // 2 :] = -1
    return sides
