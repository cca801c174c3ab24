"""Cut a manifest into the pieces an update works through: tiles of a matrix, and groups whose signs are made together.

It knows sizes and places only, neither weights nor codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from peerturb import rng
from peerturb.manifest import Manifest, Parameter
from peerturb.rng import SIDE_LEFT, SIDE_RIGHT
from peerturb.zo.directions import Span, SpanTable

PROBES_PER_PASS = 4096
"""Probes whose signs exist at the same time."""
SIGN_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28, "fused": 1 << 26}
"""Signs of a group, the unit of parallel work: on a CPU what stays in a core's share of the last-level cache until it
is multiplied, and small enough that all cores find work in a small model. `fused`: CUDA kernels keep sums in registers,
so signs are all the memory an update takes."""
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24, "fused": 1 << 40}
"""Elements of one integer sum: on a CPU enough for a fast product, and little beside a model. `fused`: whole
matrices, as far as their signs fit a group; a launch each."""
PIECES_PER_THREAD = 4
"""Groups for each thread of a CPU: with fewer, threads wait for the last one."""
SUM_ELEMENTS = 1 << 24
"""Elements of all sums that must be kept when a chunk takes several passes: 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
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


class Group:
    """Tiles whose signs are made in one pass: left factors side by side, then right factors."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
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


@lru_cache(maxsize=64)
def plan_groups(manifest: Manifest, vectors_only: bool, kind: str, probes: int, pieces: int) -> tuple[Group, ...]:
    """Cut the manifest into tiles, and the tiles into groups whose signs and sums stay within their limits.

    There are at least about `pieces` groups, if there are so many tiles.
    """
    columns_max = max(SIGN_BYTES[kind] // probes, 1)
    tiles = list(_tiles(manifest, vectors_only, TILE_ELEMENTS[kind], columns_max if kind == "fused" else None))
    size_max = -(-sum(tile.elements for tile in tiles) // pieces)
    if kind != "fused":
        size_max = min(SUM_ELEMENTS, size_max)
    groups: list[list[Tile]] = []
    width = size = 0
    previous: Tile | None = None
    for tile in tiles:
        is_same = previous is not None and (previous.parameter, previous.matrix) == (tile.parameter, tile.matrix)
        tile_width = tile.stop - tile.start + (0 if is_same else tile.parameter.stacked[2])
        if not groups or width + tile_width > columns_max or size + tile.elements > size_max:
            groups.append([])
            width = size = 0
        groups[-1].append(tile)
        width, size, previous = width + tile_width, size + tile.elements, tile
    return tuple(Group(group) for group in groups)


def _tiles(manifest: Manifest, vectors_only: bool, elements_max: int, rows_max: int | None = None) -> Iterator[Tile]:
    for parameter in manifest:
        if parameter.elements == 0 or (vectors_only and parameter.kind != "vector"):
            continue
        matrices, rows, columns = parameter.stacked
        height = min(max(elements_max // columns, 1), rows_max or rows)
        for matrix in range(matrices):
            for start in range(0, rows, height):
                yield Tile(parameter=parameter, matrix=matrix, start=start, stop=min(start + height, rows))
