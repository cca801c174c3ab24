"""Turn examples into token sequences, and logits into losses.

A sequence is scored on the tokens from `start` on. `text` scores every token that has one before it, `completion` the
completion, `labels` each label's words after the prompt: the loss is the cross-entropy over the labels' total
log-probabilities, the answer is the most probable label. `classes` reads the whole prompt and takes the cross-entropy
of a head's logits. An encoder-decoder reads the prompt and writes the completion or label. Knows nothing of
perturbations: rows are rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec
from peerturb.zo.data import Example, faults_message, read_examples
from peerturb.zo.kinds import Form
from peerturb.zo.perturbation import HALVES
from peerturb.zo.rows import Rows, Tokens, TokenSequence, pad_causal, pad_seq2seq, pad_whole

TEXT_BLOCK_CHARS = 100_000
"""Long texts are tokenised in blocks of about this size that end at a line end: some tokenizers are quadratic."""

SLICE_LOGITS = 2**18
"""Logits whose softmax is taken at once on a CPU: 1 MiB in f32."""

ANCHORS = ("\n", "a", ".", " ")
"""What a label is put behind to see its tokens in the middle of a text."""

CAUSAL = Form()

__all__ = ["Objective", "Rows", "TokenSequence"]


class Objective:
    """An objective bound to a tokenizer.

    Args:
        form: what kind of model it is for.

    Raises:
        DataError: a label turns into no tokens, or two labels into the same ones; the model is of another kind.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        positions_max: int | None = None,
        form: Form = CAUSAL,
    ) -> None:
        _check_kind(spec, form)
        if positions_max is not None and spec.tokens_max > positions_max:
            raise DataError(
                f"objective.tokens_max is {spec.tokens_max}, but the model has only {positions_max} positions"
            )
        self.spec = spec
        self.tokenizer = tokenizer
        self.form = form
        self.label_values = spec.classes if spec.kind == "classes" else tuple(spec.labels)
        self.label_tokens = self._label_tokens() if spec.kind == "labels" else ()
        self.is_single_token = bool(self.label_tokens) and all(len(tokens) == 1 for tokens in self.label_tokens)
        self.is_single_token &= form.kind == "causal"
        self.per_example = len(self.label_tokens) if self.label_tokens and not self.is_single_token else 1

    @classmethod
    def of(cls, spec: ObjectiveSpec, model: Any, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Bind an objective to a loaded model and its tokenizer.

        Raises:
            DataError: see the class; besides, `tokens_max` exceeds the model's positions.
        """
        form = Form.of(model)
        return cls(spec, tokenizer, positions_max=form.positions_max, form=form)

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
        elif self.spec.kind in ("labels", "classes"):
            sequences = self._prompts(examples)
        elif self.form.kind == "seq2seq":
            sequences = self._pairs(examples, source)
        else:
            sequences = self._completions(examples, source)
        if not sequences:
            raise DataError(f"{source} has no text of two tokens or more; nothing can be predicted")
        return sequences

    def rows(self, sequences: Sequence[TokenSequence]) -> Rows:
        """Pad examples into a batch on the CPU."""
        answers = torch.tensor([s.answer for s in sequences], dtype=torch.long)
        if self.spec.kind == "classes":
            return pad_whole([s.tokens for s in sequences], answers, self.form)
        if self.spec.kind == "labels":
            return self._label_rows(sequences, answers)
        spans = [(s.tokens, s.start) for s in sequences]
        return pad_seq2seq(spans, answers, self.form) if self.form.kind == "seq2seq" else pad_causal(spans, answers)

    def losses(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return each example's loss: [examples]. Token losses are f32, their mean f64: the difference of two losses
        is a thousandth of either.

        Args:
            logits: [rows, scored, vocabulary] at `rows.positions`, or [rows, classes].
        """
        if self.spec.kind in ("labels", "classes"):
            return F.cross_entropy(self.scores(logits, rows).double(), rows.answers, reduction="none")
        chosen = _log_probabilities(logits, rows.targets).masked_fill(~rows.is_scored, 0.0)
        return -chosen.double().sum(1) / rows.is_scored.sum(1)

    def scores(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return the log-probability of each label or class, up to a constant of the example: [examples, labels]."""
        if self.spec.kind == "classes":
            return logits.float() if logits.dtype in HALVES else logits
        if self.is_single_token:
            return logits[:, 0].gather(1, rows.targets).float()
        chosen = _log_probabilities(logits, rows.targets).masked_fill(~rows.is_scored, 0.0)
        return chosen.sum(1).view(-1, self.per_example)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Return a prompt's tokens, beginning included; for an encoder the end too."""
        return self._ids([prompt], is_start=True, is_end=self.form.kind != "causal")[0]

    def _ids(self, texts: list[str], *, is_start: bool, is_end: bool = False) -> list[list[int]]:
        """Tokenise; `is_start` adds what the tokenizer puts before a text, `is_end` (then) what it puts after one."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=is_start, verbose=False)["input_ids"]
        if is_start and not is_end:
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

    def _pairs(self, examples: Sequence[Example], source: str) -> list[TokenSequence]:
        """Encode prompt and completion apart, each with the tokenizer's end, for an encoder-decoder."""
        prompts = self._ids([example.prompt for example in examples], is_start=True, is_end=True)
        sequences, faults = [], []
        for example, prompt in zip(examples, prompts, strict=True):
            written = self._written(example.completion)
            if len(written) > self.spec.tokens_max:
                faults.append(
                    f"{example.where}: the completion has {len(written)} tokens, too long for "
                    f"objective.tokens_max = {self.spec.tokens_max}"
                )
            elif not prompt or not written:
                faults.append(f"{example.where}: the {'completion' if prompt else 'prompt'} turns into no tokens")
            else:
                kept = _shorten(prompt, len(self._head()), self.spec.tokens_max)
                sequences.append(TokenSequence(tokens=_array(kept + written), start=len(kept)))
        if faults:
            raise DataError(faults_message(source, faults))
        return sequences

    def _written(self, text: str) -> list[int]:
        """Tokens a decoder writes for a text: its own, and the tokenizer's end."""
        head = len(self._head())
        return self._ids([text], is_start=True, is_end=True)[0][head:]

    def _prompts(self, examples: Sequence[Example]) -> list[TokenSequence]:
        head = len(self._head())
        is_read = self.form.kind != "causal"  # by an encoder or a head, labels apart
        room = self.spec.tokens_max - (0 if is_read else max(len(tokens) for tokens in self.label_tokens))
        prompts = self._ids([example.prompt for example in examples], is_start=True, is_end=is_read)
        sequences, faults = [], []
        for example, prompt in zip(examples, prompts, strict=True):
            if not prompt:
                faults.append(f"{example.where}: the prompt turns into no tokens")
                continue
            if self.form.end is not None:  # also where the tokenizer puts none, or the text itself holds one
                prompt = [token for token in prompt if token != self.form.end] + [self.form.end]
            kept = _shorten(prompt, head, room)
            answer = self.label_values.index(example.label)
            sequences.append(TokenSequence(tokens=_array(kept), start=len(kept), answer=answer))
        if faults:
            raise DataError(faults_message("the data", faults))
        return sequences

    def _label_tokens(self) -> tuple[Tokens, ...]:
        found: dict[tuple[int, ...], str] = {}
        for value, words in self.spec.labels.items():
            tokens = tuple(self._written(words) if self.form.kind == "seq2seq" else self._continuation(words))
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

    def _label_rows(self, sequences: Sequence[TokenSequence], answers: Tensor) -> Rows:
        if not self.is_single_token:
            spans = [(np.concatenate([s.tokens, tail]), s.start) for s in sequences for tail in self.label_tokens]
            return pad_seq2seq(spans, answers, self.form) if self.form.kind == "seq2seq" else pad_causal(spans, answers)
        # One row serves all labels; a stand-in for the scored token keeps the layout.
        rows = pad_causal([(np.concatenate([s.tokens, self.label_tokens[0]]), s.start) for s in sequences], answers)
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


def _check_kind(spec: ObjectiveSpec, form: Form) -> None:
    if (spec.kind == "classes") != (form.kind == "classes"):
        raise DataError(
            f'objective.kind = "{spec.kind}" does not fit the model, which '
            + ("has a classification head" if form.kind == "classes" else "has no classification head")
        )
    if form.kind == "seq2seq" and spec.kind == "text":
        raise DataError(
            'objective.kind = "text" scores the text a model reads, but an encoder-decoder is scored on what it '
            'writes; use "completion" or "labels"'
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
