"""The inner loops of the update in machine code, by Numba: signs, sums, noise, the two roundings, the digest.

Optional (`peerturb[fast]`); import it through `peerturb.zo.fast`. Every function makes bit for bit what its numpy or
torch counterpart makes, in one pass over its data and without the interpreter's lock. Numba keeps LLVM from fusing a
multiplication into an addition unless `fastmath` is asked for, and it is not.
"""

from collections.abc import Callable
from typing import Final, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from peerturb.rng import (
    GROUP_BLOCKS,
    GROUP_SIGNS,
    I8,
    KEY_STEPS,
    MULTIPLIERS,
    ROUNDING_SLOT,
    ROUNDS,
    SIGNS_PER_BLOCK,
    U32,
    U64,
)

Function = TypeVar("Function", bound=Callable[..., object])

LANES: Final = 64
"""Counters permuted side by side: four vectors of 64 words fill 1 KiB and keep the widest registers busy."""
_BLOCK_EIGHTS = 16
"""Eights of signs in a block."""
_NOISE_ELEMENTS = 8
"""Elements whose rounding noise comes from one block."""

_PAIR = 2
"""Probes whose groups fill the lanes."""
_PLANES = 16
"""Bit planes in half a word."""
_GROUP_HALVES = 256
"""Halves of words that hold a group's bits."""
_FLUSH = 256
"""Probes whose codes' sum surely fits 16 bits."""

_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_STEP0, _STEP1 = (np.uint32(step) for step in KEY_STEPS)
_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX0 = (np.uint64(30), np.uint64(0xBF58_476D_1CE4_E5B9))
_MIX1 = (np.uint64(27), np.uint64(0x94D0_49BB_1331_11EB))
_MIX2 = np.uint64(31)
_HALF = np.uint64(32)
_ONES = np.uint64(0x0101_0101_0101_0101)
_BITS = np.uint64(0x8040_2010_0804_0201)
_TOPS = np.uint64(0x7F7F_7F7F_7F7F_7F7F)
_SEVEN = np.uint64(7)
_BYTE = np.uint64(0xFF)
_NOBODY = np.uint32(ROUNDING_SLOT)
_HALF_WORD = np.uint32(16)
_EXPONENT = np.uint32(0x7F80_0000)


def _compiled(*signatures: str) -> Callable[[Function], Function]:
    """Compile at import, or load from the cache: the first call is as quick as the last."""

    def compile_(function: Function) -> Function:
        try:
            return cast(Function, numba.njit([*signatures], nogil=True, cache=True)(function))
        except (RuntimeError, OSError):  # nowhere to keep a cache, or no room for it
            return cast(Function, numba.njit([*signatures], nogil=True)(function))

    return compile_


@_compiled("void(uint32[:, ::1], uint32, uint32[:, ::1])")
def _permute(lanes: U32, key0: int | np.uint32, words: U32) -> None:
    """Run Philox's ten rounds on LANES counters.

    Args:
        lanes: uint32[5, LANES], the counters' four words and the second word of their keys; used up.
        key0: First word of the key.
        words: uint32[LANES, 4], the result.
    """
    for _ in range(ROUNDS):
        for lane in range(LANES):
            product0 = np.uint64(lanes[0, lane]) * _M0
            product1 = np.uint64(lanes[2, lane]) * _M1
            lanes[0, lane] = np.uint32(product1 >> _HALF) ^ lanes[1, lane] ^ key0
            lanes[2, lane] = np.uint32(product0 >> _HALF) ^ lanes[3, lane] ^ lanes[4, lane]
            lanes[1, lane] = np.uint32(product1)
            lanes[3, lane] = np.uint32(product0)
            lanes[4, lane] = np.uint32(lanes[4, lane] + _STEP1)
        key0 = np.uint32(key0 + _STEP0)
    for lane in range(LANES):
        for word in range(4):
            words[lane, word] = lanes[word, lane]


