"""From tensors to kernel launches: grids, block sizes, counters as words. It knows no manifest and no rounds of a run.

Every tensor of a call is on one device, which need not be the current one. Multiplications and subtractions are never
fused (`enable_fp_fusion`): the update rounds twice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerturb.rng import GROUP_BLOCKS, GROUP_SIGNS, I8, SIGNS_PER_BLOCK, U64
from peerturb.zo.cuda import kernels

DENSE_BLOCKS = 128
"""Counters of a dense program: one for each of four warps' lanes, whose 4 words x 32 planes need 64 packed sums in
registers; 128 of them are four groups of 4096 elements, and a warp's stores are whole rows of 32 neighbours."""
DENSE_WARPS = DENSE_BLOCKS // 32
SHORT_PROBES = 256
"""Probes whose packed sums need no second set of registers (kernels._FLUSH)."""
TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 64, 128, 8
"""Tile of a fused `rank1` product: 32 sums a thread leave registers for offsets and noise (twice as many spill, by the
compiler's report for sm_90); neighbouring tiles find their signs in the second-level cache."""
TILE_DEPTH = 32
"""Probes of one step of the product, the least int8 units take."""
TILE_DEPTH_MAX = 2**15
"""Probes of which 127 each sum up to less than 2**22 (kernels._float_of)."""
SIGN_PROBES, SIGN_BLOCKS = 32, 2
"""Probes and counters of a program that writes signs: 32 neighbouring bytes in either order of the output."""
FLAT_ELEMENTS = 2048
"""Elements of a program that subtracts given sums: 16 a thread, whose noise takes two counters."""
VECTOR_ELEMENTS = 64
"""Elements of a vector's program: 16 sums a thread on their way."""
DIGEST_ELEMENTS, DIGEST_STEPS = 1024, 16
"""Elements of one step of a digest's program, and steps: one atomic addition for 16 Ki elements."""
_GRID_SECOND_MAX = 65_535
"""Programs along a grid's second axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTable:
    """Probes as kernels read them."""

    samples: Tensor
    """int32[n], the bits of words."""
    slots: Tensor
    codes: Tensor
    """int32[n], -127..127."""
    total: int
    """The codes' sum."""
    round: int
    run_key: int

    @classmethod
    def of(cls, samples: U64, slots: U64, codes: I8, *, round: int, run_key: int, device: torch.device) -> "ProbeTable":
        """Move probes to a device."""
        return cls(
            samples=words_on(samples, device), slots=words_on(slots, device),
            codes=torch.from_numpy(codes.astype(np.int32)).to(device), total=int(codes.astype(np.int64).sum()),
            round=_signed(round), run_key=_signed(run_key),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def height(self) -> int:
        """Their number, padded to what `rank1_update` multiplies at a time."""
        return _count(len(self), TILE_DEPTH) * TILE_DEPTH


def words_on(words: U64, device: torch.device) -> Tensor:
    """Move 32-bit words to a device: int32."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(device)


def fill_signs(out: Tensor, blocks: Tensor, streams: Tensor, probes: ProbeTable, scaled: int) -> None:
    """Write the linear signs of every probe (row) and counter (128 columns), the first `scaled` blocks times the code.

    Args:
        out: int8[height, 128 * B], any strides; rows beyond the probes become zero.
        blocks, streams: int32[B], words.
        probes: n of them, at most `height`.
        scaled: Number of blocks whose signs are multiplied.
    """
    height, width = out.shape
    assert width == SIGNS_PER_BLOCK * len(blocks)
    if out.numel() == 0:
        return
    grid = (_count(len(blocks), SIGN_BLOCKS), _count(height, SIGN_PROBES))
    _launch(
        kernels.fill_signs, grid, out, *out.stride(), height, blocks, streams, len(blocks), probes.samples,
        probes.slots, probes.codes, scaled, len(probes), probes.round, probes.run_key,
        PROBES=SIGN_PROBES, BLOCKS=SIGN_BLOCKS,
    )  # fmt: skip


def dense_signs(first_group: int, groups: int, probes: ProbeTable, stream: int) -> Tensor:
    """Return the planar signs of whole groups: int8[n, 4096 * groups] of +1 and -1."""
    out = torch.empty((len(probes), groups * GROUP_SIGNS), dtype=torch.int8, device=probes.samples.device)
    for start in range(0, len(probes), _GRID_SECOND_MAX):
        part = out[start : start + _GRID_SECOND_MAX]
        if part.numel():
            _launch(
                kernels.fill_dense, (_count(groups * GROUP_BLOCKS, DENSE_BLOCKS), len(part)), part, part.shape[1],
                _signed(first_group), groups, probes.samples[start:], probes.slots[start:], _signed(stream),
                probes.round, probes.run_key, BLOCKS=DENSE_BLOCKS, num_warps=DENSE_WARPS,
            )  # fmt: skip
    return out


def dense_update(flat: Tensor, probes: ProbeTable, scale: float, stream: int, noise_stream: int, chunk: int) -> None:
    """Subtract f32(scale * U), U = sum of c * z over all probes, from a whole tensor in planar layout, in place.

    Args:
        flat: f32 or bf16, one-dimensional, contiguous.
        probes: At most PROBES_PER_UPDATE_MAX.
        scale: alpha * 2**k, an f32 value.
        stream: The tensor's dense stream.
        noise_stream: Its stream of rounding noise.
        chunk: Number of the chunk of probes.
    """
    if flat.numel() == 0:
        return
    _launch(
        kernels.dense_update, (_count(flat.numel(), DENSE_BLOCKS * SIGNS_PER_BLOCK),), _bits(flat), flat.numel(),
        probes.samples, probes.slots, probes.codes, len(probes), probes.total, scale, _signed(stream),
        _signed(noise_stream), _signed(chunk), probes.round, probes.run_key, IS_SHORT=len(probes) <= SHORT_PROBES,
        IS_BFLOAT16=_is_bfloat16(flat), BLOCKS=DENSE_BLOCKS, num_warps=DENSE_WARPS,
    )  # fmt: skip


def rank1_update(
    flat: Tensor, first: int, left: Tensor, right: Tensor, probes: ProbeTable, scale: float, noise_stream: int,
    chunk: int,
) -> None:  # fmt: skip
    """Subtract f32(scale * left right^T) from rows of a matrix that start at element `first`, in place.

    Args:
        flat: The whole tensor, f32 or bf16, one-dimensional, contiguous.
        first: Index of the first element concerned.
        left: int8[rows, depth], contiguous, codes times signs; depth is a multiple of TILE_DEPTH, at most
            TILE_DEPTH_MAX.
        right: int8[columns, depth], contiguous, signs.
        probes: Gives round and run key.
        scale, noise_stream, chunk: As above.
    """
    (rows, depth), columns = left.shape, right.shape[0]
    assert depth % TILE_DEPTH == 0
    assert depth <= TILE_DEPTH_MAX
    assert left.is_contiguous()
    assert right.is_contiguous()
    height = _GRID_SECOND_MAX * TILE_ROWS
    for top in range(0, rows, height):
        part, start = left[top : top + height], first + top * columns
        _launch(
            kernels.rank1_update, (_count(columns, TILE_COLUMNS), _count(len(part), TILE_ROWS)), _bits(flat), start,
            len(part), columns, part, right, depth, scale, _signed(noise_stream), _signed(chunk), probes.round,
            probes.run_key, IS_BFLOAT16=_is_bfloat16(flat), IS_ALIGNED=start % 8 == 0 and columns % 8 == 0,
            ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=TILE_DEPTH, num_warps=TILE_WARPS,
        )  # fmt: skip


def vector_update(
    flat: Tensor, first: int, left: Tensor, probes: ProbeTable, scale: float, noise_stream: int, chunk: int
) -> None:
    """Subtract f32(scale * U), U = the sum over each row of `left`, from elements of a vector, in place.

    Args:
        flat, first, probes, scale, noise_stream, chunk: As above; a vector has fewer than 2**31 elements.
        left: int8[elements, depth], contiguous, codes times signs; depth as above.
    """
    elements, depth = left.shape
    assert left.is_contiguous()
    assert depth % TILE_DEPTH == 0
    assert depth <= TILE_DEPTH_MAX
    if elements:
        _launch(
            kernels.vector_update, (_count(first % 8 + elements, VECTOR_ELEMENTS),), _bits(flat), first,
            first + elements, left, depth, scale, _signed(noise_stream), _signed(chunk), probes.round, probes.run_key,
            IS_BFLOAT16=_is_bfloat16(flat), ELEMENTS=VECTOR_ELEMENTS, DEPTH=TILE_DEPTH,
        )  # fmt: skip


def subtract(
    flat: Tensor, first: int, total: Tensor, scale: float, noise_stream: int, chunk: int, round: int, run_key: int
) -> None:
    """Subtract f32(scale * U) from elements first.. of a whole tensor, in place; U in int32 or exact f32."""
    sums = total.reshape(-1).contiguous()  # of a single column a view with gaps
    if len(sums) == 0:
        return
    _launch(
        kernels.subtract, (_count(first % 8 + len(sums), FLAT_ELEMENTS),), _bits(flat), first, first + len(sums), sums,
        scale, _signed(noise_stream), _signed(chunk), _signed(round), _signed(run_key),
        IS_BFLOAT16=_is_bfloat16(flat), ELEMENTS=FLAT_ELEMENTS,
    )  # fmt: skip


def digest_sum(words: Tensor, out: Tensor) -> None:
    """Add sum of h(i) * x[i] mod 2**64 of a tensor's bits (uint16 or uint32) to `out`, an int64 of one element."""
    if len(words):
        grid = (_count(len(words), DIGEST_ELEMENTS * DIGEST_STEPS),)
        _launch(kernels.digest_sum, grid, words, len(words), out, ELEMENTS=DIGEST_ELEMENTS, STEPS=DIGEST_STEPS)


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: object, **options: object) -> None:
    """Launch on the first argument's device, without fused multiply-adds."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=False, **options)


def _count(extent: int, size: int) -> int:
    return -(-extent // size)


def _bits(flat: Tensor) -> Tensor:
    """Return what kernels take for weights: f32 as they are, bf16 as their bits."""
    return flat.view(torch.uint16) if _is_bfloat16(flat) else flat


def _is_bfloat16(flat: Tensor) -> bool:
    return flat.dtype == torch.bfloat16


def _signed(word: int) -> int:
    """Return the int32 with a word's bits: an argument of 2**31 and more would be taken for a 64-bit integer."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
