"""Held-out loss and accuracy, and the model's answers to a few examples. Plain weights, no perturbation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.objective import TokenSequence

FORWARD_TOKENS = 4_096
"""Tokens in one forward; fixed, so that equal weights on one machine give equal figures."""

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
    objective = runner.objective
    has_labels = objective.spec.kind in CHOICES
    order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index].tokens), index))
    total, right, done = 0.0, 0, 0
    while done < len(order):
        if done and should_stop():
            return None
        longest = len(sequences[order[min(done + 255, len(order) - 1)]].tokens)
        size = max(1, min(256, FORWARD_TOKENS // (longest * objective.per_example)))
        part = [sequences[index] for index in order[done : done + size]]
        rows = runner.place(objective.rows(part))
        logits = runner.logits(rows)
        total += float(objective.losses(logits, rows).sum())
        if has_labels:
            right += int((objective.scores(logits, rows).argmax(1) == rows.answers).sum())
        done += len(part)
    return Evaluation(loss=total / done, accuracy=right / done if has_labels else None, examples=done)


@torch.inference_mode()
def answers(runner: Runner, examples: Sequence[Example]) -> list[Answer]:
    """Return the model's answers: the most probable label or class, or greedy text (`text`: what follows)."""
    objective = runner.objective
    if objective.spec.kind in CHOICES:
        rows = runner.place(objective.rows(objective.encode(examples, source="the examples")))
        chosen = objective.scores(runner.logits(rows), rows).argmax(1).tolist()
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