@_compiled(
    "void(uint64[:, ::1], int64, int64, int64, int64, uint64[::1], uint64[::1], uint64[::1], uint64[::1], int8[::1],"
    " int64, uint32, uint32)"
)
def fill_signs(
    eights: U64, top: int, bottom: int, left: int, right: int, blocks: U64, streams: U64, samples: U64, slots: U64,
    factors: I8, scaled: int, round: int, run_key: int,
) -> None:  # fmt: skip
    """Write the linear signs of probes top..bottom and counters left..right, the first ones times the probes' codes.

    Args:
        eights: int8[n, 128 * B] seen as uint64[n, 16 * B].
        top, bottom, left, right: Which rows and which blocks.
        blocks: uint64[B], first counter word of each column.
        streams: uint64[B], its stream.
        samples: uint64[n], sample of each row.
        slots: uint64[n], its slot.
        factors: int8[n], -127..127.
        scaled: The signs of blocks below this one are multiplied by the row's factor.
        round: The round, 32 bits.
        run_key: The run key, 32 bits.
    """
    lanes = np.zeros((5, LANES), np.uint32)
    words = np.empty((LANES, 4), np.uint32)
    octets = words.view(np.uint8).reshape(-1)
    masks = np.empty(LANES * _BLOCK_EIGHTS, np.uint64)
    width = right - left
    counters = (bottom - top) * width
    row, column = top, left
    for start in range(0, counters, LANES):
        count = min(LANES, counters - start)
        first_row, first_column = row, column
        for lane in range(count):
            lanes[0, lane] = blocks[column]
            lanes[1, lane] = streams[column]
            lanes[2, lane] = samples[row]
            lanes[3, lane] = round
            lanes[4, lane] = slots[row]
            column += 1
            if column == right:
                row, column = row + 1, left
        _permute(lanes, run_key, words)
        for i in range(LANES * _BLOCK_EIGHTS):
            # Spread eight bits over eight bytes, lowest first: 0xFF where the bit is set.
            spread = (np.uint64(octets[i]) * _ONES) & _BITS
            masks[i] = (((spread + _TOPS) | spread) >> _SEVEN & _ONES) * _BYTE
        row, column = first_row, first_column
        for lane in range(count):
            factor = factors[row] if column < scaled else np.int8(1)
            plus = np.uint64(np.uint8(factor)) * _ONES
            change = plus ^ (np.uint64(np.uint8(-factor)) * _ONES)
            signs = eights[row, column * _BLOCK_EIGHTS : (column + 1) * _BLOCK_EIGHTS]
            mask = masks[lane * _BLOCK_EIGHTS : (lane + 1) * _BLOCK_EIGHTS]
            for i in range(_BLOCK_EIGHTS):
                signs[i] = plus ^ (change & mask[i])
            column += 1
            if column == right:
                row, column = row + 1, left


@_compiled("void(float32[::1], int32[::1], float32)")
def subtract_float32(weights: NDArray[np.float32], total: NDArray[np.int32], scale: float) -> None:
    """W - f32(scale * U), two roundings, in place."""
    for i in range(len(weights)):
        step = np.float32(np.float32(total[i]) * scale)
        weights[i] = np.float32(weights[i] - step)


