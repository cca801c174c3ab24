"""Exact projections: the product of one gradient with every direction of a contribution, <G, z>, no z ever formed.

`rank1`: <G, a bT> = aT G b, one matrix product for all directions at once, then a sum of products. `dense`: signs are
made in stretches and multiplied with the flattened gradient. Knows nothing of losses, codes or examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb.manifest import Manifest, Parameter
from peerturb.zo import fast
from peerturb.zo.directions import Probes, dense_signs
from peerturb.zo.factors import PagedSigns, Pages
from peerturb.zo.update import DENSE_ELEMENTS, DENSE_PROBES, Family

DIRECTIONS = {"cpu": 512, "cuda": 4_096}
"""Directions whose signs exist at the same time."""

PAGE_BYTES = {"compiled": 2**21, "cpu": 2**25, "cuda": 2**28}
"""Signs made in one pass, about."""

SPARSE = 0.5
"""Below this share of rows with a gradient only those are multiplied: an embedding has one for each word of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A gradient made ready for products with factors."""

    parameter: Parameter
    values: Tensor
    """[matrices, rows, columns] in the type of the products, or a vector's elements."""
    rows: Tensor | None
    """Which of the rows these are; None for all."""


class Projector:
    """One gradient, ready to be projected.

    Args:
        manifest: what is trained.
        gradients: f32 or f64, one for each entry, in its shape, on one device.
        family: of the run's directions.
    """

    def __init__(self, manifest: Manifest, gradients: Sequence[Tensor], family: Family) -> None:
        self.device = gradients[0].device
        self._kind = "cuda" if self.device.type == "cuda" else "cpu"
        self._family = family
        self._manifest = manifest
        self._dtype = product_dtype(self.device) if gradients[0].dtype == torch.float32 else gradients[0].dtype
        if family == "rank1":
            self._ready = [self._prepared(entry, g) for entry, g in zip(manifest, gradients, strict=True)]
        else:
            self._flat = [g.reshape(-1) for g in gradients]

    def project(
        self, *, run_key: int, round: int, slot: int, count: int, should_stop: Callable[[], bool] = lambda: False
    ) -> NDArray[np.float64]:
        """Return g = sum over tensors of 2**k <G, z> for samples 0..count-1: f64[count], fewer if stopped."""
        parts: list[NDArray[np.float64]] = []
        for start in range(0, count, DIRECTIONS[self._kind]):
            if parts and should_stop():
                break
            samples = np.arange(start, min(count, start + DIRECTIONS[self._kind]))
            probes = Probes.of(run_key=run_key, round=round, slots=slot, samples=samples)
            parts.append(self._part(probes))
        return np.concatenate(parts)

    @torch.inference_mode()
    def _part(self, probes: Probes) -> NDArray[np.float64]:
        total = torch.zeros(len(probes), dtype=torch.float64, device=self.device)
        found = self._rank1(probes) if self._family == "rank1" else self._dense(probes)
        for entry, values in found:
            total.add_(values.double(), alpha=2.0**entry.exponent)
        result: NDArray[np.float64] = total.cpu().numpy()
        return result

    def _prepared(self, entry: Parameter, gradient: Tensor) -> _Matrix:
        if entry.kind == "vector":
            return _Matrix(parameter=entry, values=gradient.reshape(-1), rows=None)
        values = gradient.reshape(entry.stacked)
        used = values[0].any(1) if values.shape[0] == 1 else None
        rows = None if used is None or float(used.float().mean()) >= SPARSE else used.nonzero()[:, 0]
        if rows is not None:
            values = values[:, rows]
        return _Matrix(parameter=entry, values=values.to(self._dtype), rows=rows)

    def _rank1(self, probes: Probes) -> Iterator[tuple[Parameter, Tensor]]:
        kind = "compiled" if self._kind == "cpu" and fast.compiled() else self._kind
        signs = PagedSigns(_pages(self._manifest, PAGE_BYTES[kind] // len(probes)), probes, self.device)
        for ready in self._ready:
            yield ready.parameter, _factored(ready, signs)

    def _dense(self, probes: Probes) -> Iterator[tuple[Parameter, Tensor]]:
        height, width = DENSE_PROBES[self._kind], DENSE_ELEMENTS[self._kind]
        for entry, flat in zip(self._manifest, self._flat, strict=True):
            total = torch.zeros(len(probes), dtype=torch.float64, device=self.device)
            for low in range(0, len(probes), height):
                part = probes.part(low, low + height)
                for first in range(0, entry.elements, width):
                    stop = min(first + width, entry.elements)
                    signs = dense_signs(entry, part, start=first, stop=stop, device=self.device)
                    total[low : low + height] += signs.to(flat.dtype) @ flat[first:stop]
            yield entry, total


def _factored(ready: _Matrix, signs: PagedSigns) -> Tensor:
    """Return aT G b of every direction, summed over the matrices of a stack: [n]."""
    entry, values = ready.parameter, ready.values
    left = signs.left(entry)
    if entry.kind == "vector":
        return left.to(values.dtype) @ values
    matrices, rows, columns = entry.stacked
    a, b = left.unflatten(1, (matrices, rows)), signs.right(entry).unflatten(1, (matrices, columns))
    if ready.rows is not None:
        a = a[:, :, ready.rows]
    if values.shape[1] >= values.shape[2]:
        summed, other, matrix = a, b, values
    else:  # sum over the longer side in the product, so that the shorter is left for the slower passes
        summed, other, matrix = b, a, values.transpose(1, 2)
    product = torch.bmm(summed.transpose(0, 1).to(values.dtype), matrix)
    return (product.float() if values.dtype == torch.bfloat16 else product).mul_(other.transpose(0, 1)).sum((0, 2))


@lru_cache(maxsize=8)
def _pages(manifest: Manifest, columns_max: int) -> Pages:
    return Pages(manifest, columns_max)


@lru_cache(maxsize=8)
def product_dtype(device: torch.device) -> torch.dtype:
    """Return the type of f32 gradients' products with signs: bf16 where the device multiplies it natively, else f32.

    Signs are exact in bf16; a gradient rounded to it moves <G, z> by 0.0011 |G|, root mean square, and what comes of
    the product by as much again. The byte's own rounding moves it by 0.009 |G|.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has else torch.float32
