"""The two roundings that turn an exact integer sum into new weights, f32 or bf16.

It knows one stretch of one tensor; where the sum came from is not its business.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from peerturb import rng
from peerturb.manifest import Parameter
from peerturb.rng import ROUNDING_SLOT, SIDE_ROUNDING, U64
from peerturb.zo import directions, fast, philox
from peerturb.zo.directions import Probes
from peerturb.zo.parallel import in_parallel

_HALVES_PER_BLOCK = 8
_EXPONENT = 0x7F80_0000


def subtract(
    flat: Tensor, first: int, total: Tensor, parameter: Parameter, probes: Probes, alpha: float, chunk: int
) -> None:
    """Subtract f32(alpha * 2**k * U) from elements first.. of a flat tensor, in place.

    Args:
        flat: The whole tensor, one-dimensional, f32 or bf16.
        first: Index of the first element concerned.
        total: U, exact integers below 2**24, any shape, row-major.
        parameter: Gives k and the stream of the rounding noise.
        probes: Gives run key and round.
        alpha: The step size.
        chunk: Number of the chunk of PROBES_PER_UPDATE_MAX probes: the noise counter's sample.
    """
    scale = alpha * 2.0**parameter.exponent
    if _subtract_compiled(flat, first, total, parameter, probes, scale, chunk):
        return
    target = flat[first : first + total.numel()]
    step = difference(total.reshape(-1), scale)
    if flat.dtype == torch.float32:
        target.sub_(step)
        return
    noise = rounding_noise(parameter.index, first, first + len(step), probes.run_key, probes.round, chunk, flat.device)
    target.copy_(stochastic_bfloat16(target.to(torch.float32).sub_(step), noise))


def _subtract_compiled(
    flat: Tensor, first: int, total: Tensor, parameter: Parameter, probes: Probes, scale: float, chunk: int
) -> bool:
    """Do it in one compiled pass, if there is one for this device, this sum and this scale."""
    kernels = fast.kernels(flat.device)
    if kernels is not None and is_float32(scale):
        stream = rng.stream_of(parameter.index, SIDE_ROUNDING)
        kernels.subtract(flat, first, total, scale, stream, chunk, probes.round, probes.run_key)
        return True
    target = flat[first : first + total.numel()]
    loops = fast.compiled() if target.device.type == "cpu" else None
    if loops is None or total.dtype != torch.int32 or not total.is_contiguous() or not is_float32(scale):
        return False
    sums = total.reshape(-1).numpy()
    if target.dtype == torch.float32:
        (fast.crew_loops() or loops).subtract_float32(target.numpy(), sums, scale)
    else:
        stream = rng.stream_of(parameter.index, SIDE_ROUNDING)
        bits = target.view(torch.uint16).numpy()
        loops.subtract_bfloat16(bits, first, sums, scale, stream, chunk, probes.round, probes.run_key)
    return True


def difference(total: Tensor, scale: float) -> Tensor:
    """Return f32(scale * U), rounded once.

    `scale` = alpha * 2**k is exact in f64 (24 significant bits, exponent far inside the range). If it is an f32 too,
    the f32 product of two exact operands is one correct rounding. If it is not (cut among the subnormals), 24 + 24
    bits fit into f64, so the f64 product is exact and the conversion is the only rounding.
    """
    if is_float32(scale):
        return total.to(torch.float32).mul_(scale)
    return total.to(torch.float64).mul_(scale).to(torch.float32)


@lru_cache(maxsize=256)
def is_float32(value: float) -> bool:
    """Tell whether f32 holds the value exactly."""
    with np.errstate(over="ignore"):
        return float(np.float32(value)) == value


def stochastic_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Round f32 values to bf16: add 16 bits of noise to the bit pattern, keep the upper half.

    Args:
        values: f32[n]; overwritten.
        noise: int32[n], 0..65535. Not added to infinities, which it would turn into NaN.
    """
    bits = values.view(torch.int32)
    least, most = torch.aminmax(values)
    if not torch.isfinite(least) or not torch.isfinite(most):
        noise = noise.masked_fill((bits & _EXPONENT) == _EXPONENT, 0)
    # Little endian: the upper half of each word is every second half.
    return bits.add_(noise).view(torch.bfloat16)[1::2]


def rounding_noise(
    tensor: int, start: int, stop: int, run_key: int, round: int, chunk: int, device: torch.device
) -> Tensor:
    """Return the noise of elements start..stop of a tensor: int32[stop - start], 0..65535.

    Element e takes half e mod 2 (low first) of word (e mod 8) div 2 of block e div 8.
    """
    blocks = np.arange(start // _HALVES_PER_BLOCK, -(-stop // _HALVES_PER_BLOCK), dtype=np.uint64)
    streams = np.full(len(blocks), rng.stream_of(tensor, SIDE_ROUNDING), np.uint64)
    probes = Probes.of(run_key=run_key, round=round, slots=ROUNDING_SLOT, samples=chunk)
    words = (
        _words_on_cpu(blocks, streams, probes)
        if directions.uses_numpy(device)
        else _words(blocks, streams, probes, device)
    )
    halves = words.view(torch.uint16).reshape(-1)
    skip = start % _HALVES_PER_BLOCK
    return halves[skip : skip + stop - start].to(torch.int32)


def _words(blocks: U64, streams: U64, probes: Probes, device: torch.device) -> Tensor:
    columns = directions.to_device(blocks, streams, probes.samples, probes.slots, device=device)
    return philox.grid_words(*columns, round=probes.round, run_key=probes.run_key)


def _words_on_cpu(blocks: U64, streams: U64, probes: Probes) -> Tensor:
    out = np.empty((1, len(blocks), 4), np.uint32)

    def fill(tile: rng.Tile) -> None:
        top, bottom, left, right = tile
        out[top:bottom, left:right] = rng.grid_words(
            blocks[left:right], streams[left:right], probes.samples, probes.slots,
            round=probes.round, run_key=probes.run_key, workspace=directions.workspace(),
        )  # fmt: skip

    in_parallel(fill, list(rng.tiles(1, len(blocks))))
    return torch.from_numpy(out.view(np.int32))
