"""Apply a sealed round to the weights: an exact integer sum of codes x signs, then two IEEE roundings an element.

Canonical order of the probes: slots ascending, samples 0..count - 1 in each. The integer sum does not depend on it,
only the cut into chunks of PROBES_PER_UPDATE_MAX does. It knows neither records nor rules of the step size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from peerturb import codec, rng
from peerturb.errors import LogError, ModelError
from peerturb.limits import PROBES_PER_UPDATE_MAX
from peerturb.manifest import Manifest, Parameter
from peerturb.rng import GROUP_SIGNS, SIDE_DENSE, SIDE_LEFT, SIDE_RIGHT, SIDE_ROUNDING
from peerturb.zo import fast
from peerturb.zo.directions import Probes, Span, SpanTable, dense_bits, probe_table
from peerturb.zo.fast import settled
from peerturb.zo.gemm import exact_product
from peerturb.zo.parallel import in_parallel
from peerturb.zo.rounding import is_float32, subtract

PROBES_PER_PASS = 4096
"""Probes whose signs exist at the same time."""
SIGN_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28, "fused": 1 << 26}
"""Signs of a group, the unit of parallel work: on a CPU what stays in a core's share of the last-level cache until it
is multiplied, and small enough that all cores find work in a small model. `fused`: CUDA kernels keep sums in registers,
so signs are all the memory an update takes."""
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24, "fused": 1 << 40}
"""Elements of one integer sum: on a CPU what stays in the second-level cache until it is subtracted. `fused`: whole
matrices, as far as their signs fit a group; a launch each."""
PIECES_PER_THREAD = 4
"""Groups for each thread of a CPU: with fewer, threads wait for the last one."""
SUM_ELEMENTS = 1 << 24
"""Elements of all sums that must be kept when a chunk takes several passes: 64 MiB."""
DENSE_PROBES = {"cpu": 64, "cuda": 64}
DENSE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Probes x elements of `dense` bits that exist at the same time: 4 MiB on a CPU, 64 MiB elsewhere."""

Family = Literal["rank1", "dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Rows start..stop of one matrix, or elements start..stop of a vector."""

    parameter: Parameter
    matrix: int
    start: int
    stop: int

    @property
    def first(self) -> int:
        """Index of the tile's first element in the tensor, row-major."""
        _, rows, columns = self.parameter.stacked
        return (self.matrix * rows + self.start) * columns

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.stop - self.start) * self.parameter.stacked[2]

    def spans(self) -> tuple[Span, Span | None]:
        """Return where the tile's left and right factors lie; a vector has no right one."""
        _, rows, columns = self.parameter.stacked
        index, top = self.parameter.index, self.matrix * rows
        left = Span(stream=rng.stream_of(index, SIDE_LEFT), start=top + self.start, stop=top + self.stop)
        if self.parameter.kind == "vector":
            return left, None
        right_start = self.matrix * columns
        stream = rng.stream_of(index, SIDE_RIGHT)
        return left, Span(stream=stream, start=right_start, stop=right_start + columns)


