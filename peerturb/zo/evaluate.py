"""Held-out loss and accuracy, and the model's answers to a few examples. Plain weights, no perturbation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.objective import TokenSequence
from peerturb.zo.room import in_parts

FORWARD_TOKENS, FORWARD_EXAMPLES = 4_096, 256
"""Most in one forward; fixed, so that equal weights on one machine give equal figures as long as memory suffices."""

CHOICES = ("labels", "classes")
"""Kinds of objective with a right answer among few."""

ANSWER_TOKENS_MAX = 48
"""Longest greedy continuation shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures over a held-out file."""

    loss: float
    """Mean of the examples' losses."""
    accuracy: float | None
    """Fraction whose most probable label or class is the right one, in [0, 1]; None without any."""
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model says to one example."""

    prompt: str
    answer: str
    """The chosen label's words, the chosen class, or greedy text."""
    expected: str
    """The right label's words, the right class or the completion; empty for `text`."""

    @property
    def is_right(self) -> bool:
        """True if the answer is what was expected."""
        return bool(self.expected) and self.answer.strip() == self.expected.strip()


@torch.inference_mode()
def evaluate(
    runner: Runner, sequences: Sequence[TokenSequence], *, should_stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Return loss and accuracy over all sequences, in their order of length; None if stopped before the end."""
    has_labels = runner.objective.spec.kind in CHOICES
    ordered = sorted(sequences, key=lambda sequence: len(sequence.tokens))
    total, right, done = 0.0, 0, 0
    work = partial(_figures, runner, has_labels)
    for losses, hits, count in in_parts(
        runner, ordered, work, items_max=FORWARD_EXAMPLES, tokens_max=FORWARD_TOKENS, is_whole=False
    ):
        total, right, done = total + losses, right + hits, done + count
        if done < len(ordered) and should_stop():
            return None
    return Evaluation(loss=total / done, accuracy=right / done if has_labels else None, examples=done)


def _figures(runner: Runner, has_labels: bool, sequences: Sequence[TokenSequence]) -> tuple[float, int, int]:
    """Return the sum of the losses, the right answers, and the number of examples of one forward."""
    objective = runner.objective
    rows = runner.place(objective.rows(sequences))
    logits = runner.logits(rows)
    right = int((objective.scores(logits, rows).argmax(1) == rows.answers).sum()) if has_labels else 0
    return float(objective.losses(logits, rows).sum()), right, len(sequences)


@torch.inference_mode()
def answers(runner: Runner, examples: Sequence[Example]) -> list[Answer]:
    """Return the model's answers: the most probable label or class, or greedy text (`text`: what follows)."""
    objective = runner.objective
    if objective.spec.kind in CHOICES:
        sequences = objective.encode(examples, source="the examples")
        work = partial(_chosen, runner)
        parts = in_parts(runner, sequences, work, items_max=FORWARD_EXAMPLES, tokens_max=FORWARD_TOKENS, is_whole=False)
        chosen = [index for part in parts for index in part]
        words = {value: objective.spec.labels.get(value, value) for value in objective.label_values}
        return [
            Answer(
                prompt=example.prompt,
                answer=words[objective.label_values[index]],
                expected=words[example.label],
            )
            for example, index in zip(examples, chosen, strict=True)
        ]
    return [
        Answer(prompt=example.prompt, answer=_continue(runner, example.prompt), expected=example.completion)
        for example in examples
    ]


def _chosen(runner: Runner, sequences: Sequence[TokenSequence]) -> list[int]:
    """Return the number of each example's most probable label or class."""
    rows = runner.place(runner.objective.rows(sequences))
    indices: list[int] = runner.objective.scores(runner.logits(rows), rows).argmax(1).tolist()
    return indices


def _continue(runner: Runner, prompt: str) -> str:
    """Greedy text after a prompt, within the objective's `tokens_max`."""
    objective = runner.objective
    ids = objective.prompt_tokens(prompt)
    if runner.kind == "seq2seq":
        return _write(runner, ids[: objective.spec.tokens_max])
    room = max(1, min(ANSWER_TOKENS_MAX, objective.spec.tokens_max // 2))
    ids = ids[-(objective.spec.tokens_max - room) :] or [0]
    end = objective.tokenizer.eos_token_id
    said: list[int] = []
    for _ in range(room):
        given = torch.tensor([ids + said], device=runner.device)
        token = int(runner.model(input_ids=given, use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    start = objective.tokenizer.decode(ids, skip_special_tokens=True)
    # Decoding the whole and cutting keeps blanks between words that some tokenizers drop at the start of a text.
    whole = objective.tokenizer.decode(ids + said, skip_special_tokens=True)
    return str(whole)[len(str(start)) :]


def _write(runner: Runner, ids: list[int]) -> str:
    """Greedy text of an encoder-decoder that reads `ids`."""
    objective = runner.objective
    end = objective.tokenizer.eos_token_id
    read = torch.tensor([ids], device=runner.device)
    said: list[int] = []
    for _ in range(min(ANSWER_TOKENS_MAX, objective.spec.tokens_max)):
        written = torch.tensor([[objective.form.begin, *said]], device=runner.device)
        logits = runner.model(input_ids=read, decoder_input_ids=written, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    return str(objective.tokenizer.decode(said, skip_special_tokens=True))
