"""What a forward needs of memory, estimated from the shapes of a model. Knows nothing of what is free.

Estimates were 0.9 to 2.7 times the peaks measured on a CPU (docs/LOG.md): good enough to choose a number of rows with,
and wrong enough that running out must be caught all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peerturb.manifest import Parameter
from peerturb.zo.batch import Evaluator, Size
from peerturb.zo.perturbation import HALVES

LIVE = 5
"""Activations as wide as a token's widest that are alive at once: a gated layer's gate, its value and their product
beside the residual and what the norm made of it, or the terms of an activation function written out in torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a forward holds at its widest place, in bytes."""

    token: int
    """For each token."""
    pair: int
    """For each pair of tokens of a row: attention scores, or a mask where they are never written out."""
    output: int
    """For each number of the largest output."""
    held: int
    """For each number that a row keeps (`Size.held`)."""
    row: int
    """For each row besides: its probe's vectors, perturbed."""
    fixed: int
    """Once: the signs of the largest matrix, in the family that writes them out."""

    def of(self, size: Size) -> int:
        """Return the bytes of one row."""
        # Layers and head are not at their widest at the same time.
        layers = size.tokens * self.token + size.tokens**2 * self.pair
        return self.row + size.held * self.held + max(layers, size.outputs * self.output)


def need_of(evaluator: Evaluator[Any], *, family: str = "") -> Need:
    """Estimate what the forwards of an evaluator need.

    Args:
        family: of the perturbations; empty: the weights as they are.
    """
    module: Any = getattr(evaluator, "model", None) or getattr(evaluator, "module", None)
    config = _config(module)
    itemsize = evaluator.dtype.itemsize
    wide = max(4, itemsize) if evaluator.dtype in HALVES else 0  # what is copied to float32
    is_eager = getattr(config, "_attn_implementation", "") == "eager"
    matrices = [entry.elements for entry, _ in evaluator.parameters if entry.kind != "vector"]
    vectors = [entry.elements for entry, _ in evaluator.parameters if entry.kind == "vector"]
    return Need(
        token=LIVE * itemsize * _width(module, evaluator.parameters),
        # Scores and their softmax.
        pair=(2 * itemsize + wide) * _heads(config) if is_eager else itemsize,
        # On a CPU the softmax is taken slice by slice; elsewhere at once, and with a result of the same size.
        output=itemsize if evaluator.device.type == "cpu" else itemsize + wide + 4,
        held=itemsize,
        row=4 * sum(vectors) if family else 0,
        fixed=(itemsize + 1) * max(matrices, default=0) if family == "dense" else 0,
    )


def cache_width(module: Any) -> int:
    """Return the numbers that a transformers decoder keeps of each token while it writes: keys and values."""
    config = _config(module)
    heads = _heads(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * int(config.num_hidden_layers) * int(getattr(config, "num_key_value_heads", None) or heads) * int(size)


def _heads(config: Any) -> int:
    """Return the number of attention heads; 1 for models without attention."""
    return int(getattr(config, "num_attention_heads", None) or 1)


def _width(module: Any, parameters: Sequence[tuple[Parameter, Tensor]]) -> int:
    """Return the most numbers that a layer takes or gives for a token, embeddings and output head apart."""
    if module is None:
        return max(max(entry.shape, default=1) for entry, _ in parameters)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    chosen = int(getattr(_config(module), "num_experts_per_tok", None) or 1)
    widths = [1]
    for part in module.modules():
        if part is head or isinstance(part, nn.Embedding):
            continue
        # Quantised layers say their width; their tensors do not show it.
        widths += [getattr(part, "in_features", 1), getattr(part, "out_features", 1)]
        for tensor in part.parameters(recurse=False):
            if tensor.is_floating_point() and tensor.ndim in (2, 3):
                widths.append(max(tensor.shape[-2:]) * (chosen if tensor.ndim == 3 else 1))
    return max(widths)


def _config(module: Any) -> Any:
    """Return the text part of a transformers model's configuration; None for other modules."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None
