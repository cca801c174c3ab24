"""Fingerprints of weights: wrap-around 64-bit sums of bit patterns, the same on any device and in any order.

It knows tensors and their manifest; what a difference means is for others to decide. Not a cryptographic commitment to
the weights (the sums are linear); it finds replicas that went astray.
"""

import hashlib
import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from peerturb.manifest import Manifest
from peerturb.zo import fast
from peerturb.zo.parallel import in_parallel
from peerturb.zo.update import check_weights

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_CACHED_ELEMENTS = 1 << 22
"""Hashes kept for each device: 32 MiB, enough for small models; larger tensors make theirs tile by tile."""
_WORDS = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}

_cache: dict[torch.device, Tensor] = {}


def tensor_digest(weight: Tensor) -> int:
    """Return sum of h(i) * x_i mod 2**64, x_i the bits of element i (row-major) and h(i) = splitmix64(i) | 1."""
    return _sums([weight])[0]


def run_digest(manifest: Manifest, weights: Sequence[Tensor]) -> bytes:
    """Return the SHA-256 over name, shape, dtype and digest of every tensor in manifest order, 32 bytes.

    Each tensor contributes, little endian: u32 length of the name and its UTF-8 bytes; u32 number of extents and each
    as u64; u32 length of the dtype's name and its ASCII bytes; u64 tensor digest.

    Raises:
        ModelError: the tensors do not fit the manifest.
    """
    check_weights(weights, manifest)
    state = hashlib.sha256()
    for parameter, value in zip(manifest, _sums(weights), strict=True):
        name, dtype, shape = parameter.name.encode(), parameter.dtype.encode(), parameter.shape
        state.update(struct.pack("<I", len(name)) + name)
        state.update(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        state.update(struct.pack("<I", len(dtype)) + dtype)
        state.update(struct.pack("<Q", value))
    return state.digest()


def short_digest(digest: bytes) -> int:
    """Return the 32 bits a contribution carries: the digest's first four bytes, little endian."""
    return int.from_bytes(digest[:4], "little")


def _sums(weights: Sequence[Tensor]) -> list[int]:
    """Return the tensors' digests; they are on one device."""
    kernels = fast.kernels(weights[0].device) if weights else None
    if kernels is not None:
        totals = torch.zeros(len(weights), dtype=torch.int64, device=weights[0].device)
        for number, weight in enumerate(weights):
            kernels.digest_sum(weight.detach().reshape(-1).view(_WORDS[weight.dtype]), totals[number : number + 1])
        return [value & (2**64 - 1) for value in totals.tolist()]
    loops = fast.compiled() if weights and weights[0].device.type == "cpu" else None
    if loops is None:
        sums = torch.stack([_digest_sum(weight) for weight in weights]).tolist() if weights else []
        return [value & (2**64 - 1) for value in sums]
    words = [weight.detach().reshape(-1).view(_WORDS[weight.dtype]).numpy() for weight in weights]
    tile = _TILE_ELEMENTS["cpu"]
    pieces = [(number, start) for number, array in enumerate(words) for start in range(0, len(array), tile)]
    found = [0] * len(weights)
    lock = threading.Lock()

    def add(piece: tuple[int, int]) -> None:
        number, start = piece
        value = loops.digest_sum(words[number][start : start + tile], start)
        with lock:
            found[number] = (found[number] + value) & (2**64 - 1)

    in_parallel(add, pieces)
    return found


def _digest_sum(weight: Tensor) -> Tensor:
    """Return the digest as a signed int64 scalar on the weight's device, so that it is asked only once a model."""
    words = weight.detach().reshape(-1).view(_WORDS[weight.dtype])
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    tile = _TILE_ELEMENTS["cpu" if weight.device.type == "cpu" else "cuda"]
    for start in range(0, len(words), tile):
        piece = words[start : start + tile].to(torch.int64)
        hashes = _hashes(start, start + len(piece), weight.device)
        # Integer dot products exist on CPUs only; there they save a pass.
        total += torch.dot(piece, hashes) if weight.device.type == "cpu" else piece.mul_(hashes).sum()
    return total


def _hashes(start: int, stop: int, device: torch.device) -> Tensor:
    """Return h(start..stop) as int64 bit patterns."""
    if stop > _CACHED_ELEMENTS:
        return splitmix64(torch.arange(start, stop, device=device)).bitwise_or_(1)
    cached = _cache.get(device)
    if cached is None or len(cached) < stop:
        length = min(1 << (stop - 1).bit_length(), _CACHED_ELEMENTS)
        cached = _cache[device] = splitmix64(torch.arange(length, device=device)).bitwise_or_(1)
    return cached[start:stop]


def splitmix64(state: Tensor) -> Tensor:
    """Return the first output of splitmix64 seeded with each element: int64 bit patterns.

    Source: Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014.
    """
    z = state + _signed(_GOLDEN)
    for shift, factor in _MIX:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift zeros in: int64 has only the arithmetic shift."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit integer."""
    return word - (1 << 64) if word >> 63 else word
