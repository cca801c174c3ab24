"""`peerturb bench sides`: arms cost the same, spend what they say, and are compared at their best rates."""

import itertools
from typing import Any

import numpy as np
import pytest

from peerturb.zo.data import Example
from peerturb.zo.objective import Objective
from peerturb_bench.sides import FULL, QUICK, Arm, Job, Plan, rows, spec_of
from peerturb_bench.single import ByteExchange, Case, Trainer, forwards
from tests.zo_models import byte_tokenizer, one_thread, small_model
from tests.zo_models import spec_of as small_spec

__all__ = ["one_thread"]

PLAN = Plan(seeds=2, rounds=1, forwards=8, shared=(1, 2), lengths=(1e-3, 2e-3), heldout=8, common_rounds=1)


@pytest.fixture(scope="module")
def case() -> Case:
    spec = small_spec()
    objective = Objective(spec.objective, byte_tokenizer())
    examples = [Example(prompt=f"text {number}", where="x") for number in range(64)]
    items = objective.encode(examples, source="x")
    return Case(
        name="x", model=small_model("llama-tied"), spec=spec, objective=objective, parts=(items,), heldout=items[:4]
    )


@pytest.mark.parametrize("plan", [FULL, QUICK, PLAN])
def test_all_arms_cost_the_same_forward_passes(plan: Plan, case: Case) -> None:
    assert {forwards(spec_of(case, arm)) for arm in plan.arms} == {plan.forwards}
    assert plan.arms[0].sides == "two"


@pytest.mark.parametrize("number", range(3))
def test_a_round_spends_what_is_said(number: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(case, PLAN.arms[number])
    with Trainer(case, ByteExchange(spec), spec) as trainer:
        spent = []
        losses = trainer._runner.losses

        def counted(items: Any, perturbation: Any = None) -> Any:
            found = losses(items, perturbation)
            spent.append(found.numel())
            return found

        monkeypatch.setattr(trainer._runner, "losses", counted)
        trainer.step()
    assert sum(spent) == PLAN.forwards


def test_a_rate_moves_all_arms_as_far() -> None:
    two, one = Arm(sides="two", probes=16, examples=1), Arm(sides="one", probes=4, examples=8)
    assert Job(arm=two, length=1e-3, seed=0).rate == pytest.approx(4e-3)
    assert Job(arm=one, length=1e-3, seed=0).rate == pytest.approx(2e-3)


def test_arms_are_compared_at_the_best_mean_of_their_seeds() -> None:
    jobs = [
        Job(arm=arm, length=length, seed=seed)
        for arm, length, seed in itertools.product(PLAN.arms, PLAN.lengths, range(2))
    ]
    # The smaller rate has the best single run of the first arm, the larger one the better mean.
    losses = dict(zip(jobs, [3.0, 5.0, 3.8, 3.6, 4.0, 4.2, 4.4, 4.4, 3.0, 3.2, 9.0, 9.0], strict=True))
    found = {row.name: row for row in rows(PLAN, losses, start=5.0)}
    assert len(found) == 3 + 3 + 6
    two, one, shared = itertools.islice(found.values(), 3)
    assert [row.value for row in (two, one, shared)] == pytest.approx([3.7, 4.1, 3.1])
    assert {row.reference for row in (two, one, shared)} == {np.mean([3.8, 3.6])}
    assert [two.ratio, shared.ratio] == pytest.approx([1.0, 3.1 / 3.7])
    assert "one-sided, 3 probes x 2 shared, rate 0.0017" in found
    assert found["one-sided, 3 probes x 2 shared: largest - smallest of the seeds"].value == pytest.approx(0.2)
    assert found["tried: two-sided, 4 probes x 1 own, rate 0.002"].value == pytest.approx(4.0)
