"""Apply a sealed round to the weights: an exact integer sum of codes x signs, then two IEEE roundings an element.

Canonical order of the probes: slots ascending, samples 0..count - 1 in each. The integer sum does not depend on it,
only the cut into chunks of PROBES_PER_UPDATE_MAX does. It knows neither records nor rules of the step size.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from peerturb import codec, rng, stepping
from peerturb.errors import LogError, ModelError
from peerturb.limits import PROBES_PER_UPDATE_MAX
from peerturb.manifest import Manifest, Parameter
from peerturb.rng import GROUP_SIGNS, SIDE_DENSE
from peerturb.zo import fast
from peerturb.zo.directions import Probes, dense_bits
from peerturb.zo.fast import settled
from peerturb.zo.fused import fused_update
from peerturb.zo.gemm import exact_product
from peerturb.zo.parallel import in_parallel
from peerturb.zo.plan import PIECES_PER_THREAD, PROBES_PER_PASS, Group, Tile, plan_groups
from peerturb.zo.rounding import subtract

DENSE_PROBES = {"cpu": 64, "cuda": 64}
DENSE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Probes x elements of `dense` bits that exist at the same time: 4 MiB on a CPU, 64 MiB elsewhere."""
SHARED_WORK = 1 << 24
"""Elements x probes of a tile, on average, from which on it pays to share tiles among threads (measured on two cores:
below 2**22 one thread is a quarter faster than two, from 2**25 on two are faster)."""

Family = Literal["rank1", "dense"]


def apply_update(
    weights: Sequence[Tensor], manifest: Manifest, *, family: Family, run_key: int, round: int,
    slots: ArrayLike, counts: ArrayLike, codes: bytes | NDArray[np.int8], alpha: float,
) -> None:  # fmt: skip
    """Turn the weights of round `round` into those of the next one, in place.

    Args:
        weights: The manifest's tensors, in its order, on one device.
        manifest: Names, shapes and exponents.
        family: The RunSpec's family.
        run_key: The RunSpec's run key.
        round: The sealed round.
        slots: Contributing slots, ascending.
        counts: Their numbers of codes.
        codes: int8, contribution after contribution, void ones included.
        alpha: The sealed step size, an f32 value.

    Raises:
        LogError: the record contradicts itself or its step size cannot be.
        ModelError: the tensors do not fit the manifest.
    """
    check_weights(weights, manifest)
    keys, samples = _expand(slots, counts, len(codes))
    if not (0.0 <= alpha <= stepping.STEP_MAX and float(np.float32(alpha)) == alpha):
        raise LogError(f"the step size of round {round} is {alpha!r}; it must be an f32 between 0 and 2**64")
    factors = codec.decode(codes)
    for chunk, start in enumerate(range(0, len(factors), PROBES_PER_UPDATE_MAX)):
        part = slice(start, start + PROBES_PER_UPDATE_MAX)
        if alpha == 0 or not factors[part].any():
            continue  # U = 0 or alpha = 0: D = +0 changes no bit of any finite weight
        probes = Probes(run_key=run_key, round=round, slots=keys[part], samples=samples[part])
        with torch.no_grad():
            _apply_chunk(weights, manifest, family, probes, factors[part], float(alpha), chunk)


def _apply_chunk(
    weights: Sequence[Tensor], manifest: Manifest, family: Family, probes: Probes, factors: NDArray[np.int8],
    alpha: float, chunk: int,
) -> None:  # fmt: skip
    device = weights[0].device
    vectors_only = family == "dense"
    flats = {p.index: w.detach().reshape(-1) for p, w in zip(manifest, weights, strict=True)}
    fused = fused_update(manifest, probes, factors, alpha, chunk, device)

    @torch.no_grad()  # a property of the thread
    def apply_group(group: Group) -> None:
        if fused is not None and is_one_pass:
            fused.apply_group(group, flats)
            return
        for tile, total in _rank1_sums(group, probes, factors, device):
            subtract(flats[tile.parameter.index], tile.first, total, tile.parameter, probes, alpha, chunk)

    is_one_pass = len(probes) <= PROBES_PER_PASS
    pieces = PIECES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else 1
    kind = "fused" if fused is not None and is_one_pass else _kind(device)
    groups = plan_groups(manifest, vectors_only, kind, min(len(probes), PROBES_PER_PASS), pieces)
    tiles = sum(len(group.tiles) for group in groups)
    work = sum(tile.elements for group in groups for tile in group.tiles) * len(probes)
    in_parallel(apply_group, groups, on=device.type, is_shared=work >= SHARED_WORK * tiles)
    if family == "dense":

        @torch.no_grad()
        def apply_stretch(stretch: tuple[Parameter, int]) -> None:
            parameter, first = stretch
            total = _dense_sums(parameter, first, probes, factors, device)
            subtract(flats[parameter.index], first, total, parameter, probes, alpha, chunk)

        width = DENSE_ELEMENTS[_kind(device)]
        matrices = [parameter for parameter in manifest if parameter.kind != "vector"]
        if fused is not None:
            for parameter in matrices:
                fused.apply_dense(parameter, flats[parameter.index])
            matrices = []
        stretches = [(p, first) for p in matrices for first in range(0, p.elements, width)]
        in_parallel(apply_stretch, stretches, on=device.type)
    for parameter, weight in zip(manifest, weights, strict=True):
        if not weight.is_contiguous():  # then its flat form above was a copy
            weight.detach().copy_(flats[parameter.index].view(weight.shape))


