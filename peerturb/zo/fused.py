"""One chunk's update by CUDA kernels: signs exist for a group at a time, sums only in registers.

The kernels are `peerturb.zo.cuda`'s; the bits are those of the way without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb import rng
from peerturb.manifest import Manifest, Parameter
from peerturb.rng import SIDE_DENSE, SIDE_ROUNDING
from peerturb.zo import fast
from peerturb.zo.directions import Probes, probe_table
from peerturb.zo.plan import Group
from peerturb.zo.rounding import is_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One chunk's update by CUDA kernels that keep the sums in registers."""

    kernels: ModuleType
    table: Any
    alpha: float
    chunk: int

    def apply_group(self, group: Group, flats: Mapping[int, Tensor]) -> None:
        """Apply a group whose probes fit one pass."""
        height, device = self.table.height, flats[group.tiles[0].parameter.index].device
        # A column's signs lie side by side: so integer units read them.
        signs = torch.empty((group.table.width, height), dtype=torch.int8, device=device)
        group.table.fill(self.kernels, signs.t(), self.table, group.code_columns)
        for tile, (left, right) in zip(group.tiles, group.pairs, strict=True):
            flat, noise, scale = flats[tile.parameter.index], *self._rounding(tile.parameter)
            if right is None:
                self.kernels.vector_update(flat, tile.first, signs[left], self.table, scale, noise, self.chunk)
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


def fused_update(
    manifest: Manifest, probes: Probes, factors: NDArray[np.int8], alpha: float, chunk: int, device: torch.device
) -> Fused | None:
    """Return the CUDA kernels' way, if there is one and all scales are f32 (they multiply in f32)."""
    kernels = fast.kernels(device)
    if kernels is None or not all(is_float32(alpha * 2.0**parameter.exponent) for parameter in manifest):
        return None
    return Fused(kernels=kernels, table=probe_table(kernels, probes, factors, device), alpha=alpha, chunk=chunk)