@_compiled("void(uint16[::1], int64, int32[::1], float32, uint32, uint32, uint32, uint32)")
def subtract_bfloat16(
    weights: NDArray[np.uint16], first: int, total: NDArray[np.int32], scale: float,
    stream: int, chunk: int, round: int, run_key: int,
) -> None:  # fmt: skip
    """W - f32(scale * U) in f32, then rounded to bf16 with the noise of elements first.. of the stream, in place.

    Args:
        weights: The bits of the stretch's bf16 values.
        first: Index of its first element in the tensor.
        total: U, int32.
        scale: alpha * 2**k.
        stream: The tensor's stream of rounding noise.
        chunk: Number of the chunk of probes, the noise counter's sample.
        round: The round.
        run_key: The run key.
    """
    lanes = np.zeros((5, LANES), np.uint32)
    words = np.empty((LANES, 4), np.uint32)
    noise = words.view(np.uint16).reshape(-1)
    bits = np.empty(LANES * _NOISE_ELEMENTS, np.uint32)
    values = bits.view(np.float32)
    stop = first + len(weights)
    for block in range(first // _NOISE_ELEMENTS, -(-stop // _NOISE_ELEMENTS), LANES):
        for lane in range(LANES):
            lanes[0, lane] = block + lane
            lanes[1, lane] = stream
            lanes[2, lane] = chunk
            lanes[3, lane] = round
            lanes[4, lane] = _NOBODY
        _permute(lanes, run_key, words)
        origin = block * _NOISE_ELEMENTS
        low, high = max(first, origin), min(stop, origin + LANES * _NOISE_ELEMENTS)
        # Parts of their own: an index that might be negative keeps a loop from being vectorised.
        part, sums, drawn = (
            weights[low - first : high - first],
            total[low - first : high - first],
            noise[low - origin :],
        )
        for i in range(high - low):
            bits[i] = np.uint32(part[i]) << _HALF_WORD
        for i in range(high - low):
            step = np.float32(np.float32(sums[i]) * scale)
            values[i] = np.float32(values[i] - step)
        for i in range(high - low):
            pattern = bits[i]
            # Noise would turn an infinity into NaN.
            added = np.uint32(0) if (pattern & _EXPONENT) == _EXPONENT else np.uint32(drawn[i])
            part[i] = np.uint16(np.uint32(pattern + added) >> _HALF_WORD)


@_compiled("void(int32[::1], int64, uint64[::1], uint64[::1], int8[::1], uint32, uint32, uint32)")
def dense_sums(
    total: NDArray[np.int32], first_group: int, samples: U64, slots: U64, factors: I8,
    stream: int, round: int, run_key: int,
) -> None:  # fmt: skip
    """Write U = sum of c * z over groups of 4 096 elements in planar layout.

    A sign is 1 - 2 * bit, so U = sum of c - 2 * sum of c * bit. Sums of up to `_FLUSH` probes fit 16 bits, whose
    lanes are twice as many; a half of a word holds the bits of 16 planes.

    Args:
        total: int32[4096 * groups], written.
        first_group: Number of the first group in the tensor.
        samples: uint64[n], sample of each probe.
        slots: uint64[n], its slot.
        factors: int8[n], its code; 0 for a void one.
        stream: The tensor's dense stream.
        round: The round.
        run_key: The run key.
    """
    lanes = np.zeros((5, LANES), np.uint32)
    words = np.empty((LANES, 4), np.uint32)
    halves = words.view(np.uint16).reshape((_PAIR, _GROUP_HALVES))
    sums = np.empty((_PLANES, _GROUP_HALVES), np.int16)
    everything = np.int32(0)
    for probe in range(len(factors)):
        everything += np.int32(factors[probe])
    for group in range(len(total) // GROUP_SIGNS):
        target = total[group * GROUP_SIGNS : (group + 1) * GROUP_SIGNS]
        target[:] = everything
        block = (first_group + group) * GROUP_BLOCKS
        for chunk in range(0, len(factors), _FLUSH):
            sums[:, :] = 0
            stop = min(chunk + _FLUSH, len(factors))
            for probe in range(chunk, stop, _PAIR):
                for lane in range(LANES):
                    which = min(probe + lane // GROUP_BLOCKS, stop - 1)
                    lanes[0, lane] = block + lane % GROUP_BLOCKS
                    lanes[1, lane] = stream
                    lanes[2, lane] = samples[which]
                    lanes[3, lane] = round
                    lanes[4, lane] = slots[which]
                _permute(lanes, run_key, words)
                one = np.int16(factors[probe])
                other = np.int16(factors[probe + 1]) if probe + 1 < stop else np.int16(0)
                for plane in range(_PLANES):
                    shift = np.uint16(plane)
                    for i in range(_GROUP_HALVES):
                        bit = np.int16((halves[0, i] >> shift) & np.uint16(1))
                        bit_ = np.int16((halves[1, i] >> shift) & np.uint16(1))
                        sums[plane, i] = np.int16(sums[plane, i] + np.int16(bit * one) + np.int16(bit_ * other))
            for plane in range(_PLANES):
                low, high = plane * SIGNS_PER_BLOCK, (plane + _PLANES) * SIGNS_PER_BLOCK
                for lane in range(SIGNS_PER_BLOCK):
                    # Lane 32 w + b of the layout is word w of block b.
                    i = 2 * (4 * (lane % GROUP_BLOCKS) + lane // GROUP_BLOCKS)
                    target[low + lane] -= np.int32(2) * np.int32(sums[plane, i])
                    target[high + lane] -= np.int32(2) * np.int32(sums[plane, i + 1])


@_compiled("uint64(uint32[::1], uint64)", "uint64(uint16[::1], uint64)")
def digest_sum(words: NDArray[np.uint32] | NDArray[np.uint16], first: int) -> int:
    """Return the sum of h(i) * x_i mod 2**64 over elements first.. of a tensor: h(i) = splitmix64(i) | 1."""
    total = np.uint64(0)
    start = np.uint64(first) + _GOLDEN
    for i in range(len(words)):
        z = start + np.uint64(i)
        z = (z ^ (z >> _MIX0[0])) * _MIX0[1]
        z = (z ^ (z >> _MIX1[0])) * _MIX1[1]
        total += ((z ^ (z >> _MIX2)) | np.uint64(1)) * np.uint64(words[i])
    return total  # type: ignore[return-value]
