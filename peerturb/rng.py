"""Philox4x32-10 on numpy: the words and linear-layout signs every peer derives from shared integers.

It knows nothing of tensors or devices (`peerturb.zo.philox` makes the same words with torch) and keeps no state: a word
is a pure function of (run key, slot, round, sample, stream, block).

Source: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
"""

import sys
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I8 = NDArray[np.int8]
Tile = tuple[int, int, int, int]
"""(row start, row stop, column start, column stop) of a grid of probes x counters."""

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
MASK: Final = 0xFFFFFFFF
ROUNDS: Final = 10

SIDE_LEFT: Final = 0
"""Left factor of a matrix, or a whole vector."""
SIDE_RIGHT: Final = 1
"""Right factor of a matrix."""
SIDE_DENSE: Final = 2
"""Every element of a matrix (`dense` family)."""
SIDE_ROUNDING: Final = 3
"""Noise of the stochastic rounding to bfloat16."""

ROUNDING_SLOT: Final = 0xFFFFFFFF
"""Slot of noise that belongs to no peer."""
CODE_STREAM: Final = 0xFFFFFFFF
"""Stream of the noise that rounds codes; local to the sender."""
BATCH_STREAM: Final = 0xFFFFFFFE
"""Stream for a node's choice of examples; local to the sender."""
TENSORS_MAX: Final = (BATCH_STREAM - SIDE_ROUNDING) // 4
"""Tensors a manifest may hold, so that no tensor's stream meets the two above."""

SIGNS_PER_BLOCK: Final = 128
GROUP_BLOCKS: Final = 32
GROUP_SIGNS: Final = GROUP_BLOCKS * SIGNS_PER_BLOCK

TILE_BLOCKS: Final = 12_288
"""Six u64 arrays of this length fill 576 KiB: measured fastest with 1 MiB of second-level cache."""
_UNPACK_BYTES: Final = 16_384
"""Bytes whose signs are looked up at a time; their 64-bit indices fill 128 KiB."""

_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_MASK = np.uint64(MASK)
_HALF = np.uint64(32)

_SIGN_BYTES: Final[U64] = np.ascontiguousarray(
    (1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)).astype(np.int8)
).view(np.uint64)[:, 0]
"""Eight signs, as bytes, for each value of eight bits, least significant bit first."""

assert sys.byteorder == "little", "words are reinterpreted as bytes: peerturb needs a little-endian machine"


class Workspace:
    """Reused arrays for one thread: a fresh array of this size costs more in page faults than in arithmetic."""

    __slots__ = ("indices", "lanes", "words")

    def __init__(self) -> None:
        self.lanes = np.empty((6, TILE_BLOCKS), np.uint64)
        self.words = np.empty(4 * TILE_BLOCKS, np.uint32)
        self.indices = np.empty(_UNPACK_BYTES, np.intp)


def stream_of(tensor: int, side: int) -> int:
    """Return the Philox stream of a side of tensor number `tensor` of the manifest."""
    return 4 * tensor + side


