"""Try settings on a model: some rounds of the real probes, codes and update from one saved point, then back to it.

One process, one slot, no log. Weights are restored bit for bit after every setting. It knows no clock: the caller's
`should_stop` is asked between rounds.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb import stepping
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import RunSpec
from peerturb.zo.batch import Evaluator
from peerturb.zo.choosing import Wanted, choose_engine
from peerturb.zo.data import evenly
from peerturb.zo.room import in_parts
from peerturb.zo.search import Outcome, Setting
from peerturb.zo.shortage import memory_for
from peerturb.zo.update import apply_update

Item = TypeVar("Item")

SAMPLE_ITEMS = 96
"""Training examples whose losses are compared before and after: the same ones, so that their differences are."""

SAMPLE_ROWS = 16
"""Examples in one plain forward."""

RUNAWAY = 1.5
"""A round's loss above so many times the first round's: there is nothing more to learn about that setting."""

SLOT = Slot(0)


class Sweep(Generic[Item]):
    """A model at its saved point, its data, and the means to go back.

    Args:
        evaluator: gives losses.
        spec: the run's; its epsilon and step are what is varied.
        items: training examples.
        manifest: what is trained, in the order of the evaluator's parameters.
        weights: trained, updated and restored in place; by default the evaluator's own parameters.
        on_update: called whenever the weights were written, for an evaluator that computes from a copy of them.
        held_out: returns the held-out loss of the weights as they are; None without held-out data.
        probes: in a round.
        rows_max: most rows in one forward; by default the engine chooses.
        estimator: how projected gradients are found, within what the run allows; `auto`: exact where it can be.

    Raises:
        ModelError: a parameter cannot be perturbed, or memory runs out.
        DataError: fewer items than a probe needs.
    """

    def __init__(
        self,
        evaluator: Evaluator[Item],
        spec: RunSpec,
        items: Sequence[Item],
        manifest: Manifest,
        *,
        weights: Sequence[Tensor] | None = None,
        on_update: Callable[[], None] = lambda: None,
        held_out: Callable[[], float] | None = None,
        probes: int | None = None,
        rows_max: int | None = None,
        estimator: Wanted = "auto",
    ) -> None:
        self.scale = float(np.float32(spec.perturbation.initial_scale))
        """Scale that suits round 0 at the saved point; found by `settle`."""
        self._spec = spec
        self._manifest = manifest
        self._weights = [weight for _, weight in evaluator.parameters] if weights is None else list(weights)
        self._on_update = on_update
        with memory_for("a second copy of the weights", evaluator.device):
            self._saved = [weight.clone() for weight in self._weights]
        self._evaluator = evaluator
        chosen = choose_engine(evaluator, spec, items, wanted=estimator, rows_max=rows_max)
        self._engine, self.estimator = chosen.engine, chosen.estimator
        rules = spec.perturbation.exact_rules
        most = rules.codes if chosen.estimator == "exact" else spec.round.probes_max
        self.probes = most if probes is None else min(probes, most)
        """Codes of a round."""
        self.slowness = self._engine.slowness
        """Why probes are measured one at a time; None: they are not."""
        self._sample = evenly(items, SAMPLE_ITEMS)
        self._held_out = held_out
        self._before = self._losses()
        self._held_out_before = None if held_out is None else held_out()

    def settle(self) -> None:
        """Measure a round at the saved point and take the scale that puts its codes at their target.

        A run finds the scale in its first rounds by itself; a sweep has only a few.
        """
        engine: Any = self._engine  # each kind measures in a form of its own
        gradients = engine.projected_gradients(engine.measure(RoundNumber(0), slot=SLOT, count=self.probes))
        finite = gradients[np.isfinite(gradients)]
        rms = math.sqrt(float(np.mean(finite**2))) if finite.size else 0.0
        if rms > 0:
            self.scale = float(np.float32(min(max(rms / stepping.TARGET_RMS, stepping.SCALE_MIN), stepping.SCALE_MAX)))

    def run(self, setting: Setting, rounds: int, *, should_stop: Callable[[], bool] = lambda: False) -> Outcome | None:
        """Train for some rounds at a constant rate, look at the losses, go back; None if stopped before the end.

        `seconds` is left to the caller.
        """
        try:
            return self._run(setting, rounds, should_stop)
        finally:
            self.restore()

    def restore(self) -> None:
        """Go back to the saved point."""
        with torch.no_grad():
            for weight, saved in zip(self._weights, self._saved, strict=True):
                weight.copy_(saved)
        self._on_update()

    def _run(self, setting: Setting, rounds: int, should_stop: Callable[[], bool]) -> Outcome | None:
        spec = self._with(setting)
        self._engine.spec = spec
        scale, sealed, first, done = self.scale, [], math.nan, 0
        for number in range(rounds):
            if should_stop():
                return None
            result = self._engine.contribute(RoundNumber(number), slot=SLOT, scale=scale, count=self.probes)
            alpha = stepping.step_size(spec.step, number, scale, result.codes, 0)
            apply_update(
                self._weights, self._manifest, family=spec.perturbation.family, run_key=spec.run_key, round=number,
                slots=[SLOT], counts=[len(result.codes)], codes=result.codes, alpha=float(alpha),
            )  # fmt: skip
            self._on_update()
            scale = stepping.next_scale(scale, result.codes)
            sealed.append(result.codes)
            done = number + 1
            first = result.loss if number == 0 else first
            if not math.isfinite(result.loss) or result.loss > RUNAWAY * first + 1:
                break
        if should_stop():
            return None
        after = self._losses()
        return _outcome(
            setting,
            rounds=done,
            before=self._before,
            after=after,
            codes=np.concatenate(sealed),
            held_out=(self._held_out_before, None if self._held_out is None else self._held_out()),
        )

    def _with(self, setting: Setting) -> RunSpec:
        """Return the spec of a setting.

        A copy keeps the cached digest, hence the run key: all settings see the same directions and draws, and differ in
        nothing else.
        """
        assert self._spec.digest
        perturbation = self._spec.perturbation.model_copy(update={"epsilon": setting.epsilon})
        step = self._spec.step.model_copy(
            update={
                "learning_rate": setting.learning_rate, "schedule": "constant", "warmup_rounds": 0, "plateau": None,
            }
        )  # fmt: skip
        return self._spec.model_copy(update={"perturbation": perturbation, "step": step})

    def _losses(self) -> NDArray[np.float64]:
        """Losses of the sample, example by example."""
        at_once = len(self._sample) if self._evaluator.is_whole else SAMPLE_ROWS
        parts = in_parts(self._evaluator, self._sample, self._evaluator.losses, items_max=at_once)
        return np.concatenate([losses.detach().double().cpu().numpy() for losses in parts])


def _outcome(
    setting: Setting,
    *,
    rounds: int,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    codes: NDArray[np.int8],
    held_out: tuple[float | None, float | None],
) -> Outcome:
    valid = codes[codes != stepping.VOID].astype(np.float64)
    moved = after - before
    with np.errstate(invalid="ignore"):
        error = float(moved.std(ddof=1) / math.sqrt(len(moved))) if len(moved) > 1 else 0.0
    return Outcome(
        setting=setting,
        rounds=rounds,
        before=float(before.mean()),
        after=float(after.mean()),
        error=error if math.isfinite(error) else 0.0,
        held_out_before=held_out[0],
        held_out_after=held_out[1],
        clipped=float(np.mean(np.abs(valid) == stepping.CODE_MAX)) if valid.size else 0.0,
        rms=math.sqrt(float(np.mean(valid**2))) if valid.size else 0.0,
        void=1 - len(valid) / len(codes),
        seconds=0.0,
    )
