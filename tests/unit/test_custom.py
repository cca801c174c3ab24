"""A user's own module and functions: trained by the same path as any model, and refused where they cannot be right."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peerturb.errors import DataError, ModelError, ObjectiveError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import ModelSpec, ObjectiveSpec, PerturbationSpec, RoundSpec, RunSpec, StepSpec
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.data import Example
from peerturb.zo.digest import run_digest
from peerturb.zo.local import LocalRun
from peerturb.zo.metrics import ScoredRunner, error_rate, f1_loss
from peerturb.zo.model import base_digest
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.replay import replay
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model, spec_of

__all__ = ["one_thread"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def items(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    return [(x, x[:2].flip(0) * 2) for x in inputs]


def squares(outputs: Tensor, batch: Any) -> Tensor:
    losses: Tensor = (outputs - batch[1]).square().mean(1)
    return losses


def spec(module: nn.Module, *, family: str = "rank1", per_probe: int = 4, sides: str = "two", **model: Any) -> RunSpec:
    return RunSpec(
        name="unit",
        model=base_spec(module, name="mlp", **model),
        perturbation=PerturbationSpec.model_validate({"family": family, "sides": sides}),
        step=StepSpec(learning_rate=0.02),
        round=RoundSpec(probes_max=32),
        objective=ObjectiveSpec(examples_per_probe=per_probe),
    )


def evaluator(module: nn.Module, **changes: Any) -> CustomEvaluator[Any]:
    given: dict[str, Any] = {"loss": squares, **changes}
    return CustomEvaluator(module, base_spec(module, name="mlp"), items(), **given)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_a_module_learns_and_replay_gives_the_same_bits(family: str, dtype: torch.dtype, sides: str) -> None:
    module = network().to(dtype)
    data = [(x.to(dtype), y.to(dtype)) for x, y in items()]
    run_spec = spec(module, family=family, sides=sides)
    custom = CustomEvaluator(module, run_spec.model, data, loss=squares)
    base = [tensor.clone() for _, tensor in custom.parameters]
    run = LocalRun(custom, run_spec, [data[:20], data[20:]])
    before = run.loss(data)
    rounds = list(run.run(30))
    assert run.loss(data) < 0.8 * before
    assert run_digest(run.manifest, [run.evaluator.parameters[0][1], *run.weights[1:]]) == run.digest()
    assert [sealed.round for sealed in rounds] == list(range(30))
    assert all(sealed.counts == (32, 32) for sealed in rounds)
    assert {sealed.tokens for sealed in rounds} == {2 * 4 * (2 * 32 if sides == "two" else 32 + 1)}
    assert rounds[0].digest == run_spec.first_digest
    assert replay(run.rounds, base, run.manifest, run_spec) == run.digest()


@pytest.mark.parametrize("sides", ["two", "one"])
def test_losses_are_those_of_perturbed_copies(sides: str) -> None:
    module = network()
    run_spec = spec(module, per_probe=2, sides=sides)
    custom = CustomEvaluator(module, run_spec.model, items(), loss=squares)
    engine = ProbeEngine(custom, run_spec, items())
    measured = engine.measure(0, slot=3, count=4)  # type: ignore[arg-type]
    from peerturb.zo.directions import Directions, Probes

    drawn = engine.drawn(0, 3, 4)  # type: ignore[arg-type]
    for number in range(4):
        probe = Probes.of(run_key=run_spec.run_key, round=0, slots=3, samples=[number])
        signs = Directions(probe, torch.device("cpu"))
        back = -1e-3 if sides == "two" else 0.0
        for side, found in ((1e-3, measured.plus[number]), (back, measured.reference[number])):
            copy = network()
            for entry, tensor in zip(custom.manifest, dict(sorted(copy.named_parameters())).values(), strict=True):
                z = signs.left(entry)[0].double()
                if entry.kind == "matrix":
                    z = torch.outer(z, signs.right(entry)[0].double())
                tensor.data += (side * z.view(tensor.shape)).float()
            batch = [items()[index] for index in drawn[number]]
            losses = squares(copy(torch.stack([x for x, _ in batch])), (None, torch.stack([y for _, y in batch])))
            assert float(losses.detach().mean()) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": lambda outputs, batch: squares(outputs, batch).mean()}, r"reduction=\"none\".*\(4,\), got \(\)"),
        ({"loss": lambda outputs, batch: outputs}, r"expected shape \(4,\), got \(4, 2\)"),
        ({"loss": lambda outputs, batch: "low"}, "one number for each row; it returned str"),
        ({"loss": lambda outputs, batch: outputs[:, 0] * float("nan")}, "loss of example 0 is nan before any training"),
        ({"loss": lambda outputs, batch: outputs[:, 0] - outputs.mean()}, "`loss` gives example 0 another value alone"),
        ({"forward": lambda module, batch: module(batch[0]) - batch[0].mean()}, "`forward` gives example 0 another"),
        ({"forward": lambda module, batch: module(batch[0]).argmax(1)}, "`forward` returned torch.int64"),
        ({"forward": lambda module, batch: module(batch[0]).sum()}, r"shape \(\) for 4 examples"),
        ({"forward": lambda module, batch: [1.0]}, "`forward` returned list"),
        ({"collate": lambda rows: torch.stack([x for x, _ in rows])}, "the batch is a Tensor, not a tuple"),
        ({"per_probe": 4}, "must return a single number"),
    ],
)
def test_functions_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        evaluator(network(), **changes)


def test_items_and_parts_are_needed() -> None:
    module = network()
    with pytest.raises(ObjectiveError, match="no examples were given"):
        CustomEvaluator(module, base_spec(module, name="mlp"), [], loss=squares)
    with pytest.raises(ModelError, match="at least one peer"):
        LocalRun(evaluator(module), spec(module), [])
    with pytest.raises(DataError, match="examples_per_probe"):
        LocalRun(evaluator(module), spec(module), [items(3)])


def test_items_that_cannot_be_stacked_are_told() -> None:
    rows = [(torch.zeros(3), 1.0), (torch.zeros(4), 1.0)]
    module = network()
    with pytest.raises(ObjectiveError, match="give a `collate` that pads them"):
        CustomEvaluator(module, base_spec(module, name="mlp"), rows, loss=squares)


def test_dictionaries_and_python_losses_serve() -> None:
    module = network()
    rows = [{"x": x, "y": float(y[0]), "note": "text"} for x, y in items()]

    def loss(outputs: Tensor, batch: Any) -> list[float]:
        assert batch["note"][0] == "text"
        return [abs(a - b) for a, b in zip(outputs[:, 0].tolist(), batch["y"].tolist(), strict=True)]

    custom = CustomEvaluator(
        module,
        base_spec(module, name="mlp"),
        rows,
        loss=loss,
        forward=lambda module, batch: module(batch["x"]),
        tokens=lambda item: 7,
    )
    assert custom.size(rows[0]).tokens == 7
    run = LocalRun(custom, spec(module), [rows])
    before = run.loss(rows)
    for _ in run.run(30):
        pass
    assert run.loss(rows) < before


@pytest.mark.parametrize("is_slow", [False, True])
def test_examples_of_different_lengths_are_padded_by_the_user(is_slow: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 6), nn.PReLU() if is_slow else nn.Tanh(), nn.Linear(6, 9))
    lengths = [3, 5, 4, 8, 7, 6] * 4
    rows = [torch.randint(1, 9, (length,)) for length in lengths]

    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(outputs.transpose(1, 2), batch, reduction="none") * (batch > 0)
        return found.sum(1) / (batch > 0).sum(1)

    run_spec = spec(module)
    custom: CustomEvaluator[Tensor] = CustomEvaluator(
        module,
        run_spec.model,
        rows[:6],
        loss=loss,
        forward=lambda module, batch: module(batch),
        collate=lambda chosen: nn.utils.rnn.pad_sequence(list(chosen), batch_first=True),
    )
    with pytest.warns(RuntimeWarning, match=r"1\.weight") if is_slow else nullcontext():
        run = LocalRun(custom, run_spec, [rows])
    before = run.loss(rows)
    for _ in run.run(15):
        pass
    assert run.loss(rows) < before


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 2)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x[:, None]).flatten(1))  # type: ignore[no-any-return]


def test_what_cannot_be_followed_is_named_and_may_be_frozen() -> None:
    module = Convolution()
    with pytest.warns(RuntimeWarning, match=r"slow way.*first\.(weight|bias) cannot be perturbed row by row"):
        LocalRun(CustomEvaluator(module, base_spec(module, name="c"), items(), loss=squares), spec(module), [items()])
    frozen = spec(module, exclude=("first.*",))
    run = LocalRun(CustomEvaluator(module, frozen.model, items(), loss=squares), frozen, [items()])
    before = run.loss(items())
    for _ in run.run(30):
        pass
    assert run.loss(items()) < before


def test_a_step_function_as_loss_does_not_hide_a_parameter_from_the_check() -> None:
    module = Convolution()
    custom = CustomEvaluator(
        module, base_spec(module, name="c"), items(), loss=lambda outputs, batch: (outputs[:, 0] > 9).double()
    )
    with pytest.warns(RuntimeWarning, match="cannot be perturbed row by row"):
        LocalRun(custom, spec(module), [items()])


def test_mixed_types_are_refused() -> None:
    module = network()
    module[0].to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"torch.bfloat16, torch.float32; all must be"):
        base_spec(module, name="mlp")


@pytest.mark.parametrize("sides", ["two", "one"])
def test_a_group_is_measured_whole(sides: str) -> None:
    module = network()
    seen: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> float:
        assert len(outputs) == len(batch[0])
        seen.append(len(outputs))
        return float(squares(outputs, batch).max())

    run_spec = spec(module, per_probe=6, sides=sides)
    custom = CustomEvaluator(module, run_spec.model, items(), loss=loss, per_probe=6)
    with pytest.raises(ObjectiveError, match=r"6 examples of a probe are judged together.*raise rows_max"):
        LocalRun(custom, run_spec, [items()], rows_max=4)
    seen.clear()
    LocalRun(custom, run_spec, [items()]).step()
    assert set(seen) == {6}


def test_error_rate_and_f1() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 5.0, 0.0]])
    answers = torch.tensor([0, 1, 1, 1])
    assert error_rate(scores, answers).tolist() == [0, 0, 1, 0]
    # Label 0: precision 1/2, recall 1, F1 2/3. Label 1: precision 1, recall 2/3, F1 4/5. Label 2 does not occur.
    assert float(f1_loss(scores, answers)) == pytest.approx(1 - (2 / 3 + 4 / 5) / 2)
    assert float(f1_loss(scores[:2], answers[:2])) == 0


@pytest.mark.parametrize(("metric", "per_probe"), [(error_rate, False), (f1_loss, True)])
def test_label_metrics_of_a_language_model(metric: Callable[[Tensor, Tensor], Tensor], per_probe: bool) -> None:
    model = small_model("llama-tied")
    given = {"kind": "labels", "template": "{text}", "labels": {"0": " a", "1": " b"}, "examples_per_probe": 8}
    run_spec = spec_of(objective=given, probes=32, epsilon=0.05, digest=base_digest(model, "float32"))
    run_spec = run_spec.model_copy(update={"step": StepSpec(learning_rate=0.03)})
    objective = Objective(run_spec.objective, byte_tokenizer())
    runner = ScoredRunner(model, manifest_of(model), objective, metric, per_probe=per_probe)
    examples = [Example(prompt="ab"[n % 2] * (2 + n % 5), label=str(n % 2), where=str(n)) for n in range(24)]
    sequences = objective.encode(examples, source="test")
    run = LocalRun(runner, run_spec, [sequences])
    before = run.loss(sequences)
    for _ in run.run(25):
        pass
    assert run.loss(sequences) < before - 0.1, (before, run.loss(sequences))


@pytest.mark.parametrize(("metric", "per_probe"), [(error_rate, False), (f1_loss, True)])
def test_metrics_of_a_classifier(metric: Callable[[Tensor, Tensor], Tensor], per_probe: bool) -> None:
    model = small_model("bert", kind="classes")
    given = {"kind": "classes", "classes": ("0", "1", "2"), "examples_per_probe": 8}
    run_spec = spec_of(objective=given, probes=32, epsilon=0.05, digest=base_digest(model, "float32"))
    run_spec = run_spec.model_copy(update={"step": StepSpec(learning_rate=0.03)})
    objective = Objective.of(run_spec.objective, model, byte_tokenizer())
    runner = ScoredRunner(model, manifest_of(model), objective, metric, per_probe=per_probe)
    examples = [Example(prompt="abc"[n % 3] * (2 + n % 5), label=str(n % 3), where=str(n)) for n in range(24)]
    sequences = objective.encode(examples, source="test")
    scores = objective.scores(runner.logits(objective.rows(sequences)), objective.rows(sequences))
    if not per_probe:
        wrong = scores.argmax(1) != torch.tensor([n % 3 for n in range(24)])
        assert runner.losses(sequences).tolist() == wrong.double().tolist()
    run = LocalRun(runner, run_spec, [sequences])
    before = run.loss(sequences)
    for _ in run.run(25):
        pass
    assert run.loss(sequences) < before - 0.1, (before, run.loss(sequences))


def test_label_metrics_need_labels() -> None:
    model = small_model("llama-tied")
    with pytest.raises(ObjectiveError, match=r'needs objective.kind = "labels" or "classes", not "text"'):
        ScoredRunner(model, manifest_of(model), Objective(ObjectiveSpec(), byte_tokenizer()), error_rate)


def test_a_loss_that_breaks_down_in_training_is_void_not_fatal() -> None:
    module = network()
    calls: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(len(outputs))
        return squares(outputs, batch) if len(calls) < 8 else outputs[:, 0] * float("inf")

    run = LocalRun(evaluator(module, loss=loss), spec(module), [items()])
    for _ in range(8):
        last = run.step()
    assert set(last.codes) == {0x80}
    assert last.alpha == 0.0
    assert last.loss != last.loss


def test_model_spec_is_that_of_the_module() -> None:
    module = network()
    assert base_spec(module, name="mlp") == base_spec(network(), name="mlp")
    assert base_spec(module, name="mlp").digest != base_spec(network(1), name="mlp").digest
    assert isinstance(base_spec(module, name="mlp", exclude=("0.*",)), ModelSpec)


class Scaled(torch.nn.Module):
    """One number an example, times one number that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = torch.nn.Linear(4, 1), torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin(x) * self.scale + self.scale
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sides", ["two", "one"])
def test_a_single_row_of_a_single_number_is_perturbed_too(sides: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Scaled().to(dtype)
    rows = [(torch.randn(4).to(dtype), torch.randn(1).to(dtype)) for _ in range(8)]
    model = base_spec(module, name="m", exclude=("lin.*",))
    perturbation = PerturbationSpec.model_validate({"epsilon": 0.125, "sides": sides})
    run_spec = RunSpec(
        name="one", model=model, perturbation=perturbation, round=RoundSpec(count=4, probes_max=5),
        objective=ObjectiveSpec(examples_per_probe=1),
    )  # fmt: skip
    custom = CustomEvaluator(module, model, rows, loss=lambda found, batch: (found - batch[1]).square().mean(1))
    measured = [
        ProbeEngine(custom, run_spec, rows, rows_max=rows_max).measure(RoundNumber(0), slot=Slot(0))
        for rows_max in (1, None)
    ]
    assert (measured[0].plus != measured[0].reference).all()
    for one, many in zip(*((found.plus, found.reference) for found in measured), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("length", [0, -3, 0.4])
def test_an_impossible_length_is_an_error(length: Any) -> None:
    module = torch.nn.Linear(4, 1)
    run_spec = RunSpec(name="x", model=base_spec(module, name="m"), objective=ObjectiveSpec(examples_per_probe=1))
    rows = [(torch.randn(4), torch.randn(1)) for _ in range(8)]

    def loss(found: Tensor, batch: Any) -> Tensor:
        squares: Tensor = (found - batch[1]).square().mean(1)
        return squares

    custom = CustomEvaluator(module, run_spec.model, rows, loss=loss, tokens=lambda item: length)
    with pytest.raises(ObjectiveError, match="`tokens` returned"):
        LocalRun(custom, run_spec, [rows])
    custom = CustomEvaluator(module, run_spec.model, rows, loss=loss)
    with pytest.raises(ObjectiveError, match="rows_max is 0; give 1 or more"):
        LocalRun(custom, run_spec, [rows], rows_max=0)
    with pytest.raises(DataError, match="no items"):
        LocalRun(custom, run_spec, [rows]).loss([])
