"""Evaluate a model in another type than its weights': a cast copy beside them, refreshed after updates.

The weights stay what the run says, bit for bit; only losses are computed from the copy. Knows nothing of probes.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peerturb.manifest import DType
from peerturb.zo.adapters import is_shared_matrix
from peerturb.zo.model import TORCH_DTYPES
from peerturb.zo.quantised import compute_in

ComputeDType = Literal["auto", "float32", "bfloat16", "float16"]

_TYPES: dict[str, torch.dtype] = {"float16": torch.float16} | {str(name): kind for name, kind in TORCH_DTYPES.items()}

BFLOAT16_CAPABILITY = (8, 0)
"""CUDA devices below this compute capability only emulate bfloat16."""


def compute_dtype(wanted: ComputeDType, weights: DType, device: torch.device) -> torch.dtype:
    """Return the type to evaluate in; `auto` is the weights' own, or f16 for bf16 weights on a GPU without bf16."""
    if wanted != "auto":
        return _TYPES[wanted]
    is_cuda = weights == "bfloat16" and device.type == "cuda"
    if is_cuda and torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY:
        return torch.float16
    return _TYPES[weights]


class Shadow:
    """A copy of a model whose floating-point parameters have another type; what else it holds keeps its own.

    It costs the copy's size in memory: half the weights' for a half-precision copy of float32, twice for the reverse.

    Args:
        model: the model with the weights; never written here.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        memo: dict[int, Any] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for parameter in model.parameters():
            if parameter.is_floating_point():
                cast = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
                memo[id(parameter)] = cast
                pairs.append((parameter, cast))
            else:
                memo[id(parameter)] = parameter
        for name, matrix in model.named_buffers():
            if is_shared_matrix(name):  # frozen, and multiplied with activations: a weight in all but name
                memo[id(matrix)] = matrix.to(dtype)
        # With its parameters in the memo the copy is made without copying them first; ties stay ties.
        self.model: Any = copy.deepcopy(model, memo)
        self.model.config.dtype = dtype
        compute_in(self.model, dtype)
        self._pairs = pairs
        self._is_stale = False

    def expire(self) -> None:
        """Note that the weights have changed."""
        self._is_stale = True

    @torch.inference_mode()
    def refresh(self) -> None:
        """Cast the weights again if they have changed: one pass over them."""
        if self._is_stale:
            for weight, cast in self._pairs:
                cast.copy_(weight)
            self._is_stale = False
