"""The exact engine: one gradient whatever the micro-batches, weights left alone, faults told, memory asked for less."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peerturb.codec import encode
from peerturb.errors import DataError, ModelError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import AdapterSpec, ModelSpec
from peerturb.stepping import VOID
from peerturb.zo import gradients
from peerturb.zo.adapters import attach_adapter
from peerturb.zo.batch import Runner
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.data import Example
from peerturb.zo.exact import ExactEngine
from peerturb.zo.gradients import Activations, Backward
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.projection import Projector
from peerturb.zo.quantised import quantise_base
from peerturb.zo.recompute import blocks_of
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model, spec_of

__all__ = ["one_thread"]

TEXTS = ["hello there", "to be or not", "abc", "the quick brown", "fox", "jumps over", "a lazy dog"]
ROUND, SLOT = RoundNumber(4), Slot(2)


def runner_of(name: str = "llama-tied", dtype: torch.dtype = torch.float32) -> tuple[Runner, list[TokenSequence]]:
    model = small_model(name)
    manifest = manifest_of(model)
    objective = Objective(spec_of().objective, byte_tokenizer())
    items = objective.encode([Example(prompt=text, where="x") for text in TEXTS], source="x")
    return Runner(model.to(dtype), manifest, objective), items


def engine_of(
    name: str = "llama-tied", dtype: torch.dtype = torch.float32, *, family: str = "rank1", **options: Any
) -> ExactEngine[TokenSequence]:
    runner, items = runner_of(name, dtype)
    return ExactEngine(runner, spec_of(family=family), items, examples=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_contribution_leaves_weights_and_model_alone(dtype: torch.dtype) -> None:
    engine = engine_of(dtype=dtype, activations="recompute")
    model: Any = engine.evaluator
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    engine.contribute(ROUND, slot=SLOT, scale=0.05, count=9)
    for name, value in model.model.named_parameters():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
        assert not value.requires_grad
        assert value.grad is None
    assert not any("forward" in block.__dict__ for block in blocks_of(model.model))


def test_a_contribution_can_be_repeated_and_rounds_and_slots_differ() -> None:
    engine = engine_of()
    first = engine.contribute(ROUND, slot=SLOT, scale=0.01, count=700)
    assert engine_of().contribute(ROUND, slot=SLOT, scale=0.01, count=700).codes.tobytes() == first.codes.tobytes()
    assert len(first.codes) == 700
    for round_, slot in ((RoundNumber(5), SLOT), (ROUND, Slot(3))):
        assert engine.contribute(round_, slot=slot, scale=0.01, count=700).codes.tobytes() != first.codes.tobytes()
    few = engine.contribute(ROUND, slot=SLOT, scale=0.01, count=5)
    assert few.codes.tobytes() == first.codes[:5].tobytes()


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("rows_max", [1, 3, None])
def test_micro_batches_and_recomputing_change_nothing(rows_max: int | None, activations: Activations) -> None:
    runner, items = runner_of(dtype=torch.float64)
    whole = Backward(runner, items, activations="keep").gradient(items)
    parts = Backward(runner, items, rows_max=rows_max, activations=activations).gradient(items)
    assert whole is not None
    assert parts is not None
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.tokens == whole.tokens == sum(len(item.tokens) for item in items)
    for ours, theirs in zip(parts.tensors, whole.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_gradients_are_added_in_float32() -> None:
    runner, items = runner_of(dtype=torch.bfloat16)
    found = Backward(runner, items, rows_max=1).gradient(items)
    assert found is not None
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors)


def test_examples_are_drawn_anew_each_round_until_all_were_seen() -> None:
    engine = engine_of()
    engine.examples = 3
    first, second = (set(engine.drawn(RoundNumber(round_), SLOT).tolist()) for round_ in (0, 1))
    assert len(first | second) == 6
    alone = ExactEngine(*_three(engine), examples=64)
    assert sorted(alone.drawn(ROUND, SLOT).tolist()) == list(range(len(TEXTS)))


def _three(engine: ExactEngine[TokenSequence]) -> tuple[Any, Any, Any]:
    return engine.evaluator, engine.spec, engine.items


def test_memory_that_runs_out_halves_passes_and_then_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, items = runner_of()
    backward = Backward(runner, items)
    whole = backward.gradient(items)
    real, limit = runner.graph_losses, [2]

    def short(sequences: Any) -> Tensor:
        if len(sequences) > limit[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real(sequences)

    monkeypatch.setattr(runner, "graph_losses", short)
    halved = backward.gradient(items)
    assert whole is not None
    assert halved is not None
    torch.testing.assert_close(halved.tensors, whole.tensors, rtol=1e-4, atol=1e-5)
    assert not backward.is_recomputed
    limit[0] = 0
    with pytest.raises(ModelError, match=r'--rows.*activations = "recompute".*estimator = "spsa"'):
        backward.gradient(items)
    assert backward.is_recomputed


def test_too_little_memory_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, items = runner_of()
    need = Backward(runner, items, activations="keep").need
    monkeypatch.setattr(gradients, "free_bytes", lambda device: 2 * (need.sums + int(10 * need.token)))
    with pytest.raises(ModelError, match="MiB are wanted"):
        Backward(runner, items, activations="keep")
    monkeypatch.setattr(gradients, "free_bytes", lambda device: 2 * (need.sums + int(1.4 * 12 * need.token)))
    monkeypatch.setattr(gradients, "blocks_of", lambda module: [nn.Identity()] * 40)
    assert Backward(runner, items).is_recomputed


def test_stopped_before_the_gradient_is_whole_there_are_no_codes() -> None:
    engine = engine_of(rows_max=1)
    result = engine.contribute(ROUND, slot=SLOT, scale=0.01, count=9, should_stop=lambda: True)
    assert len(result.codes) == 0
    calls = iter([False] * 4 + [True] * 9)  # four micro-batches, then between parts of the directions
    result = engine.contribute(ROUND, slot=SLOT, scale=0.01, count=2_000, should_stop=lambda: next(calls))
    assert 0 < len(result.codes) < 2_000


def test_what_is_carried_over_is_a_decaying_sum_of_gradients() -> None:
    plain, carrying = engine_of(dtype=torch.float64), engine_of(dtype=torch.float64, carry=0.5)
    assert carrying.backward.need.sums == 2 * plain.backward.need.sums
    manifest = tuple(entry for entry, _ in plain.evaluator.parameters)

    def gradient(round_: int) -> list[Tensor]:
        drawn = plain.drawn(RoundNumber(round_), SLOT).tolist()
        found = plain.backward.gradient([plain.items[number] for number in drawn])
        assert found is not None
        return found.tensors

    parts = [gradient(round_) for round_ in (1, 2, 4)]
    total = [0.5 * (0.5 * a + b) + c for a, b, c in zip(*parts, strict=True)]
    for round_ in (1, 2, 4):
        found = carrying.measure(RoundNumber(round_), slot=SLOT, count=20)
    expected = Projector(manifest, total, "rank1").project(
        run_key=plain.spec.run_key, round=4, slot=int(SLOT), count=20
    )
    np.testing.assert_allclose(found.projected, expected, rtol=1e-9, atol=1e-9)
    # Measured again, after a rebuild for instance, or forgotten: the round's own gradient.
    again = carrying.measure(RoundNumber(4), slot=SLOT, count=20)
    np.testing.assert_allclose(again.projected, plain.measure(RoundNumber(4), slot=SLOT, count=20).projected, rtol=1e-9)
    carrying.forget()
    later = carrying.measure(RoundNumber(5), slot=SLOT, count=20)
    np.testing.assert_allclose(later.projected, plain.measure(RoundNumber(5), slot=SLOT, count=20).projected, rtol=1e-9)


def test_a_broken_model_gives_void_codes() -> None:
    engine = engine_of()
    engine.evaluator.parameters[0][1].data.fill_(float("nan"))
    result = engine.contribute(ROUND, slot=SLOT, scale=0.01, count=9)
    assert (result.codes == VOID).all()
    assert np.isnan(result.loss)


def test_stochastic_rounding_is_that_of_the_run() -> None:
    engine = engine_of()
    perturbation = engine.spec.perturbation.model_copy(update={"rounding": "stochastic"})
    engine.spec = engine.spec.model_copy(update={"perturbation": perturbation})
    scale = 3.0
    codes = engine.contribute(ROUND, slot=SLOT, scale=scale, count=500).codes
    projected = engine.measure(ROUND, slot=SLOT, count=500).projected
    assert np.abs(codes - np.clip(projected / scale, -127, 127)).max() <= 1
    assert (codes != encode(projected, scale)).any()


@pytest.mark.parametrize("quantise", [None, "int8"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_adapters_have_exact_codes_over_a_frozen_base(family: Any, quantise: Any) -> None:
    pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")
    model = small_model("llama-untied-biased")
    quantise_base(model, quantise)
    section = ModelSpec(name="base", digest="0" * 64, adapter=AdapterSpec(rank=4), quantise=quantise)
    attach_adapter(model, section, seed=5)
    manifest = build_manifest(model, section)
    objective = Objective(spec_of().objective, byte_tokenizer())
    items = objective.encode([Example(prompt=text, where="x") for text in TEXTS], source="x")
    runner = Runner(model, manifest, objective)
    for _, weight in runner.parameters:
        weight.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    found = Backward(runner, items).gradient(items)
    assert found is not None
    exact = Projector(manifest, found.tensors, family).project(run_key=3, round=4, slot=2, count=3)
    # A step along the gradient: what it gives is what the gradients of the adapter promise, base frozen or not.
    before = float(runner.losses(items).mean())
    length = sum(float(g.double().square().sum()) for g in found.tensors)
    for (_, weight), gradient in zip(runner.parameters, found.tensors, strict=True):
        weight.data.sub_(gradient, alpha=1e-3 / length)
    assert before - float(runner.losses(items).mean()) == pytest.approx(1e-3, rel=0.05)
    assert np.isfinite(exact).all()
    assert len(manifest) == 28


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


ITEMS = [(torch.tensor([1.0, 2.0, float(n)]), float(n % 2)) for n in range(6)]


def custom_of(loss: Any, **more: Any) -> CustomEvaluator[Any]:
    torch.manual_seed(3)
    module = _Two()
    return CustomEvaluator(module, base_spec(module, name="two"), ITEMS, loss=loss, **more)


def test_a_users_own_loss_is_differentiated() -> None:
    evaluator = custom_of(lambda outputs, batch: (outputs[:, 0] - batch[1]).square())
    found = Backward(evaluator, ITEMS).gradient(ITEMS)
    assert found is not None
    x, y = torch.stack([item[0] for item in ITEMS]), torch.tensor([item[1] for item in ITEMS])
    errors = evaluator.module(x)[:, 0] - y
    torch.testing.assert_close(found.tensors[1].view(3), (2 * errors[:, None] * x).mean(0))


@pytest.mark.parametrize(
    ("loss", "more", "why"),
    [
        (lambda outputs, batch: ((outputs[:, 0] > 0.5) != (batch[1] > 0)).double(), {}, "accuracy, F1 or a reward"),
        (lambda outputs, batch: outputs[:, 0].tolist(), {}, "accuracy, F1 or a reward"),
        (lambda outputs, batch: outputs.square().mean(), {"per_probe": 2}, "judges a probe's examples together"),
    ],
)
def test_what_cannot_be_differentiated_is_told(loss: Any, more: Any, why: str) -> None:
    with pytest.raises(ModelError, match=f'{why}.*estimator = "spsa"'):
        Backward(custom_of(loss, **more), ITEMS)


def test_float16_and_no_data_are_refused() -> None:
    runner, items = runner_of(dtype=torch.float16)
    with pytest.raises(ModelError, match='compute_dtype = "float32"'):
        Backward(runner, items)
    with pytest.raises(DataError, match="no examples"):
        ExactEngine(runner, spec_of(), [])


def test_an_evaluator_without_gradients_is_refused() -> None:
    runner, items = runner_of()

    class Judge:
        is_whole = False

    judge: Any = Judge()
    with pytest.raises(ModelError, match="judges what a model writes"):
        Backward(judge, items)
    del runner
