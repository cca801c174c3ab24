"""A sweep trains as a run does, and leaves no trace in the weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peerturb import stepping
from peerturb.ids import RoundNumber
from peerturb.spec import ModelSpec, RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.search import Setting
from peerturb.zo.sweep import SLOT, Sweep
from peerturb.zo.update import apply_update
from tests.zo_models import byte_tokenizer, one_thread, small_model, spec_of

__all__ = ["one_thread"]

TEXTS = [f"{word} and {word} again" for word in ("hello", "to be", "abc", "quick", "fox", "jumps", "a dog")]


class Fixture:
    """A small model with data."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
        self.spec = spec_of(probes=16, **fields)
        model = small_model("llama-tied").to(dtype)
        trained = ModelSpec.model_validate(
            {"name": "test", "digest": "0" * 64, "dtype": str(dtype).removeprefix("torch.")}
        )
        self.manifest = build_manifest(model, trained)
        objective = Objective(self.spec.objective, byte_tokenizer())
        self.items = objective.encode([Example(prompt=text, label="", where="x") for text in TEXTS], source="x")
        self.runner = Runner(model, self.manifest, objective)
        self.weights = [tensor for _, tensor in self.runner.parameters]

    def sweep(self, **fields: Any) -> Sweep[Any]:
        return Sweep(self.runner, self.spec, self.items, self.manifest, **fields)

    def bits(self) -> list[Tensor]:
        return [weight.clone() for weight in self.weights]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    made = Fixture(dtype=dtype)
    before = made.bits()
    sweep = made.sweep()
    sweep.settle()
    for rate in (1e-3, 1e-1, 1e3):
        assert sweep.run(Setting(epsilon=1e-2, learning_rate=rate), 3) is not None
        assert are_equal(made.bits(), before)


def test_a_setting_gives_the_same_figures_whatever_came_before() -> None:
    sweep = Fixture().sweep()
    setting = Setting(epsilon=1e-3, learning_rate=1e-2)
    alone = sweep.run(setting, 4)
    sweep.run(Setting(epsilon=1e-2, learning_rate=0.3), 4)
    assert sweep.run(setting, 4) == alone


def trained(made: Fixture, spec: RunSpec, rounds: int, scale: float) -> tuple[list[Tensor], np.ndarray]:
    """The rounds of a run written out, from the same probes; weights are put back."""
    before = made.bits()
    engine = ProbeEngine(made.runner, spec, made.items)
    every = []
    for number in range(rounds):
        codes = engine.contribute(RoundNumber(number), slot=SLOT, scale=scale).codes
        alpha = stepping.step_size(spec.step, number, scale, codes, 0)
        apply_update(
            made.weights, made.manifest, family="rank1", run_key=spec.run_key, round=number, slots=[0],
            counts=[len(codes)], codes=codes, alpha=float(alpha),
        )  # fmt: skip
        scale = float(stepping.next_scale(scale, codes))
        every.append(codes)
    after = made.bits()
    for weight, old in zip(made.weights, before, strict=True):
        weight.copy_(old)
    return after, np.concatenate(every)


def test_it_trains_as_a_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Fixture()
    sweep = made.sweep()
    reached: list[Tensor] = []
    restore = sweep.restore

    def keep() -> None:
        reached.extend(made.bits())
        restore()

    monkeypatch.setattr(sweep, "restore", keep)
    spec = made.spec
    found = sweep.run(Setting(epsilon=spec.perturbation.epsilon, learning_rate=spec.step.learning_rate), 5)
    assert found is not None
    after, codes = trained(made, spec, 5, sweep.scale)
    assert are_equal(reached, after)
    assert found.rms == pytest.approx(math.sqrt(np.mean(codes.astype(float) ** 2)))
    assert found.clipped == pytest.approx(np.mean(np.abs(codes.astype(int)) == 127))
    assert found.before == pytest.approx(float(made.runner.losses(made.items).mean()), rel=1e-5)


def test_settings_see_the_same_directions() -> None:
    sweep = Fixture().sweep()
    one = sweep._with(Setting(epsilon=1e-3, learning_rate=1e-2))
    other = sweep._with(Setting(epsilon=1e-2, learning_rate=1.0))
    assert one.run_key == other.run_key == sweep._spec.run_key
    assert other.perturbation.epsilon == 1e-2
    assert other.step.learning_rate == 1.0


def test_a_falling_schedule_is_left_out() -> None:
    spec = Fixture().spec.model_dump(mode="json")
    made = Fixture()
    spec["step"].update(schedule="plateau", warmup_rounds=5)
    made.spec = RunSpec.from_document(spec, source="x")
    step = made.sweep()._with(Setting(epsilon=1e-3, learning_rate=0.5)).step
    assert stepping.learning_rate(step, 0, 0) == stepping.learning_rate(step, 50, 0) == 0.5


def test_a_rate_that_is_far_too_large_is_called_so_and_ends_early() -> None:
    found = Fixture().sweep().run(Setting(epsilon=1e-3, learning_rate=50.0), 30)
    assert found is not None
    assert found.has_diverged
    assert not found.has_learned
    assert found.rounds < 30


def test_a_rate_that_suits_learns_and_the_scale_settles() -> None:
    made = Fixture()
    sweep = made.sweep(held_out=lambda: float(made.runner.losses(made.items[:2]).mean()))
    sweep.settle()
    found = sweep.run(Setting(epsilon=1e-3, learning_rate=1e-2), 25)
    assert found is not None
    assert found.has_learned
    assert found.held_out_before is not None
    assert found.score == found.held_out_after != found.after
    assert found.void == 0.0
    assert 20 < found.rms < 50


def test_stopping_restores_and_gives_nothing() -> None:
    made = Fixture()
    before = made.bits()
    sweep = made.sweep()
    asked = iter([False, False, True, True, True])
    assert sweep.run(Setting(epsilon=1e-3, learning_rate=1e-1), 9, should_stop=lambda: next(asked)) is None
    assert are_equal(made.bits(), before)
