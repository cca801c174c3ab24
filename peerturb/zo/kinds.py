"""The kinds of transformers models a run can train, and what an objective must know of each. Knows no weights."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from peerturb.errors import ModelError
from peerturb.spec import RunSpec
from peerturb.zo.positions import POSITIONS

ModelKind = Literal["causal", "seq2seq", "classes"]
"""`causal`: a decoder that predicts the next token; `seq2seq`: an encoder reads, a decoder writes; `classes`: a head
turns a whole sequence into one logit a class."""

SHARED_TABLE = "relative_attention_bias"
"""How transformers names embeddings of relative positions, which are looked up once for all rows of a batch."""


ABSOLUTE_TABLE = re.compile(r"(.*\.)?(wpe|\w*position\w*)")
"""How modules are named that hold one vector for each place of a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What of a RunSpec decides which model is built from a folder of weights."""

    classes: int = 0
    """Classes of the head; 0: a language model."""
    seed: int = 0
    """`RunSpec.seed`: where tensors come from that the folder lacks (`peerturb.zo.heads`)."""
    names: tuple[str, ...] = ()
    """The classes' label values, for the configuration of an exported model; none: numbers."""

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """Return the task of a run."""
        return cls(classes=len(spec.objective.classes), seed=spec.seed, names=spec.objective.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an objective must know of the model."""

    kind: ModelKind = "causal"
    pad: int = 0
    """Token that fills rows up."""
    begin: int = 0
    """Token a decoder starts with (`seq2seq` only)."""
    end: int | None = None
    """Token that must stand at the end of every text and nowhere else; None: no such rule."""
    positions_max: int | None = None
    """Longest sequence, or None if the configuration does not say."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the form of a model that `peerturb.zo.model.load_model` has loaded."""
        config = model.config
        pad, end = config.get_text_config().pad_token_id or 0, end_token(model)
        begin = getattr(config, "decoder_start_token_id", None)
        return cls(
            kind=kind_of(model),
            pad=int(end == 0) if pad == end else pad,
            begin=pad if begin is None else begin,
            end=end,
            positions_max=positions_max(model),
        )


def kind_for(config: Any, task: Task) -> ModelKind:
    """Return the kind to build from a configuration.

    Raises:
        ModelError: an encoder is to be trained as a language model, although every token sees those after it.
    """
    if task.classes:
        return "classes"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if is_encoder(config):
        raise ModelError(
            f"the model is an encoder ({config.model_type}): each token sees those after it, so it cannot learn to "
            'predict them. Train it with objective.kind = "classes" (`peerturb model --classes N`)'
        )
    return "causal"


def is_encoder(config: Any) -> bool:
    """True if the library would build a language model from the configuration whose tokens see those after them."""
    kind = config.model_type
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known and not getattr(config, "is_decoder", False)


def kind_of(model: Any) -> ModelKind:
    """Return the kind of a model that has been built; a model wrapped for adapters counts as what is wrapped."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return "classes"
    return "seq2seq" if getattr(getattr(inner, "config", None), "is_encoder_decoder", False) else "causal"


def end_token(model: Any) -> int | None:
    """Return the token where a classifier reads, if it looks for it: an encoder-decoder's (T5, BART) looks for the
    text's end and wants as many of them in every row. None for others."""
    is_one = kind_of(model) == "classes" and getattr(model.config, "is_encoder_decoder", False)
    return model.config.eos_token_id if is_one else None


def output_head(model: Any) -> frozenset[str]:
    """Return the names of the modules that turn the last hidden states into logits."""
    if kind_of(model) == "classes":
        inside = f"{model.base_model_prefix}."
        names = [name for name, _ in model.named_modules() if name]
        return frozenset(name for name in names if not f"{name}.".startswith(inside) or "pooler" in name.split("."))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return frozenset(name for name, module in model.named_modules() if module is head)


def shared_tables(model: nn.Module) -> frozenset[str]:
    """Return the names of embeddings that are looked up once for all rows of a batch."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] == SHARED_TABLE
    )


def positions_max(model: Any) -> int | None:
    """Return the longest sequence the model was made for, or None if nothing limits it or its configuration is silent.

    Where positions are rotated (Llama) that is what the configuration says: more would not fail, but was not trained.
    """
    config = model.config.get_text_config()
    sizes = (getattr(config, field, None) for field in POSITIONS)
    size = next((value for value in sizes if isinstance(value, int) and value > 0), None)
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == size and ABSOLUTE_TABLE.fullmatch(name)
    ]
    if size is None or (hasattr(config, "relative_attention_num_buckets") and not tables):
        return None  # relative positions alone never run out
    # RoBERTa and its kin number positions from behind the padding token's, which their table knows.
    return size - max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
