"""Turn examples into token sequences, and logits into losses.

A sequence is scored on the tokens from `start` on. `text` scores every token that has one before it, `completion` the
completion, `labels` each label's words after the prompt: the loss is the cross-entropy over the labels' total
log-probabilities, the answer is the most probable label. Knows nothing of perturbations: rows are rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec
from peerturb.zo.data import Example, faults_message, read_examples
from peerturb.zo.perturbation import HALVES

TEXT_BLOCK_CHARS = 100_000
"""Long texts are tokenised in blocks of about this size that end at a line end: some tokenizers are quadratic."""

SLICE_LOGITS = 2**18
"""Logits whose softmax is taken at once on a CPU: 1 MiB in f32."""

ANCHORS = ("\n", "a", ".", " ")
"""What a label is put behind to see its tokens in the middle of a text."""

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One example as the model reads it."""

    tokens: Tokens
    start: int
    """First scored token; at least 1. For `labels` the tokens are the prompt alone and `start` is its length."""
    answer: int = 0
    """Index of the right label (`labels` only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A padded batch, `per_example` rows for each example (one, or one per label)."""

    ids: Tensor
    """[rows, tokens] int64, padded on the right: a causal model never looks there. A last token that is only a
    target is left out."""
    positions: Tensor | None
    """[rows, scored] int64: where the logits that predict the targets stand. None: everywhere, in order."""
    targets: Tensor
    """[rows, scored] int64; for labels of one token each, the candidates: [rows, labels]."""
    is_scored: Tensor
    """[rows, scored] bool: False where padded."""
    answers: Tensor
    """[examples] int64: right label (`labels` only)."""
    tokens: int
    """Real tokens in `ids`, padding not counted."""


