"""Give a model the tensors that its base checkpoint lacks, equally on every machine: a new head for classification.

Values follow from the RunSpec's seed and the tensors' names alone (docs/numerics.md, section 9). Never a framework
generator: torch promises no equal streams across versions and devices.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peerturb.rng import MASK, philox

HEAD_STREAM = 0xFFFFFFFD
"""Stream of new tensors' values; above every tensor's, below the local ones."""

HEAD_BOUND = np.uint32(0x3D0DE3BD).view(np.float32)
"""0.02 times the root of 3: half the width of the uniform distribution, whose standard deviation is then the 0.02 that
encoders are made with."""


def initial_values(shape: Sequence[int], *, seed: int, tensor: int) -> Tensor:
    """Return f32 values uniform in (-HEAD_BOUND, HEAD_BOUND).

    Args:
        seed: the RunSpec's, below 2**63.
        tensor: the tensor's number among the new ones, sorted by name.
    """
    count = int(np.prod(shape, dtype=np.int64))
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    words = philox(blocks, HEAD_STREAM, tensor, 0, key=(seed & MASK, seed >> 32)).reshape(-1)[:count]
    # Odd multiples of 2**-23 between -1 and 1: exact, so that the product is the only rounding.
    odd: NDArray[np.int64] = (words >> 9).astype(np.int64) * 2 + 1 - 2**23
    values = (odd.astype(np.float32) * np.float32(2.0**-23)) * HEAD_BOUND
    return torch.from_numpy(values).view(*shape)


def fill_new(model: nn.Module, names: Sequence[str], *, seed: int) -> None:
    """Write values into tensors of a model: matrices from `initial_values`, biases 0, scales of norms 1.

    Args:
        names: the tensors that the checkpoint lacks.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for number, name in enumerate(sorted(names)):
        tensor = named[name].data
        if tensor.dim() < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            tensor.copy_(initial_values(tensor.shape, seed=seed, tensor=number))


def is_new(name: str, prefix: str) -> bool:
    """True if a missing tensor belongs to the head (or the pooler below it), not to the base model `prefix`."""
    return not name.startswith(f"{prefix}.") or "pooler" in name.split(".")
