"""Philox4x32-10 in torch, for accelerators: word for word what `peerturb.rng` makes on numpy.

On a CPU the numpy version is used instead: with cache-sized tiles it measured twice as fast a thread.
"""

import torch
from torch import Tensor

from peerturb.rng import KEY_STEPS, MASK, MULTIPLIERS, ROUNDS, SIGNS_PER_BLOCK


def grid_words(blocks: Tensor, streams: Tensor, samples: Tensor, slots: Tensor, *, round: int, run_key: int) -> Tensor:
    """Return the words of every probe (row) and counter (column) as int32[n, B, 4], the bits of unsigned words.

    Args:
        blocks: int64[B], first counter word of each column.
        streams: int64[B], its stream.
        samples: int64[n], sample of each row.
        slots: int64[n], its slot.
        round: The round, 32 bits.
        run_key: The run key, 32 bits.
    """
    # Products of two 32-bit values wrap in int64, but their 64 bits are right; the shift drags the sign along and the
    # mask after the exclusive-or removes it together with the upper half of the previous product.
    c0, c1, c2 = blocks[None, :], streams[None, :], samples[:, None]
    c3 = torch.full_like(c0, round)
    key1 = slots[:, None]
    for i in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ ((run_key + i * KEY_STEPS[0]) & MASK)) & MASK
        c2 = ((product0 >> 32) ^ c3 ^ ((key1 + i * KEY_STEPS[1]) & MASK)) & MASK
        c1, c3 = product1, product0
    pairs = torch.stack((c0 | (c1 << 32), c2 | (c3 << 32)), dim=-1)
    return pairs.view(torch.int32)


def unpack_linear(words: Tensor) -> Tensor:
    """Turn int32[n, B, 4] into the signs of the linear layout, int8[n, 128 * B]."""
    octets = words.contiguous().view(torch.uint8).reshape(-1)
    signs = torch.index_select(_sign_bytes(words.device), 0, octets.to(torch.int32))
    return signs.view(torch.int8).reshape(words.shape[0], words.shape[1] * SIGNS_PER_BLOCK)


def _sign_bytes(device: torch.device) -> Tensor:
    """Eight signs, as the bytes of one int64, for each value of eight bits."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return (1 - 2 * bits).to(torch.int8).view(torch.int64)[:, 0].contiguous()


def unpack_planar(words: Tensor) -> Tensor:
    """Turn int32[n, 32 * groups, 4] into the bits of the planar layout, int8[n, 4096 * groups] of 0 and 1."""
    n = words.shape[0]
    lanes = words.reshape(n, -1, 32, 4).transpose(2, 3).reshape(n, -1, 1, 128)
    planes = torch.arange(32, dtype=torch.int32, device=words.device)[:, None]
    return (lanes >> planes).bitwise_and_(1).to(torch.int8).reshape(n, -1)
