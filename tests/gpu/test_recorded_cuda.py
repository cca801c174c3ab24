"""Recorded forwards on a card give what forwards as they are give, whatever is copied into them."""

from typing import Any

import numpy as np
import pytest
import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.recorded import SEEN_BEFORE
from tests.zo_models import byte_tokenizer, small_model, spec_of

pytestmark = pytest.mark.gpu
TEXTS = ["hello there", "to be or not", "abc", "the quick brown", "fox", "jumps over", "a lazy dog"]
SLOT = Slot(2)
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


def engine_of(name: str, dtype: DType) -> ProbeEngine[TokenSequence]:
    spec = spec_of(family="rank1")
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})
    model: Any = small_model(name, dtype=getattr(torch, dtype))
    manifest = build_manifest(model, spec.model)
    objective = Objective.of(spec.objective, model, byte_tokenizer())
    items = objective.encode([Example(prompt=text, label="", where="x") for text in TEXTS], source="x")
    return ProbeEngine(Runner(model.to("cuda"), manifest, objective), spec, items)


def runner_of(engine: ProbeEngine[TokenSequence]) -> Runner:
    assert isinstance(engine.evaluator, Runner)
    return engine.evaluator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_recordings_give_the_same_losses(name: str, dtype: DType) -> None:
    """Up to rounding: while it is recorded a model writes its mask out, and attention takes another kernel."""
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    recorded, plain = engine_of(name, dtype), engine_of(name, dtype)
    recorder = runner_of(recorded).recorder
    assert recorder is not None
    runner_of(plain).recorder = None
    for number in range(SEEN_BEFORE + 6):
        round_number = RoundNumber(number % 3 + 5)  # the same shapes again, other signs
        found, expected = recorded.measure(round_number, slot=SLOT), plain.measure(round_number, slot=SLOT)
        np.testing.assert_allclose(found.plus, expected.plus, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found.reference, expected.reference, rtol=0, atol=tolerance)
        with torch.no_grad():  # an update in place
            for engine in (recorded, plain):
                for _, weight in engine.evaluator.parameters:
                    weight.add_(1e-3)
    assert recorder.failure is None
    assert recorder._recordings


def test_a_forward_that_waits_for_the_card_is_not_recorded() -> None:
    engine = engine_of("llama-tied", "float32")
    runner = runner_of(engine)
    assert runner.recorder is not None
    forward = runner.model.forward

    def waits(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        assert bool(result.logits.isfinite().all())
        return result

    runner.model.forward = waits
    losses = [engine.measure(RoundNumber(5), slot=SLOT).plus for _ in range(SEEN_BEFORE + 3)]
    assert runner.recorder.failure is not None
    for found in losses[1:]:
        np.testing.assert_array_equal(found, losses[0])
    runner.model.forward = forward
    np.testing.assert_array_equal(engine.measure(RoundNumber(5), slot=SLOT).plus, losses[0])
