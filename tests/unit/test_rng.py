"""Philox on numpy and torch, and the linear layout."""

import numpy as np
import pytest
import torch

from peerturb import rng
from peerturb.zo import philox

FULL = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((FULL,) * 4, (FULL, FULL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    words = rng.philox(*counter, key=key)
    assert words.shape == (4,)
    assert " ".join(f"{word:08x}" for word in words.tolist()) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_in_torch(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    block, stream, sample, slot = (torch.tensor([value]) for value in (*counter[:3], key[1]))
    words = philox.grid_words(block, stream, sample, slot, round=counter[3], run_key=key[0])
    assert " ".join(f"{word & FULL:08x}" for word in words.flatten().tolist()) == expected


def test_arguments_broadcast() -> None:
    words = rng.philox(np.arange(3), 5, np.arange(2)[:, None], 7, key=(9, [[1], [2]]))
    assert words.shape == (2, 3, 4)
    assert words[1, 2].tolist() == rng.philox(2, 5, 1, 7, key=(9, 2)).tolist()


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (3, 5), (40, 700), (2, rng.TILE_BLOCKS + 33)])
def test_grid_agrees_between_numpy_and_torch(n: int, columns: int) -> None:
    source = np.random.default_rng(n)
    blocks, streams = (source.integers(0, 2**32, columns, dtype=np.uint64) for _ in range(2))
    samples, slots = (source.integers(0, 2**32, n, dtype=np.uint64) for _ in range(2))
    expected = rng.philox(blocks, streams, samples[:, None], FULL, key=(FULL - 1, slots[:, None]))
    workspace = rng.Workspace()
    for top, bottom, left, right in rng.tiles(n, columns):
        tile = rng.grid_words(
            blocks[left:right],
            streams[left:right],
            samples[top:bottom],
            slots[top:bottom],
            round=FULL,
            run_key=FULL - 1,
            workspace=workspace,
        )
        assert np.array_equal(tile, expected[top:bottom, left:right])
    moved = [torch.from_numpy(array.astype(np.int64)) for array in (blocks, streams, samples, slots)]
    words = philox.grid_words(*moved, round=FULL, run_key=FULL - 1)
    assert np.array_equal(words.numpy().view(np.uint32), expected)


def test_tiles_cover_a_grid_once() -> None:
    seen = np.zeros((7, 2 * rng.TILE_BLOCKS + 5), np.int8)
    for top, bottom, left, right in rng.tiles(*seen.shape):
        assert (bottom - top) * (right - left) <= rng.TILE_BLOCKS
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("elements", [1, 3, 5, 127, 128, 129, 4097])
def test_linear_signs_are_the_bits_of_the_words(elements: int) -> None:
    signs = rng.linear_signs(6, 0, elements, round=3, run_key=11, slots=[2, 900], samples=[0, 5])
    assert signs.shape == (2, elements)
    assert signs.dtype == np.int8
    for row, (slot, sample) in zip(signs, [(2, 0), (900, 5)], strict=True):
        for e in {0, elements // 2, elements - 1}:
            word = rng.philox(e // 128, 6, sample, 3, key=(11, slot))[e % 128 // 32]
            assert row[e] == 1 - 2 * ((int(word) >> (e % 32)) & 1)


def test_a_range_of_a_stream_is_a_cut_of_the_whole() -> None:
    whole = rng.linear_signs(6, 0, 1000, round=3, run_key=11, slots=1, samples=[4, 5])
    assert np.array_equal(
        rng.linear_signs(6, 130, 777, round=3, run_key=11, slots=1, samples=[4, 5]), whole[:, 130:777]
    )


def test_a_wide_stream_crosses_tiles() -> None:
    stop = (rng.TILE_BLOCKS + 3) * rng.SIGNS_PER_BLOCK
    start = stop - 500
    wide = rng.linear_signs(1, 0, stop, round=0, run_key=1, slots=0, samples=[0, 1])
    assert np.array_equal(
        wide[:, start:], rng.linear_signs(1, start, stop, round=0, run_key=1, slots=0, samples=[0, 1])
    )


def test_streams_of_tensors_never_meet_the_senders_own() -> None:
    last = rng.stream_of(rng.TENSORS_MAX - 1, rng.SIDE_ROUNDING)
    assert last < rng.BATCH_STREAM < rng.CODE_STREAM <= FULL
