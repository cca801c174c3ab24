"""Held-out figures and shown answers."""

from typing import Any

import numpy as np
import pytest
import torch

from peerturb.spec import ObjectiveSpec
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.evaluate import answers, evaluate
from peerturb.zo.objective import Objective
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model

__all__ = ["one_thread"]

LABELS: dict[str, Any] = {"kind": "labels", "labels": {"n": " bad", "y": " good!"}}


def runner_of(**fields: Any) -> Runner:
    model = small_model("llama-tied", dtype=torch.float64)
    spec = ObjectiveSpec.model_validate({"tokens_max": 16, **fields})
    return Runner(model, manifest_of(model), Objective(spec, byte_tokenizer()))


def test_loss_is_the_mean_over_examples_whatever_their_order() -> None:
    runner = runner_of()
    texts = ["hello there", "x", "to be or not", "abc"]
    sequences = runner.objective.encode([Example(prompt=text, where="x") for text in texts], source="x")
    found = evaluate(runner, sequences)
    assert found is not None
    assert found.accuracy is None
    assert found.examples == 4
    assert found.loss == pytest.approx(np.mean([float(runner.losses([s])[0]) for s in sequences]), abs=1e-6)
    backwards = evaluate(runner, sequences[::-1])
    assert backwards is not None
    assert backwards.loss == pytest.approx(found.loss, abs=1e-9)


def test_accuracy_counts_the_most_probable_label() -> None:
    runner = runner_of(**LABELS)
    texts = [f"text {number}" for number in range(20)]
    said = answers(runner, [Example(prompt=text, label="n", where="x") for text in texts])
    labels = {" bad": "n", " good!": "y"}
    right = [
        Example(prompt=text, label=labels[answer.answer], where="x") for text, answer in zip(texts, said, strict=True)
    ]
    wrong = [Example(prompt=e.prompt, label="y" if e.label == "n" else "n", where="x") for e in right]
    for examples, accuracy in ((right, 1.0), (wrong, 0.0), (right[:15] + wrong[15:], 0.75)):
        found = evaluate(runner, runner.objective.encode(examples, source="x"))
        assert found is not None
        assert found.accuracy == accuracy
    assert all(answer.is_right for answer in answers(runner, right))


def test_evaluation_can_be_stopped() -> None:
    runner = runner_of()
    sequences = runner.objective.encode([Example(prompt="hello", where="x")] * 600, source="x")
    assert evaluate(runner, sequences, should_stop=lambda: True) is None
    assert evaluate(runner, sequences[:1], should_stop=lambda: True) is not None


def test_greedy_answers_are_the_models_most_probable_tokens() -> None:
    runner = runner_of(kind="completion", template="{q}", completion="{a}", tokens_max=12)
    (answer,) = answers(runner, [Example(prompt="hello", completion="x", where="x")])
    tokens = runner.objective.prompt_tokens("hello")
    for _ in range(6):
        token = int(runner.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == 1:
            break
        tokens.append(token)
    assert "hello" + answer.answer == runner.objective.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.expected == "x"
