"""Models of known shapes with random weights, for benchmarks of speed and memory: no files, no training."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from peerturb.manifest import DType
from peerturb.zo.model import prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides a model's size: a decoder (`llama`) or an encoder with a head of two classes (`bert`)."""

    name: str
    kind: Literal["llama", "bert"] = "llama"
    layers: int
    width: int
    inner: int
    """Width between the two matrices of a layer's second half."""
    heads: int
    key_value_heads: int = 0
    """`llama` only."""
    vocabulary: int
    is_tied: bool = False
    """Whether the output embedding is the input embedding (`llama` only)."""


STORIES3M = Shape(
    name="stories3m", layers=6, width=192, inner=512, heads=6, key_value_heads=2, vocabulary=4_096, is_tied=True
)
MINILM = Shape(name="MiniLM encoder", kind="bert", layers=6, width=384, inner=1_536, heads=12, vocabulary=30_522)
LLAMA = Shape(name="llama", layers=12, width=512, inner=1_376, heads=8, key_value_heads=8, vocabulary=16_384)
"""54.7 million parameters; with a tied head it would be 46.3."""
GIANT = Shape(
    name="llama", layers=16, width=2_048, inner=8_192, heads=32, key_value_heads=8, vocabulary=32_000, is_tied=True
)
"""1.04 billion parameters."""


def build(shape: Shape, dtype: DType, *, positions: int) -> PreTrainedModel:
    """Return a model of the shape, ready for probes, its weights the same at every call.

    Args:
        positions: longest sequence it must read, in tokens.
    """
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
    }
    if shape.kind == "bert":
        model = AutoModelForSequenceClassification.from_config(BertConfig(**{**common, "num_labels": 2}))
    else:
        config = LlamaConfig(**common, num_key_value_heads=shape.key_value_heads, tie_word_embeddings=shape.is_tied)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return prepare(model, dtype)
