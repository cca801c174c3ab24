"""From (run key, round, slots, samples) to the signs of a parameter's noise, on any device.

It knows the manifest's shapes and the two layouts, nothing of models, codes or steps. On a CPU the words come from
`peerturb.rng` (as many threads as torch uses, each with its own cache-sized scratch), on CUDA with Triton from its
kernels, elsewhere from `peerturb.zo.philox`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from peerturb import rng
from peerturb.errors import ModelError
from peerturb.manifest import Parameter
from peerturb.rng import GROUP_BLOCKS, GROUP_SIGNS, SIDE_DENSE, SIDE_LEFT, SIDE_RIGHT, SIGNS_PER_BLOCK, U8, U32, U64
from peerturb.zo import fast, philox
from peerturb.zo.parallel import in_parallel

_LOW_BITS = np.uint64(0x0101_0101_0101_0101)
_MINUS_TWO = np.uint64(0xFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Which perturbations: n probes of one round, probe p being sample `samples[p]` of slot `slots[p]`."""

    run_key: int
    round: int
    slots: U64
    samples: U64

    @classmethod
    def of(cls, *, run_key: int, round: int, slots: ArrayLike, samples: ArrayLike) -> "Probes":
        """Take any integers; a single slot serves all samples."""
        numbers = np.atleast_1d(np.asarray(samples).astype(np.uint64))
        keys = np.broadcast_to(np.asarray(slots).astype(np.uint64), numbers.shape)
        return cls(run_key=run_key, round=round, slots=keys, samples=numbers)

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, start: int, stop: int) -> "Probes":
        """Return probes start..stop."""
        return Probes(
            run_key=self.run_key, round=self.round, slots=self.slots[start:stop], samples=self.samples[start:stop]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Elements start..stop of one stream in linear layout."""

    stream: int
    start: int
    stop: int


class SpanTable:
    """Several spans side by side: the counters of all their blocks, so that one pass makes all their signs."""

    def __init__(self, spans: Sequence[Span]) -> None:
        blocks = [rng.block_range(span.start, span.stop) for span in spans]
        edges = np.cumsum([0, *(len(part) for part in blocks)]).tolist()
        self.blocks: U64 = np.concatenate([np.zeros(0, np.uint64), *blocks])
        streams = np.array([span.stream for span in spans], np.uint64)
        self.streams: U64 = np.repeat(streams, np.array([len(part) for part in blocks], np.int64))
        starts = [
            SIGNS_PER_BLOCK * edge + span.start % SIGNS_PER_BLOCK for span, edge in zip(spans, edges[:-1], strict=True)
        ]
        self.columns = [slice(at, at + span.stop - span.start) for span, at in zip(spans, starts, strict=True)]
        """Where each span lies among the `width` columns that `signs` returns."""
        self.width: int = SIGNS_PER_BLOCK * edges[-1]
        self._counters: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def signs(self, probes: Probes, device: torch.device, *, rows: int = 0) -> Tensor:
        """Return int8[max(n, rows), width] of +1 and -1; rows beyond the probes are zero."""
        return self.scaled_signs(probes, device, rows=rows, factors=np.ones(len(probes), np.int8), columns=0)

    def scaled_signs(self, probes: Probes, device: torch.device, *, rows: int, factors: rng.I8, columns: int) -> Tensor:
        """Return the same, the first `columns` of each row times the probe's factor: int8[n], -127..127."""
        height = max(len(probes), rows)
        kernels = fast.kernels(device)
        if kernels is not None:
            out = torch.empty((height, self.width), dtype=torch.int8, device=device)
            self.fill(kernels, out, probe_table(kernels, probes, factors, device), columns)
            return out
        out = torch.empty((height, self.width), dtype=torch.int8, device=device)
        out[len(probes) :].zero_()
        loops = fast.compiled() if uses_numpy(device) else None
        if loops is not None:
            self._fill_compiled(loops, out.numpy().view(np.uint64), probes, factors, -(-columns // SIGNS_PER_BLOCK))
            return out
        if uses_numpy(device):
            self._fill(out.numpy(), probes)
        else:
            words = philox.grid_words(
                *to_device(self.blocks, self.streams, probes.samples, probes.slots, device=device),
                round=probes.round,
                run_key=probes.run_key,
            )
            out[: len(probes)] = philox.unpack_linear(words)
        if columns:
            out[: len(probes), :columns].mul_(torch.from_numpy(factors.copy()).to(device)[:, None])
        return out

    def fill(self, kernels: ModuleType, out: Tensor, table: Any, columns: int) -> None:
        """Let a CUDA kernel write the same into int8[at least n, width] of any strides.

        Args:
            kernels: What `fast.kernels` returned.
            out: The result.
            table: The probes and their factors, by `probe_table`.
            columns: As above.
        """
        if out.device not in self._counters:
            streams = kernels.words_on(self.streams, out.device)
            self._counters[out.device] = kernels.words_on(self.blocks, out.device), streams
        kernels.fill_signs(out, *self._counters[out.device], table, -(-columns // SIGNS_PER_BLOCK))

    def _fill_compiled(self, loops: ModuleType, eights: U64, probes: Probes, factors: rng.I8, scaled: int) -> None:
        def fill(tile: rng.Tile) -> None:
            loops.fill_signs(
                eights, *tile, self.blocks, self.streams, samples, slots, factors, scaled, probes.round, probes.run_key
            )

        samples, slots, factors = fast.settled(probes.samples), fast.settled(probes.slots), fast.settled(factors)
        crew = fast.crew_loops()
        if crew is not None:
            crew.fill_signs(
                eights, self.blocks, self.streams, samples, slots, factors, scaled, probes.round, probes.run_key
            )
            return
        in_parallel(fill, list(rng.tiles(len(probes), len(self.blocks))))

    def _fill(self, out: rng.I8, probes: Probes) -> None:
        def fill(tile: rng.Tile) -> None:
            rng.fill_signs(
                out, tile, self.blocks, self.streams, probes.samples, probes.slots,
                round=probes.round, run_key=probes.run_key, workspace=workspace(),
            )  # fmt: skip

        in_parallel(fill, list(rng.tiles(len(probes), len(self.blocks))))


class Directions:
    """The signs of n probes, parameter by parameter: what a perturbed forward asks for."""

    def __init__(self, probes: Probes, device: torch.device | str = "cpu") -> None:
        self.probes = probes
        self.device = torch.device(device)

    def left(self, parameter: Parameter) -> Tensor:
        """Return the left factors, or the whole signs of a vector: int8[n, matrices * rows]."""
        return left_signs(parameter, self.probes, device=self.device)

    def right(self, parameter: Parameter) -> Tensor:
        """Return the right factors: int8[n, matrices * columns]."""
        return right_signs(parameter, self.probes, device=self.device)

    def dense(self, parameter: Parameter, probe: int) -> Tensor:
        """Return one probe's sign for every element: int8[matrices * rows, columns]."""
        matrices, rows, columns = parameter.stacked
        signs = dense_signs(parameter, self.probes.part(probe, probe + 1), device=self.device)
        return signs.view(matrices * rows, columns)


def left_signs(parameter: Parameter, probes: Probes, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the left factors of a matrix (of all matrices of a stack, one after the other) or the signs of a vector.

    Returns:
        int8[n, matrices * rows] of +1 and -1, possibly a strided view.
    """
    matrices, rows, _ = parameter.stacked
    return _one_side(parameter, SIDE_LEFT, matrices * rows, probes, torch.device(device))


def right_signs(parameter: Parameter, probes: Probes, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the right factors of a matrix, or of all matrices of a stack: int8[n, matrices * columns]."""
    if parameter.kind == "vector":
        raise ModelError(f"{parameter.name} is a vector of shape {parameter.shape}: it has no right factor")
    matrices, _, columns = parameter.stacked
    return _one_side(parameter, SIDE_RIGHT, matrices * columns, probes, torch.device(device))


def dense_signs(
    parameter: Parameter, probes: Probes, *, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return elements start..stop, counted row-major over the whole tensor, of the `dense` noise of a matrix or stack.

    Returns:
        int8[n, stop - start] of +1 and -1, possibly a strided view.
    """
    stop = parameter.elements if stop is None else stop
    if parameter.kind == "vector":
        return left_signs(parameter, probes, device=device)[:, start:stop]
    kernels = fast.kernels(torch.device(device))
    if kernels is not None:
        table = probe_table(kernels, probes, np.ones(len(probes), np.int8), torch.device(device))
        first = start // GROUP_SIGNS
        groups, stream = -(-stop // GROUP_SIGNS) - first, rng.stream_of(parameter.index, SIDE_DENSE)
        signs: Tensor = kernels.dense_signs(first, groups, table, stream)
        return signs[:, start - first * GROUP_SIGNS : stop - first * GROUP_SIGNS]
    bits = dense_bits(parameter, probes, start, stop, torch.device(device))
    return bits.neg_().mul_(2).add_(1)


def dense_bits(parameter: Parameter, probes: Probes, start: int, stop: int, device: torch.device) -> Tensor:
    """Return the bits behind `dense_signs`, 1 for -1: int8[n, stop - start]."""
    first, last = start // GROUP_SIGNS, -(-stop // GROUP_SIGNS)
    blocks = np.arange(first * GROUP_BLOCKS, last * GROUP_BLOCKS, dtype=np.uint64)
    streams = np.full(len(blocks), rng.stream_of(parameter.index, SIDE_DENSE), np.uint64)
    if uses_numpy(device):
        bits = torch.from_numpy(_planar_bits(blocks, streams, probes))
    else:
        words = philox.grid_words(
            *to_device(blocks, streams, probes.samples, probes.slots, device=device),
            round=probes.round,
            run_key=probes.run_key,
        )
        bits = philox.unpack_planar(words)
    skip = start - first * GROUP_SIGNS
    return bits[:, skip : skip + stop - start]


def _one_side(parameter: Parameter, side: int, elements: int, probes: Probes, device: torch.device) -> Tensor:
    table = _table(rng.stream_of(parameter.index, side), elements)
    return table.signs(probes, device)[:, :elements]


@lru_cache(maxsize=4096)
def _table(stream: int, elements: int) -> SpanTable:
    return SpanTable([Span(stream=stream, start=0, stop=elements)])


def _planar_bits(blocks: U64, streams: U64, probes: Probes) -> rng.I8:
    """Return int8[n, 128 * B] of 0 and 1 in planar layout; B is a multiple of 32."""
    out = np.empty((len(probes), len(blocks) // GROUP_BLOCKS, 4, 8, SIGNS_PER_BLOCK // 8), np.uint64)

    def fill(tile: rng.Tile) -> None:
        top, bottom, left, right = tile
        words = rng.grid_words(
            blocks[left:right], streams[left:right], probes.samples[top:bottom], probes.slots[top:bottom],
            round=probes.round, run_key=probes.run_key, workspace=workspace(),
        )  # fmt: skip
        _spread(words, out[top:bottom, left // GROUP_BLOCKS : right // GROUP_BLOCKS])

    in_parallel(fill, list(rng.tiles(len(probes), len(blocks))))
    return out.view(np.int8).reshape(len(probes), -1)


def _spread(words: U32, out: U64) -> None:
    """Write the 32 bit planes of each group's 128 words as bytes of 0 and 1.

    Args:
        words: uint32[n, 32 * groups, 4].
        out: uint64[n, groups, 4, 8, 16]: byte of the word, bit of the byte, eight of 128 lanes (4 words x 32 blocks).
    """
    n, groups = out.shape[:2]
    octets: U8 = words.view(np.uint8).reshape(n, groups, GROUP_BLOCKS, 4, 4)
    lanes = np.ascontiguousarray(octets.transpose(0, 1, 4, 3, 2)).reshape(n, groups, 4, -1).view(np.uint64)
    for bit in range(8):
        np.right_shift(lanes, np.uint64(bit), out=out[:, :, :, bit])
    np.bitwise_and(out, _LOW_BITS, out=out)


def probe_table(kernels: ModuleType, probes: Probes, factors: rng.I8, device: torch.device) -> Any:
    """Return the probes as CUDA kernels read them: a `ProbeTable` of `peerturb.zo.cuda.launch`."""
    return kernels.ProbeTable.of(
        probes.samples, probes.slots, factors, round=probes.round, run_key=probes.run_key, device=device
    )


def to_device(*arrays: U64, device: torch.device) -> list[Tensor]:
    """Move counters to a device as int64."""
    return [torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays]


def uses_numpy(device: torch.device) -> bool:
    """Tell whether the device's words come from numpy."""
    return device.type == "cpu"


_local = threading.local()


def workspace() -> rng.Workspace:
    """This thread's scratch."""
    own: rng.Workspace | None = getattr(_local, "workspace", None)
    if own is None:
        own = _local.workspace = rng.Workspace()
    return own