class _Group:
    """Tiles whose signs are made in one pass: left factors side by side, then right factors."""

    def __init__(self, tiles: Sequence[_Tile]) -> None:
        self.tiles = tuple(tiles)
        lefts: list[Span] = []
        rights: list[Span] = []
        places: dict[Span, int] = {}
        for tile in tiles:
            left, right = tile.spans()
            lefts.append(left)
            if right is not None and right not in places:
                places[right] = len(rights)
                rights.append(right)
        self.table = SpanTable([*lefts, *rights])
        columns = self.table.columns
        self.code_columns = columns[len(lefts) - 1].stop
        pairs = []
        for tile, left_columns in zip(tiles, columns, strict=False):
            right = tile.spans()[1]
            pairs.append((left_columns, None if right is None else columns[len(lefts) + places[right]]))
        self.pairs = tuple(pairs)


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
    if not (0.0 <= alpha <= codec.STEP_MAX and float(np.float32(alpha)) == alpha):
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
    fused = _fused(manifest, probes, factors, alpha, chunk, device)

    @torch.no_grad()  # a property of the thread
    def apply_group(group: _Group) -> None:
        if fused is not None and is_one_pass:
            fused.apply_group(group, flats)
            return
        for tile, total in _rank1_sums(group, probes, factors, device):
            subtract(flats[tile.parameter.index], tile.first, total, tile.parameter, probes, alpha, chunk)

    is_one_pass = len(probes) <= PROBES_PER_PASS
    pieces = PIECES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else 1
    kind = "fused" if fused is not None and is_one_pass else _kind(device)
    groups = _plan(manifest, vectors_only, kind, min(len(probes), PROBES_PER_PASS), pieces)
    in_parallel(apply_group, groups)
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
        in_parallel(apply_stretch, [(p, first) for p in matrices for first in range(0, p.elements, width)])
    for parameter, weight in zip(manifest, weights, strict=True):
        if not weight.is_contiguous():  # then its flat form above was a copy
            weight.detach().copy_(flats[parameter.index].view(weight.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fused:
    """One chunk's update by CUDA kernels that keep the sums in registers."""

    kernels: ModuleType
    table: Any
    alpha: float
    chunk: int

    def apply_group(self, group: _Group, flats: Mapping[int, Tensor]) -> None:
        """Apply a group whose probes fit one pass."""
        height, device = self.table.height, flats[group.tiles[0].parameter.index].device
        # A column's signs lie side by side: so integer units read them.
        signs = torch.empty((group.table.width, height), dtype=torch.int8, device=device)
        group.table.fill(self.kernels, signs.t(), self.table, group.code_columns)
        for tile, (left, right) in zip(group.tiles, group.pairs, strict=True):
            flat, noise, scale = flats[tile.parameter.index], *self._rounding(tile.parameter)
            if right is None:
                total = signs[left].sum(1, dtype=torch.int32)
                self.kernels.subtract(
                    flat, tile.first, total, scale, noise, self.chunk, self.table.round, self.table.run_key
                )
            else:
                self.kernels.rank1_update(
                    flat, tile.first, signs[left], signs[right], self.table, scale, noise, self.chunk
                )

    def apply_dense(self, parameter: Parameter, flat: Tensor) -> None:
        """Apply all probes to a matrix or stack of the family `dense`."""
        noise, scale = self._rounding(parameter)
        self.kernels.dense_update(
            flat, self.table, scale, rng.stream_of(parameter.index, SIDE_DENSE), noise, self.chunk
        )

    def _rounding(self, parameter: Parameter) -> tuple[int, float]:
        return rng.stream_of(parameter.index, SIDE_ROUNDING), self.alpha * 2.0**parameter.exponent


def _fused(
    manifest: Manifest, probes: Probes, factors: NDArray[np.int8], alpha: float, chunk: int, device: torch.device
) -> _Fused | None:
    """Return the CUDA kernels' way, if there is one and all scales are f32 (they multiply in f32)."""
    kernels = fast.kernels(device)
    if kernels is None or not all(is_float32(alpha * 2.0**parameter.exponent) for parameter in manifest):
        return None
    return _Fused(kernels=kernels, table=probe_table(kernels, probes, factors, device), alpha=alpha, chunk=chunk)


def _rank1_sums(
    group: _Group, probes: Probes, factors: NDArray[np.int8], device: torch.device
) -> Iterator[tuple[_Tile, Tensor]]:
    """Yield each tile with U = sum of c * a bT, exact integers [rows, columns]."""
    sums: list[Tensor] = []
    passes = range(0, len(probes), PROBES_PER_PASS)
    for start in passes:
        part = probes.part(start, start + PROBES_PER_PASS)
        padded = -(-len(part) // 8) * 8
        signs = group.table.scaled_signs(
            part, device, rows=padded, factors=factors[start : start + PROBES_PER_PASS], columns=group.code_columns
        )
        ones = torch.ones((padded, 1), dtype=torch.int8, device=device)
        for number, (tile, (left, right)) in enumerate(zip(group.tiles, group.pairs, strict=True)):
            total = exact_product(signs[:, left], ones if right is None else signs[:, right])
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


@lru_cache(maxsize=64)
def _plan(manifest: Manifest, vectors_only: bool, kind: str, probes: int, pieces: int) -> tuple[_Group, ...]:
    """Cut the manifest into tiles, and the tiles into groups whose signs and sums stay within their limits.

    There are at least about `pieces` groups, if there are so many tiles.
    """
    columns_max = max(SIGN_BYTES[kind] // probes, 1)
    tiles = list(_tiles(manifest, vectors_only, TILE_ELEMENTS[kind], columns_max if kind == "fused" else None))
    size_max = -(-sum(tile.elements for tile in tiles) // pieces)
    if kind != "fused":
        size_max = min(SUM_ELEMENTS, size_max)
    groups: list[list[_Tile]] = []
    width = size = 0
    previous: _Tile | None = None
    for tile in tiles:
        is_same = previous is not None and (previous.parameter, previous.matrix) == (tile.parameter, tile.matrix)
        tile_width = tile.stop - tile.start + (0 if is_same else tile.parameter.stacked[2])
        if not groups or width + tile_width > columns_max or size + tile.elements > size_max:
            groups.append([])
            width = size = 0
        groups[-1].append(tile)
        width, size, previous = width + tile_width, size + tile.elements, tile
    return tuple(_Group(group) for group in groups)


def _tiles(manifest: Manifest, vectors_only: bool, elements_max: int, rows_max: int | None = None) -> Iterator[_Tile]:
    for parameter in manifest:
        if parameter.elements == 0 or (vectors_only and parameter.kind != "vector"):
            continue
        matrices, rows, columns = parameter.stacked
        height = min(max(elements_max // columns, 1), rows_max or rows)
        for matrix in range(matrices):
            for start in range(0, rows, height):
                yield _Tile(parameter=parameter, matrix=matrix, start=start, stop=min(start + height, rows))


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
