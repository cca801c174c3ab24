"""The plateau cut follows from the log alone: cuts, spec, coordinator and verify agree."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb import stepping
from peerturb.errors import SpecError
from peerturb.plateau import Plateau
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.records import Record, RoundSealed
from peerturb.spec import ModelSpec, PlateauSpec, RunSpec, StepSpec
from tests.unit.test_coordinator_machine import BASE, Shell


def step_of(**plateau: Any) -> StepSpec:
    return StepSpec(learning_rate=1.0, schedule="plateau", plateau=PlateauSpec(**plateau))


def fractions(step: StepSpec, losses: list[float]) -> list[float]:
    """The factor that holds in rounds 0, 1, ..., len(losses)."""
    plateau = Plateau()
    seen = [plateau.fraction]
    for round_, loss in enumerate(losses):
        plateau.take(step, round_, loss)
        seen.append(plateau.fraction)
    return seen


def test_a_falling_loss_is_never_cut() -> None:
    falling = [5.0 * 0.98**round_ for round_ in range(200)]
    assert set(fractions(step_of(window=5, patience=1), falling)) == {1.0}


def test_a_level_loss_is_cut_after_so_many_windows() -> None:
    seen = fractions(step_of(window=3, patience=2, factor=0.5), [1.0] * 24)
    # The first window is the best one; windows two and three are no better, and so on.
    assert seen == [1.0] * 9 + [0.5] * 6 + [0.25] * 6 + [0.125] * 4


def test_the_threshold_is_relative_to_the_best_window() -> None:
    losses = [10.0] * 4 + [9.95] * 4
    assert fractions(step_of(window=4, patience=1, threshold=0.01), losses)[-1] == 0.5
    assert fractions(step_of(window=4, patience=1, threshold=0.001), losses)[-1] == 1.0
    # Below zero too (a reward with its sign turned): better is lower.
    assert fractions(step_of(window=4, patience=1, threshold=0.01), [-10.0] * 4 + [-10.05] * 4)[-1] == 0.5
    assert fractions(step_of(window=4, patience=1, threshold=0.01), [-10.0] * 4 + [-10.2] * 4)[-1] == 1.0


def test_losses_that_are_not_finite_do_not_count() -> None:
    bad = [math.nan, math.inf, -math.inf]
    step = step_of(window=3, patience=1)
    assert fractions(step, [2.0, *bad[:2], *bad, 1.0, *bad[:2]]) == [1.0] * 10
    assert fractions(step, [2.0, *bad[:2], *bad, 3.0, *bad[:2]])[-1] == 0.5


def test_warm_up_rounds_belong_to_no_window() -> None:
    step = step_of(window=2, patience=1).model_copy(update={"warmup_rounds": 3})
    assert fractions(step, [0.0, 0.0, 0.0, 5.0, 5.0, 4.0, 4.0]) == [1.0] * 8


def test_the_rate_never_falls_below_the_final_fraction() -> None:
    step = step_of(window=1, patience=1, factor=0.1).model_copy(update={"final_fraction": 0.05})
    assert fractions(step, [1.0] * 6) == [1.0, 1.0, 0.1, 0.05, 0.05, 0.05, 0.05]


@given(
    st.lists(st.floats(width=32), max_size=60),
    st.integers(1, 7),
    st.integers(1, 4),
    st.floats(0.01, 0.99),
    st.floats(0, 0.9),
    st.integers(0, 5),
    st.floats(0, 1),
)
def test_the_rate_only_falls_and_says_the_same_for_every_way_of_reading_the_log(
    losses: list[float], window: int, patience: int, factor: float, threshold: float, warmup: int, floor: float
) -> None:
    step = StepSpec(
        schedule="plateau",
        warmup_rounds=warmup,
        final_fraction=floor,
        plateau=PlateauSpec(window=window, patience=patience, factor=factor, threshold=threshold),
    )
    seen = fractions(step, losses)
    assert seen == sorted(seen, reverse=True)
    assert all(floor <= fraction <= 1 for fraction in seen)
    changes = [round_ for round_ in range(1, len(seen)) if seen[round_] != seen[round_ - 1]]
    assert all((round_ - warmup) % window == 0 for round_ in changes)
    assert all(after - before >= patience * window for before, after in pairwise(changes))
    for round_, fraction in enumerate(seen):
        if round_ >= warmup:
            assert stepping.learning_rate(step, round_, 0, fraction=fraction) == step.learning_rate * fraction


# --- RunSpec --------------------------------------------------------------------------------------------------------


def spec_of(**step: Any) -> RunSpec:
    return RunSpec.model_validate({"name": "unit", "model": {"name": "toy", "digest": BASE}, "step": step})


def test_other_schedules_keep_the_digest_they_had() -> None:
    document = json.loads(spec_of().canonical)
    assert document["step"] == {
        "final_fraction": 0.0,
        "learning_rate": 0.015,
        "rule": "normalized",
        "schedule": "constant",
        "warmup_rounds": 0,
    }
    assert spec_of().digest == hashlib.sha256(spec_of().canonical).digest()


@pytest.mark.parametrize("step", [{}, {"plateau": {}}, {"plateau": {"window": 7, "factor": 0.25}}])
def test_a_plateau_schedule_is_written_out_and_needs_no_end(step: dict[str, Any]) -> None:
    spec = spec_of(schedule="plateau", **step)
    assert spec.step.plateau is not None
    assert spec.round.count == 0
    assert json.loads(spec.canonical)["step"]["plateau"]["window"] == step.get("plateau", {}).get("window", 20)
    assert RunSpec.from_canonical(spec.canonical) == spec
    assert spec.digest == spec_of(schedule="plateau", plateau=spec.step.plateau.model_dump()).digest


def test_plateau_settings_for_another_schedule_are_refused() -> None:
    document = {"name": "unit", "model": {"name": "toy", "digest": BASE}, "step": {"plateau": {"window": 3}}}
    with pytest.raises(SpecError, match=r'schedule is "constant": write schedule = "plateau" or leave it out'):
        RunSpec.from_document(document, source="RUN.toml")


# --- coordinator, ledger --------------------------------------------------------------------------------------------


def plateau_run(rounds: int) -> tuple[RunSpec, list[Record]]:
    """A run whose loss stays where it is, made by the coordinator's machine."""
    step = StepSpec(learning_rate=1.0, schedule="plateau", plateau=PlateauSpec(window=2, patience=1))
    shell = Shell(RunSpec(name="unit", model=ModelSpec(name="toy", digest=BASE), step=step))
    shell.join(0)
    for round_ in range(rounds):
        shell.contribute(0, round_, b"\x20", loss=3.0)
    return shell.spec, shell.log


