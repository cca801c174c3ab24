"""`peerturb bench tuning`: arms differ in what they say, runs end where they began, the best rate is drawn."""

import json
import math
from pathlib import Path

import pytest

from peerturb_bench import tuning
from peerturb_bench.rows import to_json
from peerturb_bench.single import Case, demo_case
from peerturb_bench.tuning import ARMS, GROUPS, Arm, Curve, Plan, best_of, document, draw, rows, spec_of, train


@pytest.fixture(scope="module")
def case() -> Case:
    return demo_case(slots=1, heldout=8)


def test_every_arm_is_a_run_that_differs_from_the_others(case: Case) -> None:
    assert {arm.group for arm in ARMS} == set(GROUPS)
    specs = {}
    for arm in ARMS:
        spec = spec_of(case, arm, rounds=10, seed=0)
        assert spec.step.learning_rate == arm.rate
        assert (spec.round.probes_max, spec.objective.examples_per_probe) == (arm.probes, arm.examples)
        specs[arm.group, arm.label, arm.rate] = spec.digest
    assert len(specs) == len(ARMS)
    assert {spec_of(case, arm, rounds=10, seed=0).step.schedule for arm in ARMS} == {"constant", "linear", "plateau"}


def test_a_run_starts_from_the_base_weights_whatever_ran_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_case", lambda heldout: case)
    arm = Arm(group="rate", label="0.02", rate=0.02, probes=8)
    plan = Plan(seeds=1, sequences=64, points=2, heldout=8, arms=(arm,))
    one = train(plan, arm, seed=0)
    broken = train(plan, Arm(group="rate", label="30", rate=30.0, probes=8), seed=0)
    again = train(plan, arm, seed=0)
    assert one.sequences == [0, 32, 64]
    assert one.losses == again.losses
    assert one.losses[0] == broken.losses[0]
    assert not broken.losses[-1] <= one.losses[-1]


def test_the_best_rate_of_a_label_is_drawn_and_all_are_listed(tmp_path: Path) -> None:
    def runs(*ends: float, alarm: int | None = None) -> list[Curve]:
        return [Curve(sequences=[0, 10], losses=[5.0, end], alarm=alarm) for end in ends]

    low, high, broken = (Arm(group="probes", label="16 × 1", rate=rate, probes=16) for rate in (0.1, 0.2, 0.4))
    alone = Arm(group="rate", label="0.1", rate=0.1)
    curves = {low: runs(4.0, 4.2), high: runs(3.9, 4.0), broken: runs(3.0, math.inf, alarm=7), alone: runs(4.5, 4.5)}
    assert best_of(curves, "probes") == [high]
    made = rows(curves)
    assert [row.value for row in made] == [4.1, 3.95, None, 4.5]
    assert "said to diverge from round 7, 7 on" in made[2].note
    assert json.loads(to_json(made))
    assert document(curves)[2]["runs"][1]["losses"] == [5.0, None]
    draw(tmp_path / "tuning.png", curves)
    assert (tmp_path / "tuning.png").read_bytes()[:4] == b"\x89PNG"
