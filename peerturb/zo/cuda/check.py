"""Try the kernels on a device before they are trusted: each against the CPU, where a wrong rounding would show."""

import numpy as np
import torch
from torch import Tensor

from peerturb import rng
from peerturb.manifest import DType, Parameter
from peerturb.rng import SIDE_DENSE, SIDE_LEFT, SIDE_ROUNDING
from peerturb.zo import digest
from peerturb.zo.cuda import launch, rowwise
from peerturb.zo.directions import Probes, Span, SpanTable, dense_signs, left_signs, right_signs
from peerturb.zo.rounding import subtract

CPU = torch.device("cpu")
SHAPES = ((67, 72), (65, 67))
"""One whose rows begin at whole blocks of noise, one whose rows do not; both end inside tiles and groups."""
ALPHA = float(np.float32(1.7e-3))


def wrong_kernel(device: torch.device) -> str | None:
    """Return the name of a kernel whose result differs from the CPU's, or None. It may raise whatever Triton raises."""
    codes = np.array([-127, 5, 0, 127, 33], np.int8)
    probes = Probes.of(run_key=0xFEDC_BA98, round=0xFFFF_FFFF, slots=[0, 3, 7, 0xFFFF_FFFE, 9], samples=[1, 0, 3, 9, 7])
    table = launch.ProbeTable.of(
        probes.samples, probes.slots, codes, round=probes.round, run_key=probes.run_key, device=device
    )
    spans = SpanTable([Span(stream=rng.stream_of(0x3FFF_FFF0, SIDE_LEFT), start=5, stop=300)])
    signs = torch.empty((spans.width, table.height), dtype=torch.int8, device=device).t()
    spans.fill(launch, signs, table, spans.width)
    if not torch.equal(
        signs.cpu(), spans.scaled_signs(probes, CPU, rows=table.height, factors=codes, columns=spans.width)
    ):
        return "fill_signs"
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    for number, (dtype, shape) in enumerate((dtype, shape) for dtype in dtypes for shape in SHAPES):
        parameter = Parameter(index=number, name="trial", shape=shape, dtype=dtype)
        weights = torch.randn(parameter.elements, generator=torch.Generator().manual_seed(number))
        wrong = _wrong_update(parameter, weights.to(getattr(torch, dtype)), probes, table, codes, device)
        if wrong is not None:
            return wrong
    return _wrong_pass(device)


def _wrong_pass(device: torch.device) -> str | None:
    """Try what changes activations, whose last bits are free: 2 probes of 2 sides, 3 rows each."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn((2, 6, width), generator=generator) for width in (40, 72))
    a, b = (torch.randint(0, 2, (2, width), generator=generator, dtype=torch.int8) * 2 - 1 for width in (72, 40))
    sides = torch.tensor([1.0] * 3 + [-1.0] * 3).view(1, 6, 1)
    expected = y + sides * 0.25 * ((x * b[:, None]).sum(2, keepdim=True) * a[:, None])
    found = y.to(device)
    on_device = [(signs.to(device), 0) for signs in (a, b)]
    rowwise.add_linear(x.to(device), found, *on_device, step=0.25, sides=2, bias=None, bias_step=0.0)
    if not torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4):
        return "add_linear"
    expected = torch.nn.functional.layer_norm(x, (40,), eps=1e-5) * (1 + sides * 0.25 * b[:, None])
    found = rowwise.affine(
        x.to(device), None, None, sides=2, scale_signs=on_device[1], scale_step=0.25, shift_signs=None, shift_step=0.0,
        epsilon=1e-5,
    )  # fmt: skip
    return None if torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4) else "affine"


def _wrong_update(
    parameter: Parameter, weights: Tensor, probes: Probes, table: launch.ProbeTable, codes: rng.I8, device: torch.device
) -> str | None:
    noise, factors = rng.stream_of(parameter.index, SIDE_ROUNDING), torch.from_numpy(codes)[:, None]
    found = weights.to(device)
    words = found.view(torch.uint32 if parameter.dtype == "float32" else torch.uint16)
    sums = torch.zeros(1, dtype=torch.int64, device=device)
    launch.digest_sum(words, sums)
    if sums.item() % 2**64 != digest.tensor_digest(weights):
        return "digest_sum"

    dense = dense_signs(parameter, probes)
    groups = -(-parameter.elements // rng.GROUP_SIGNS)
    stream = rng.stream_of(parameter.index, SIDE_DENSE)
    if not torch.equal(launch.dense_signs(0, groups, table, stream)[:, : parameter.elements].cpu(), dense):
        return "dense_signs"
    total = (factors.to(torch.int32) * dense).sum(0, dtype=torch.int32)
    expected = weights.clone()
    subtract(expected, 0, total, parameter, probes, ALPHA, 1)
    launch.dense_update(found, table, ALPHA, stream, noise, 1)
    if not _is_same(found, expected):
        return "dense_update"

    left, right = left_signs(parameter, probes) * factors, right_signs(parameter, probes)
    total = left.t().to(torch.int32) @ right.to(torch.int32)
    subtract(expected, 0, total, parameter, probes, ALPHA, 1)
    padding = (0, 0, 0, table.height - len(table))
    left, right = (torch.nn.functional.pad(side, padding).t().contiguous().to(device) for side in (left, right))
    launch.rank1_update(found, 0, left, right, table, ALPHA, noise, 1)
    if not _is_same(found, expected):
        return "rank1_update"

    part = total.reshape(-1)[13:700].contiguous()
    subtract(expected, 13, part, parameter, probes, ALPHA, 2)
    launch.subtract(found, 13, part.to(device), ALPHA, noise, 2, probes.round, probes.run_key)
    return None if _is_same(found, expected) else "subtract"


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))