def test_the_coordinator_cuts_and_every_reader_of_the_log_agrees() -> None:
    spec, log = plateau_run(10)
    sealed = [record for record in log if isinstance(record, RoundSealed)]
    assert [record.alpha * 32 for record in sealed] == [1.0] * 4 + [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    # From any position on, as after a restart of the coordinator or of a node.
    for cut in range(len(log) + 1):
        ledger = Ledger.fold(log[:cut])
        for record in log[cut:]:
            ledger.apply(record)
        assert ledger.plateau.fraction == 0.0625
    assert spec.digest == Ledger.fold(log).spec.digest  # type: ignore[union-attr]


def test_a_record_that_ignores_the_cut_is_refused() -> None:
    _, log = plateau_run(6)
    place = next(i for i, record in enumerate(log) if isinstance(record, RoundSealed) and record.round == 4)
    record = log[place]
    assert isinstance(record, RoundSealed)
    forged = replace(record, alpha=2 * record.alpha)
    with pytest.raises(IllegalRecordError, match=r"step size 0\.03125; from the codes follows 0\.015625"):
        Ledger.fold([*log[:place], forged])


def test_a_loss_changed_afterwards_is_noticed_in_a_later_step() -> None:
    _, log = plateau_run(6)
    place = next(i for i, record in enumerate(log) if isinstance(record, RoundSealed) and record.round == 2)
    record = log[place]
    assert isinstance(record, RoundSealed)
    with pytest.raises(IllegalRecordError, match="has step size"):
        Ledger.fold([*log[:place], replace(record, loss=1.0), *log[place + 1 :]])