class Objective:
    """An objective bound to a tokenizer.

    Raises:
        DataError: a label turns into no tokens, or two labels into the same ones.
    """

    def __init__(
        self, spec: ObjectiveSpec, tokenizer: PreTrainedTokenizerBase, *, positions_max: int | None = None
    ) -> None:
        if positions_max is not None and spec.tokens_max > positions_max:
            raise DataError(
                f"objective.tokens_max is {spec.tokens_max}, but the model has only {positions_max} positions"
            )
        self.spec = spec
        self.tokenizer = tokenizer
        self.label_values = tuple(spec.labels)
        self.label_tokens = self._label_tokens() if spec.kind == "labels" else ()
        self.is_single_token = bool(self.label_tokens) and all(len(tokens) == 1 for tokens in self.label_tokens)
        self.per_example = len(self.label_tokens) if self.label_tokens and not self.is_single_token else 1

    def load(self, path: Path) -> list[TokenSequence]:
        """Read a file into sequences.

        Raises:
            DataError: see `read_examples`; besides, completions longer than `tokens_max`, texts of a single token.
        """
        return self.encode(read_examples(path, self.spec), source=str(path))

    def encode(self, examples: Sequence[Example], *, source: str) -> list[TokenSequence]:
        """Tokenise examples; `source` is named in errors."""
        if self.spec.kind == "text":
            sequences = [piece for example in examples for piece in self._pieces(example.prompt)]
        elif self.spec.kind == "labels":
            sequences = self._prompts(examples)
        else:
            sequences = self._completions(examples, source)
        if not sequences:
            raise DataError(f"{source} has no text of two tokens or more; nothing can be predicted")
        return sequences

    def rows(self, sequences: Sequence[TokenSequence]) -> Rows:
        """Pad examples into a batch on the CPU."""
        if self.spec.kind == "labels":
            return self._label_rows(sequences)
        spans = [(s.tokens, s.start) for s in sequences]
        return _pad(spans, torch.zeros(len(sequences), dtype=torch.long))

    def losses(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return each example's loss: [examples]. Token losses are f32, their mean f64: the difference of two losses
        is a thousandth of either.

        Args:
            logits: [rows, scored, vocabulary] at `rows.positions`.
        """
        if self.spec.kind == "labels":
            return F.cross_entropy(self.scores(logits, rows).double(), rows.answers, reduction="none")
        chosen = _log_probabilities(logits, rows.targets).masked_fill(~rows.is_scored, 0.0)
        return -chosen.double().sum(1) / rows.is_scored.sum(1)

    def scores(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return the total log-probability of each label, up to a constant of the example: [examples, labels]."""
        if self.is_single_token:
            return logits[:, 0].gather(1, rows.targets).float()
        chosen = _log_probabilities(logits, rows.targets).masked_fill(~rows.is_scored, 0.0)
        return chosen.sum(1).view(-1, self.per_example)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Return a prompt's tokens, beginning included."""
        return self._ids([prompt], is_start=True)[0]

    def _ids(self, texts: list[str], *, is_start: bool) -> list[list[int]]:
        """Tokenise; `is_start` adds what the tokenizer puts before a text, never what it puts after one."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=is_start, verbose=False)["input_ids"]
        if is_start:
            tail = self._tail()
            ids = [row[: len(row) - tail] for row in ids]
        return ids

    def _head(self) -> list[int]:
        """Special tokens before a text (beginning-of-sequence)."""
        plain = self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        full = self.tokenizer("a", verbose=False)["input_ids"]
        for offset in range(len(full) - len(plain) + 1):
            if full[offset : offset + len(plain)] == plain:
                return list(full[:offset])
        return []

    def _tail(self) -> int:
        """Number of special tokens after a text (end-of-sequence)."""
        plain = self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        full = self.tokenizer("a", verbose=False)["input_ids"]
        return max(0, len(full) - len(plain) - len(self._head()))

    def _pieces(self, text: str) -> list[TokenSequence]:
        """Cut a text into pieces of `tokens_max`; only the first has the tokenizer's beginning, as in the text."""
        blocks = self._ids(_blocks(text), is_start=False)
        tokens = np.concatenate([_array(ids) for ids in (self._head(), *blocks)])
        step = self.spec.tokens_max
        pieces = [tokens[begin : begin + step] for begin in range(0, len(tokens), step)]
        return [TokenSequence(tokens=piece, start=1) for piece in pieces if len(piece) >= 2]

    def _completions(self, examples: Sequence[Example], source: str) -> list[TokenSequence]:
        prompts = self._ids([example.prompt for example in examples], is_start=True)
        wholes = self._ids([example.prompt + example.completion for example in examples], is_start=True)
        head = len(self._head())
        sequences, faults = [], []
        for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
            tail = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._continuation(example.completion)
            if not tail:
                faults.append(f"{example.where}: the completion turns into no tokens")
            elif len(tail) + max(1, head) > self.spec.tokens_max:
                faults.append(
                    f"{example.where}: the completion has {len(tail)} tokens, too long for "
                    f"objective.tokens_max = {self.spec.tokens_max}"
                )
            elif not prompt:
                faults.append(f"{example.where}: the prompt turns into no tokens")
            else:
                kept = _shorten(prompt, head, self.spec.tokens_max - len(tail))
                sequences.append(TokenSequence(tokens=_array(kept + tail), start=len(kept)))
        if faults:
            raise DataError(faults_message(source, faults))
        return sequences

    def _prompts(self, examples: Sequence[Example]) -> list[TokenSequence]:
        head = len(self._head())
        room = self.spec.tokens_max - max(len(tokens) for tokens in self.label_tokens)
        sequences, faults = [], []
        for example, prompt in zip(
            examples, self._ids([example.prompt for example in examples], is_start=True), strict=True
        ):
            if not prompt:
                faults.append(f"{example.where}: the prompt turns into no tokens")
                continue
            kept = _shorten(prompt, head, room)
            answer = self.label_values.index(example.label)
            sequences.append(TokenSequence(tokens=_array(kept), start=len(kept), answer=answer))
        if faults:
            raise DataError(faults_message("the data", faults))
        return sequences

    def _label_tokens(self) -> tuple[Tokens, ...]:
        found: dict[tuple[int, ...], str] = {}
        for value, words in self.spec.labels.items():
            tokens = tuple(self._continuation(words))
            if not tokens:
                raise DataError(f"the words {words!r} of label {value!r} turn into no tokens")
            if tokens in found:
                raise DataError(f"the labels {found[tokens]!r} and {value!r} turn into the same tokens")
            if len(tokens) + max(1, len(self._head())) > self.spec.tokens_max:
                raise DataError(f"the words of label {value!r} have {len(tokens)} tokens, more than tokens_max allows")
            found[tokens] = value
        return tuple(_array(list(tokens)) for tokens in found)

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text that continues another one: without the blank some tokenizers put before a text."""
        for anchor in ANCHORS:
            before, after = self._ids([anchor, anchor + text], is_start=False)
            if before and after[: len(before)] == before:
                return after[len(before) :]
        return self._ids([text], is_start=False)[0]

    def _label_rows(self, sequences: Sequence[TokenSequence]) -> Rows:
        answers = torch.tensor([s.answer for s in sequences], dtype=torch.long)
        if not self.is_single_token:
            spans = [(np.concatenate([s.tokens, tail]), s.start) for s in sequences for tail in self.label_tokens]
            return _pad(spans, answers)
        # One row serves all labels; a stand-in for the scored token keeps the layout.
        rows = _pad([(np.concatenate([s.tokens, self.label_tokens[0]]), s.start) for s in sequences], answers)
        candidates = torch.tensor([int(tokens[0]) for tokens in self.label_tokens])
        return replace(rows, targets=candidates.expand(len(sequences), -1), tokens=rows.tokens - len(sequences))


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, f32 (f64 for f64 logits): [rows, scored]."""
    flat, wanted = logits.flatten(0, 1), targets.reshape(-1, 1)
    # On a CPU a slice at a time, small enough for the cache: a copy of all logits costs more than its arithmetic.
    size = len(flat) if logits.device.type != "cpu" else max(1, SLICE_LOGITS // logits.shape[2])
    parts = []
    for part, index in zip(flat.split(size), wanted.split(size), strict=True):
        wide = part.float() if part.dtype in HALVES else part
        parts.append(-F.cross_entropy(wide, index.squeeze(1), reduction="none"))
    return torch.cat(parts).view(targets.shape)


def _pad(spans: list[tuple[Tokens, int]], answers: Tensor) -> Rows:
    """Build a batch from (tokens, first scored token)."""
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


def _shorten(prompt: list[int], head: int, room: int) -> list[int]:
    """Drop tokens after the head until the prompt fits."""
    excess = len(prompt) - room
    return prompt if excess <= 0 else prompt[:head] + prompt[head + excess :]


def _blocks(text: str) -> list[str]:
    """Split a long text at line ends into blocks of at most about TEXT_BLOCK_CHARS."""
    blocks = []
    begin = 0
    while begin < len(text):
        end = begin + TEXT_BLOCK_CHARS
        if end < len(text):
            end = max(text.rfind("\n", begin, end) + 1, 0) or end
        blocks.append(text[begin:end])
        begin = end
    return blocks


def _array(tokens: list[int]) -> Tokens:
    return np.asarray(tokens, dtype=np.int32)
