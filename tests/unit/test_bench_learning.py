"""`peerturb bench learning` and `exact`: learners are what they are called, rows follow from the runs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerturb import codec, stepping
from peerturb.ids import RoundNumber, Slot
from peerturb_bench import exact, learning, learning_tasks
from peerturb_bench.exact_learner import Exact
from peerturb_bench.learning import Run, Stand, document, measure, panels, summary
from peerturb_bench.learning_tasks import LearningTask, docs_case
from peerturb_bench.shapes import Shape
from peerturb_bench.single import Case, demo_case
from tests.zo_models import one_thread

__all__ = ["one_thread"]

SMALL = Shape(name="small", layers=2, width=32, inner=64, heads=4, key_value_heads=2, vocabulary=128)


@pytest.fixture(scope="module")
def case() -> Case:
    return demo_case(slots=1, heldout=12)


def task_of(case: Case, rates: Mapping[int, float]) -> LearningTask:
    return LearningTask(
        name="demo", case=lambda: case, spsa_rate=1e-2, probes=4, exact_rates=rates, examples=4,
        carried=(32, 0.01, 0.5), mezo_rate=1e-6,
        adamw_rate=1e-3,
    )  # fmt: skip


def test_a_step_of_the_exact_learner_is_a_round_of_the_product(case: Case) -> None:
    base = [value.clone() for value in case.model.parameters()]
    with Exact(case, seed=3, codes=200, examples=4, learning_rate=0.05) as learner:
        weights = [weight.clone() for weight in learner._weights]
        scale = learner._scale
        projected = learner._engine.measure(RoundNumber(0), slot=Slot(0)).projected
        learner.step()
        codes = codec.encode(projected, scale)
        assert learner._scale == stepping.next_scale(scale, codes)
        assert (learner.bytes, learner.forwards) == (200, 3 * 4 * case.objective.per_example)
        assert any(not torch.equal(a, b) for a, b in zip(weights, learner._weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base, case.model.parameters(), strict=True))


def test_every_learner_runs_and_leaves_the_model_as_it_was(case: Case) -> None:
    base = [value.clone() for value in case.model.parameters()]
    runs = measure(task_of(case, {64: 0.02}), case, budget_s=0.05, points=2)
    assert [one.learner for one in runs] == [
        "SPSA, 4 probes", "exact, 64 codes", "exact, 32 codes, carried", "MeZO", "AdamW",
    ]  # fmt: skip
    assert [one.bytes_each for one in runs] == [4, 64, 32, 4, 4 * sum(value.numel() for value in base)]
    assert all(one.stands[0].rounds == 0 and one.stands[-1].rounds >= 1 for one in runs)
    assert len({one.stands[0].loss for one in runs}) == 1
    assert all(torch.equal(a, b) for a, b in zip(base, case.model.parameters(), strict=True))


def run_of(learner: str, losses: list[float], *, bytes_each: int = 100) -> Run:
    stands = [
        Stand(seconds=10.0 * number, rounds=5 * number, loss=loss, accuracy=None) for number, loss in enumerate(losses)
    ]
    return Run(learner=learner, learning_rate=0.1, bytes_each=bytes_each, stands=stands)


RUNS = [
    run_of("SPSA, 4 probes", [3.0, 2.9, 2.8]),
    run_of("exact, 64 codes", [3.0, 2.5, 2.2]),
    run_of("MeZO", [3.0, math.inf, math.inf]),
    run_of("AdamW", [3.0, 2.0, 1.8]),
]


def test_rows_compare_with_what_adamw_has_in_a_tenth_of_the_time() -> None:
    rows = {row.name: row for row in summary("t", RUNS, parameters=1_000, budget_s=100.0)}
    share = rows["t: share of AdamW's gain, exact, 64 codes"]
    assert share.value == pytest.approx(0.8)
    assert share.reference == pytest.approx(1.0)  # AdamW after 10 of 100 s
    assert share.ratio == pytest.approx(0.8)
    assert rows["t: loss after 10 rounds, SPSA, 4 probes"].value == 2.8
    assert rows["t: loss at the end, MeZO"].value is None
    assert rows["t: loss at the end, MeZO"].note == "not finite"
    assert rows["t: bytes a round, exact, 64 codes"].ratio == pytest.approx(100 / 4_000)
    assert "t: bytes a round, AdamW" not in rows


def test_curves_are_written_and_drawn(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = document({"t": RUNS})
    assert found["t"][2]["stands"][1]["loss"] is None
    drawn = panels("t", RUNS)
    assert [panel.x for panel in drawn] == ["seconds of training", "rounds", "bytes sent by a peer"]
    assert list(drawn[2].lines[1].xs) == [0.0, 500.0, 1_000.0]
    monkeypatch.setattr(learning, "TASKS", [task_of(case, {64: 0.02})])
    monkeypatch.setattr(learning, "QUICK_S", 0.05)
    rows = learning.run(quick=True, out=tmp_path)
    assert sum("accuracy" not in row.name for row in rows) == 5 * 2 + 4 * 2
    assert (tmp_path / "learning.png").stat().st_size > 1_000
    assert (tmp_path / "learning.json").is_file()


def test_the_code_model_reads_the_projects_pages() -> None:
    case = docs_case()
    assert len(case.parts[0]) > 500
    assert len(case.heldout) > 50
    kept = {item.tokens.tobytes() for item in case.parts[0]}
    assert np.mean([item.tokens.tobytes() in kept for item in case.heldout]) < 0.05
    assert {task.name for task in learning_tasks.TASKS} >= {"code model on English pages", "stories3m on TREC"}


def test_costs_of_a_contribution_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "LLAMA", SMALL)
    monkeypatch.setattr(exact, "CODES", 64)
    monkeypatch.setattr(exact, "peak", lambda work, device: float(work() is None))
    found: Any = exact._measure("cpu", "float32", 2)
    assert len(found["whole_s"]) == len(found["alone_s"]) == 2
    peaks: Any = exact._measure("cpu", "float32", 0)
    assert set(peaks) == {"inference", "gradient", "contribution"}
    assert exact.engine_of("cpu", "float32").spec.perturbation.exact_rules.codes == 64