def philox(
    block: ArrayLike, stream: ArrayLike, sample: ArrayLike, round: ArrayLike, *, key: tuple[ArrayLike, ArrayLike]
) -> U32:
    """Return the four words of each counter, uint32[..., 4]; all arguments broadcast against each other.

    Args:
        block: First counter word; the other three follow.
        stream: 4 * tensor + side.
        sample: Index of the probe in its contribution.
        round: The round.
        key: (run key, slot).
    """
    parts = np.broadcast_arrays(*(np.asarray(part, np.uint64) for part in (block, stream, sample, round, *key)))
    shape = parts[0].shape
    c0, c1, c2, c3, k0, k1 = (np.atleast_1d(part) for part in parts)
    words = np.empty((*c0.shape, 4), np.uint32)
    _permute(c0, c1, c2, c3, k0, k1, words, np.empty((6, words.size // 4), np.uint64))
    return words.reshape(*shape, 4)


def _permute(
    c0: U64, c1: U64, c2: U64, c3: U64 | np.uint64, k0: U64 | np.uint64, k1: U64 | np.uint64, words: U32, lanes: U64
) -> None:
    """Run the ten rounds on counters that broadcast to `words.shape[:-1]`, writing their words.

    `lanes` is scratch, uint64[6, at least as many as counters].
    A product's upper half goes on by shifting; its lower half is used unmasked as the next round's c1 or c3 and
    cleaned after the exclusive-or, so that each round costs ten vector operations on one 64-bit lane a word.
    """
    shape = words.shape[:-1]
    x0, x2, *products = (lane[: words.size // 4].reshape(shape) for lane in lanes)
    for i in range(ROUNDS):
        key0 = (k0 + np.uint64(i * KEY_STEPS[0])) & _MASK
        key1 = (k1 + np.uint64(i * KEY_STEPS[1])) & _MASK
        # The first products are small (one row, one column) when the counter is an outer product; later ones are whole.
        product0: U64 = np.multiply(c0, _M0, out=products[0] if i else None)
        product1: U64 = np.multiply(c2, _M1, out=products[1] if i else None)
        np.right_shift(product1, _HALF, out=x0)
        np.bitwise_xor(x0, c1, out=x0)
        np.bitwise_xor(x0, key0, out=x0)
        np.bitwise_and(x0, _MASK, out=x0)
        np.right_shift(product0, _HALF, out=x2)
        np.bitwise_xor(x2, c3, out=x2)
        np.bitwise_xor(x2, key1, out=x2)
        np.bitwise_and(x2, _MASK, out=x2)
        products = products[2:] + products[:2]
        c0, c1, c2, c3 = x0, product1, x2, product0
    pairs = words.view(np.uint64)
    np.left_shift(product1, _HALF, out=product1)
    np.bitwise_or(x0, product1, out=pairs[..., 0])
    np.left_shift(product0, _HALF, out=product0)
    np.bitwise_or(x2, product0, out=pairs[..., 1])


def tiles(rows: int, columns: int) -> Iterator[Tile]:
    """Cut a grid of rows x columns counters into tiles of at most `TILE_BLOCKS`."""
    width = min(columns, TILE_BLOCKS)
    height = max(1, TILE_BLOCKS // max(1, width))
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield row, min(row + height, rows), column, min(column + width, columns)


def grid_words(
    blocks: U64, streams: U64, samples: U64, slots: U64, *, round: int, run_key: int, workspace: Workspace
) -> U32:
    """Return the words of every probe (row) and counter (column) of one tile: uint32[n, B, 4] in `workspace.words`.

    At most `TILE_BLOCKS` counters.

    Args:
        blocks: uint64[B], first counter word of each column.
        streams: uint64[B], its stream.
        samples: uint64[n], sample of each row.
        slots: uint64[n], its slot.
        round: The round, 32 bits.
        run_key: The run key, 32 bits.
    """
    words = workspace.words[: 4 * len(samples) * len(blocks)].reshape(len(samples), len(blocks), 4)
    # One scalar key is quicker than a column of equal ones, and tiles mostly lie within one contribution.
    slot = slots[0] if (slots == slots[0]).all() else slots[:, None]
    _permute(
        blocks[None, :], streams[None, :], samples[:, None], np.uint64(round), np.uint64(run_key), slot,
        words, workspace.lanes,
    )  # fmt: skip
    return words


def unpack_signs(words: U32, out: I8, workspace: Workspace) -> None:
    """Turn bits into signs, 0 to +1 and 1 to -1, least significant bit of the first word first.

    Args:
        words: uint32[..., k], contiguous.
        out: int8[..., 32 * k], contiguous.
        workspace: Scratch.
    """
    packed, eights = words.reshape(-1).view(np.uint8), out.reshape(-1).view(np.uint64)
    for start in range(0, len(packed), _UNPACK_BYTES):
        piece = packed[start : start + _UNPACK_BYTES]
        indices = workspace.indices[: len(piece)]
        np.copyto(indices, piece)
        np.take(_SIGN_BYTES, indices, out=eights[start : start + _UNPACK_BYTES], mode="clip")


def linear_signs(
    stream: int, start: int, stop: int, *, round: int, run_key: int, slots: ArrayLike, samples: ArrayLike
) -> I8:
    """Return elements start..stop of one stream in linear layout for n probes: int8[n, stop - start] of +1 and -1."""
    rows, columns = np.asarray(samples, np.uint64), block_range(start, stop)
    keys = np.broadcast_to(np.asarray(slots, np.uint64), rows.shape)
    streams = np.full(len(columns), stream, np.uint64)
    signs = np.empty((len(rows), len(columns) * SIGNS_PER_BLOCK), np.int8)
    workspace = Workspace()
    for tile in tiles(len(rows), len(columns)):
        fill_signs(signs, tile, columns, streams, rows, keys, round=round, run_key=run_key, workspace=workspace)
    skip = start % SIGNS_PER_BLOCK
    return signs[:, skip : skip + stop - start]


def fill_signs(
    signs: I8, tile: Tile, blocks: U64, streams: U64, samples: U64, slots: U64, *,
    round: int, run_key: int, workspace: Workspace,
) -> None:  # fmt: skip
    """Write one tile of int8[n, 128 * B], the linear signs of every probe (row) and counter (column)."""
    top, bottom, left, right = tile
    words = grid_words(
        blocks[left:right], streams[left:right], samples[top:bottom], slots[top:bottom],
        round=round, run_key=run_key, workspace=workspace,
    )  # fmt: skip
    region = signs[top:bottom, left * SIGNS_PER_BLOCK : right * SIGNS_PER_BLOCK]
    if region.flags.c_contiguous:
        unpack_signs(words, region, workspace)
        return
    for row, packed in zip(region, words, strict=True):
        unpack_signs(packed, row, workspace)


def block_range(start: int, stop: int) -> U64:
    """Return the blocks that hold elements start..stop of a linear layout."""
    return np.arange(start // SIGNS_PER_BLOCK, -(-stop // SIGNS_PER_BLOCK), dtype=np.uint64)
