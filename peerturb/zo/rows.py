"""Batches of token sequences, padded for each kind of model. Knows nothing of text, losses or perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb.zo.kinds import Form

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One example as the model reads it."""

    tokens: Tokens
    start: int
    """First scored token; at least 1. An encoder-decoder's encoder reads what is before, its decoder writes the rest.
    For `labels` and `classes` the tokens are the prompt alone and `start` is its length."""
    answer: int = 0
    """Index of the right label or class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A padded batch, `per_example` rows for each example (one, or one per label)."""

    ids: Tensor
    """[rows, tokens] int64, padded on the right: a causal model never looks there. A last token that is only a
    target is left out."""
    positions: Tensor | None
    """[rows, scored] int64: where the logits that predict the targets stand. None: everywhere, in order."""
    targets: Tensor
    """[rows, scored] int64; for labels of one token each, the candidates: [rows, labels]; for classes [rows, 0]."""
    is_scored: Tensor
    """[rows, scored] bool: False where padded."""
    answers: Tensor
    """[examples] int64: right label or class."""
    tokens: int
    """Real tokens in `ids` and `decoder_ids`, padding not counted."""
    mask: Tensor | None = None
    """[rows, tokens] int64: 0 where `ids` is padded, for models that would look there. None: nothing to hide."""
    decoder_ids: Tensor | None = None
    """[rows, scored] int64: what the decoder reads (`seq2seq` only)."""


def pad_causal(spans: list[tuple[Tokens, int]], answers: Tensor) -> Rows:
    """Build a decoder's batch from (tokens, first scored token)."""
    length = max(len(tokens) for tokens, _ in spans) - 1  # the last token is a target only
    scored = max(len(tokens) - start for tokens, start in spans)
    ids = np.zeros((len(spans), length), dtype=np.int64)
    positions = np.zeros((len(spans), scored), dtype=np.int64)
    targets = np.zeros((len(spans), scored), dtype=np.int64)
    is_scored = np.zeros((len(spans), scored), dtype=np.bool_)
    for row, (tokens, start) in enumerate(spans):
        count = len(tokens) - start
        ids[row, : min(length, len(tokens))] = tokens[:length]
        positions[row, :count] = np.arange(start - 1, len(tokens) - 1)
        targets[row, :count] = tokens[start:]
        is_scored[row, :count] = True
    is_everywhere = scored == length and all(start == 1 for _, start in spans)
    return Rows(
        ids=torch.from_numpy(ids),
        positions=None if is_everywhere else torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        is_scored=torch.from_numpy(is_scored),
        answers=answers,
        tokens=sum(len(tokens) for tokens, _ in spans),
    )


def pad_whole(sequences: Sequence[Tokens], answers: Tensor, form: Form) -> Rows:
    """Build the batch of a model that reads whole sequences, nothing of them scored."""
    ids, mask = _filled(sequences, form.pad)
    return Rows(
        ids=ids,
        positions=None,
        targets=ids.new_zeros(len(ids), 0),
        is_scored=ids.new_zeros(len(ids), 0, dtype=torch.bool),
        answers=answers,
        tokens=sum(len(tokens) for tokens in sequences),
        mask=mask,
    )


def pad_seq2seq(spans: list[tuple[Tokens, int]], answers: Tensor, form: Form) -> Rows:
    """Build an encoder-decoder's batch from (tokens, first token the decoder writes)."""
    ids, mask = _filled([tokens[:start] for tokens, start in spans], form.pad)
    targets, target_mask = _filled([tokens[start:] for tokens, start in spans], form.pad)
    begin = targets.new_full((len(targets), 1), form.begin)
    is_scored = torch.ones_like(targets, dtype=torch.bool) if target_mask is None else target_mask.bool()
    return Rows(
        ids=ids,
        positions=None,
        targets=targets,
        is_scored=is_scored,
        answers=answers,
        tokens=sum(len(tokens) for tokens, _ in spans),
        mask=mask,
        decoder_ids=torch.cat([begin, targets[:, :-1]], 1),
    )


def _filled(sequences: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor | None]:
    """Return [rows, tokens] filled up on the right, and the mask if anything was."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    longest = int(lengths.max())
    ids = np.full((len(sequences), longest), pad, dtype=np.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return torch.from_numpy(ids), None if bool(mask.all()) else mask