def _rank1_sums(
    group: Group, probes: Probes, factors: NDArray[np.int8], device: torch.device
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield each tile with U = sum of c * a bT, exact integers [rows, columns]."""
    sums: list[Tensor] = []
    passes = range(0, len(probes), PROBES_PER_PASS)
    for start in passes:
        part = probes.part(start, start + PROBES_PER_PASS)
        padded = -(-len(part) // 8) * 8
        signs = group.table.scaled_signs(
            part, device, rows=padded, factors=factors[start : start + PROBES_PER_PASS], columns=group.code_columns
        )
        for number, (tile, (left, right)) in enumerate(zip(group.tiles, group.pairs, strict=True)):
            if right is None:
                total = signs[:, left].sum(0, dtype=torch.int32)
            else:
                total = exact_product(signs[:, left], signs[:, right])
            if len(passes) == 1:
                yield tile, total
            elif start == 0:
                sums.append(total)
            else:
                sums[number].add_(total)
    if len(passes) > 1:
        yield from zip(group.tiles, sums, strict=True)


def _dense_sums(
    parameter: Parameter, first: int, probes: Probes, factors: NDArray[np.int8], device: torch.device
) -> Tensor:
    """Return U = sum of c - 2 * sum of c * bit of a row-major stretch of a matrix, int32[at most DENSE_ELEMENTS]."""
    height, width = DENSE_PROBES[_kind(device)], DENSE_ELEMENTS[_kind(device)]
    assert width % GROUP_SIGNS == 0
    stop = min(first + width, parameter.elements)
    loops = fast.compiled() if device.type == "cpu" else None
    if loops is not None:
        total = torch.empty(-(-(stop - first) // GROUP_SIGNS) * GROUP_SIGNS, dtype=torch.int32)
        samples, slots, codes = settled(probes.samples), settled(probes.slots), settled(factors)
        stream = rng.stream_of(parameter.index, SIDE_DENSE)
        group = first // GROUP_SIGNS
        loops.dense_sums(total.numpy(), group, samples, slots, codes, stream, probes.round, probes.run_key)
        return total[: stop - first]
    column = torch.from_numpy(factors.copy()).to(device)[:, None]
    total = torch.zeros(stop - first, dtype=torch.int32, device=device)
    for start in range(0, len(probes), height):
        bits = dense_bits(parameter, probes.part(start, start + height), first, stop, device)
        total.add_(exact_product(column[start : start + height], bits)[0].to(torch.int32))
    return total.mul_(-2).add_(int(factors.astype(np.int64).sum()))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _expand(slots: ArrayLike, counts: ArrayLike, codes: int) -> tuple[rng.U64, rng.U64]:
    """Return slot and sample of every code, checking the columns against each other."""
    keys, sizes = np.asarray(slots, np.int64).reshape(-1), np.asarray(counts, np.int64).reshape(-1)
    if len(keys) != len(sizes) or (sizes < 1).any() or int(sizes.sum()) != codes:
        raise LogError(f"a sealed round with {len(keys)} slots and {len(sizes)} counts does not describe {codes} codes")
    if len(keys) and (keys[0] < 0 or keys[-1] >= rng.ROUNDING_SLOT or (np.diff(keys) <= 0).any()):
        raise LogError("the slots of a sealed round must be distinct, ascending and below ffffffff")
    starts = np.cumsum(sizes) - sizes
    samples = np.arange(codes, dtype=np.int64) - np.repeat(starts, sizes)
    return np.repeat(keys, sizes).astype(np.uint64), samples.astype(np.uint64)


def check_weights(weights: Sequence[Tensor], manifest: Manifest) -> None:
    """Check tensors against the manifest.

    Raises:
        ModelError: another number, shape, dtype or device than the manifest's; the message names the tensor.
    """
    if len(weights) != len(manifest):
        raise ModelError(f"the manifest has {len(manifest)} tensors, but {len(weights)} were given")
    for parameter, weight in zip(manifest, weights, strict=True):
        if tuple(weight.shape) != parameter.shape or weight.dtype != getattr(torch, parameter.dtype):
            found = f"{tuple(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
            raise ModelError(f"{parameter.name} is {found}; the manifest says {parameter.shape} {parameter.dtype}")
        if weight.device != weights[0].device:
            raise ModelError(f"{parameter.name} is on {weight.device}, {manifest[0].name} on {weights[0].device}")
