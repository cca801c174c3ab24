"""The parameter manifest: which tensors a run trains, in the order that numbers them.

Torch-free, so that the coordinator and the log tools can read it. `peerturb.zo.model` builds it from a model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16"]
Kind = Literal["vector", "matrix", "stack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One trainable tensor."""

    index: int
    """Position among the trainable tensors sorted by name, tied ones once; numbers its Philox streams."""
    name: str
    """Name in the model's `named_parameters()` (for tied tensors the first in sorted order)."""
    shape: tuple[int, ...]
    dtype: DType
    exponent: int = 0
    """k: this tensor's perturbation and update are scaled by 2**k."""
    is_stack: bool = False
    """True for a three-dimensional stack of matrices (experts), False for tensors reshaped to (first, rest)."""

    @property
    def kind(self) -> Kind:
        """`vector` below two dimensions, `stack` for experts, else `matrix`."""
        if len(self.shape) < 2:
            return "vector"
        return "stack" if self.is_stack else "matrix"

    @property
    def stacked(self) -> tuple[int, int, int]:
        """(matrices, rows, columns). A vector of length m is (1, m, 1)."""
        if self.kind == "stack":
            matrices, rows, columns = self.shape
            return matrices, rows, columns
        rows = self.shape[0] if self.shape else 1
        return 1, rows, self.elements // rows

    @property
    def elements(self) -> int:
        """Number of scalars in the tensor."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


Manifest = tuple[Parameter, ...]


def manifest_digest(manifest: Sequence[Parameter]) -> bytes:
    """Return the SHA-256 over index, name, shape, dtype, exponent and kind of every parameter, one line each."""
    lines = (
        f"{p.index}\t{p.name}\t{'x'.join(map(str, p.shape))}\t{p.dtype}\t{p.exponent}\t{p.kind}\n" for p in manifest
    )
    return hashlib.sha256("".join(lines).encode()).digest()
