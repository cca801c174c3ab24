"""What a model answers on the held-out examples: run as a process of its own, prints one JSON object.

`python -m peerturb_node.demo.examples --model DIR --spec RUN.toml --data heldout.jsonl`. It knows no network: model
folder, RunSpec and data go in; accuracy, loss and every answer come out. Plain `transformers` inference, none of the
package's numerics, so what it says about a model is independent of the code that trained it.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec, RunSpec

BATCH_EXAMPLES = 64

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One held-out example and what the model says."""

    text: str
    truth: str
    """The right label."""
    answer: str
    """The label whose words the model finds likeliest."""
    confidence: float
    """Probability of the answer among the labels, in (0, 1]."""

    @property
    def is_right(self) -> bool:
        """Whether the answer is the right label."""
        return self.answer == self.truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A model's result on all held-out examples."""

    accuracy: float
    loss: float
    """Mean of -log p(right label), p among the labels, in nats."""
    answers: tuple[Answer, ...]

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """Read what this module's process printed."""
        document = json.loads(text)
        return cls(
            accuracy=float(document["accuracy"]),
            loss=float(document["loss"]),
            answers=tuple(Answer(**row) for row in document["answers"]),
        )


def judge(model_folder: Path, objective: ObjectiveSpec, rows: Sequence[dict[str, Any]]) -> Verdict:
    """Ask the model for every row's label: the one whose words have the highest log-probability after the prompt.

    Raises:
        DataError: a row lacks a field of the template or the label.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    labels = sorted(objective.labels)
    words = [tokenizer(objective.labels[label], add_special_tokens=False)["input_ids"] for label in labels]
    scores: list[list[float]] = []
    room = objective.tokens_max - max(map(len, words))
    prompts = [_prompt(tokenizer, objective, row, room) for row in rows]
    for start in range(0, len(rows), BATCH_EXAMPLES):
        batch = prompts[start : start + BATCH_EXAMPLES]
        columns = [_continuations(model, batch, word) for word in words]
        scores.extend([list(row) for row in zip(*columns, strict=True)])
    answers = [_answer(row, labels, score, objective) for row, score in zip(rows, scores, strict=True)]
    right = [score[labels.index(answer.truth)] for score, answer in zip(scores, answers, strict=True)]
    losses = [_log_sum(score) - own for score, own in zip(scores, right, strict=True)]
    return Verdict(
        accuracy=sum(answer.is_right for answer in answers) / len(answers),
        loss=sum(losses) / len(losses),
        answers=tuple(answers),
    )


def _prompt(tokenizer: Any, objective: ObjectiveSpec, row: dict[str, Any], room: int) -> list[int]:
    """Return the prompt's tokens; one that is too long loses its beginning."""
    try:
        text = objective.template.format_map(row)
    except KeyError as error:
        raise DataError(f"the template's field {error} is missing in {row!r:.80}") from error
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens[-room:]


def _continuations(model: Any, prompts: Sequence[Sequence[int]], word: Sequence[int]) -> list[float]:
    """Return log p(word | prompt) of every prompt."""
    import torch

    sequences = [[*prompt, *word] for prompt in prompts]
    longest = max(map(len, sequences))
    # Padded on the right: a causal model's earlier positions do not see what comes after them.
    tokens = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return [
        sum(float(logits[i, len(prompt) - 1 + j, token]) for j, token in enumerate(word))
        for i, prompt in enumerate(prompts)
    ]


def _answer(row: dict[str, Any], labels: Sequence[str], score: Sequence[float], objective: ObjectiveSpec) -> Answer:
    truth = str(row.get(objective.label_field))
    if truth not in labels:
        raise DataError(f"the label {truth!r} is none of {', '.join(labels)}")
    best = max(range(len(labels)), key=lambda i: score[i])
    return Answer(
        text=str(row.get("text", "")),
        truth=truth,
        answer=labels[best],
        confidence=math.exp(score[best] - _log_sum(score)),
    )


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def choose(before: Verdict, after: Verdict, count: int) -> list[tuple[Answer, Answer]]:
    """Pick (before, after) pairs to show: corrected mistakes, as many answers that stayed right, a remaining mistake.

    Each kind is taken label by label in turn; where one kind runs out, the others fill its places.
    """
    pairs = list(zip(before.answers, after.answers, strict=True))
    wrong = [pair for pair in pairs if not pair[1].is_right][:1]
    corrected = _in_turn([pair for pair in pairs if not pair[0].is_right and pair[1].is_right])
    kept = _in_turn([pair for pair in pairs if pair[0].is_right and pair[1].is_right])
    room = max(0, count - len(wrong))
    of_kept = min(len(kept), max(room // 2, room - len(corrected)))
    return (corrected[: room - of_kept] + kept[:of_kept] + wrong)[:count]


def _in_turn(pairs: Sequence[tuple[Answer, Answer]]) -> list[tuple[Answer, Answer]]:
    """Order pairs so that the right labels take turns."""
    queues = [[pair for pair in pairs if pair[0].truth == label] for label in sorted({pair[0].truth for pair in pairs})]
    return [pair for row in itertools.zip_longest(*queues) for pair in row if pair is not None]


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    spec: Annotated[Path, typer.Option(help="RunSpec with the objective.")],
    data: Annotated[Path, typer.Option(help="Held-out examples, JSON Lines.")],
) -> None:
    """Print accuracy, loss and all answers of a model as one JSON object."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    print(json.dumps(asdict(judge(model, RunSpec.from_toml(spec).objective, rows))))


if __name__ == "__main__":
    app()
