"""What `peerturb tune` does: load model and data as a node would, and sweep within a budget of time."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peerturb.errors import SpecError
from peerturb.noise import Estimator
from peerturb.presets import number, preset
from peerturb.spec import RunSpec
from peerturb.zo.checkpoint import load_checkpoint
from peerturb.zo.data import evenly
from peerturb.zo.evaluate import evaluate
from peerturb.zo.search import SETTINGS_TYPICAL, Outcome, Recommendation, Setting, finalists, next_setting, recommend
from peerturb.zo.sweep import Sweep
from peerturb_node.compute.prepared import Prepared
from peerturb_node.settings import NodeSettings

ROUNDS_MIN, ROUNDS_MAX = 6, 40
"""Rounds of a setting: fewer tell nothing, more are a training run."""

PROBES_MIN = 16
"""To which probes are reduced where not even `ROUNDS_MIN` rounds of all settings fit the budget."""

SEARCH_SHARE = 0.4
"""Part of the budget that the search is planned for; the rest is for the longer trials."""

FINAL_ROUNDS_MAX = 160
"""Rounds of a longer trial."""

HELD_OUT_MAX = 256
"""Held-out examples looked at, spread over the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Result of a sweep."""

    model: str
    parameters: int
    probes: int
    """In a round of the sweep."""
    rounds: int
    """Of a setting."""
    start: Setting
    scale: float
    """Scale that suits round 0."""
    outcomes: tuple[Outcome, ...]
    """Of the search."""
    final: tuple[Outcome, ...]
    """Of the longer trials; empty if there was no time for both."""
    recommendation: Recommendation
    compute_dtype: str
    """Type in which losses were computed."""
    estimator: Estimator
    """How projected gradients were found."""
    warning: str | None
    """What a node would say about the recommended epsilon in that type (without one: about the start's), or None."""
    is_cut: bool
    """Whether the budget ended the sweep."""
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "compute_dtype": self.compute_dtype,
            "estimator": self.estimator,
            "probes": self.probes,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "is_cut": self.is_cut,
            "settings": [_document(one) for one in self.outcomes],
            "final": [_document(one) for one in self.final],
            "recommendation": None
            if self.recommendation.setting is None
            else {**asdict(self.recommendation.setting), "initial_scale": self.scale},
            "text": self.recommendation.text,
            "warning": self.warning,
            "toml": self.toml,
        }

    @property
    def toml(self) -> str:
        """The recommended lines of RUN.toml; empty if nothing can be recommended."""
        chosen = self.recommendation.setting
        if chosen is None:
            return ""
        return "\n".join(
            [
                "[perturbation]",
                *([f"epsilon = {number(chosen.epsilon)}"] if self.estimator == "spsa" else []),
                f"initial_scale = {number(float(f'{self.scale:.3g}'))}",
                "",
                "[step]",
                f"learning_rate = {number(chosen.learning_rate)}",
            ]
        )


def _document(one: Outcome) -> dict[str, Any]:
    values = {key: value for key, value in asdict(one).items() if key != "setting"}
    return {**asdict(one.setting), **values, "has_diverged": one.has_diverged, "has_learned": one.has_learned}


def tune(
    spec: RunSpec,
    settings: NodeSettings,
    *,
    checkpoint: Path | None,
    budget_s: float,
    probes: int | None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    now_s: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Sweep. The budget counts from when model and data are loaded; at least one setting is tried in any time.

    Args:
        settings: data, held-out data, model, device and the like, as for a node.
        checkpoint: of this run, to start from instead of the base weights.
        budget_s: seconds.
        probes: in a round; None: as many as the RunSpec allows one node.
        on_outcome: told of every setting as it is done.

    Raises:
        DataError: no data, or they cannot be used.
        ModelError: the model or checkpoint cannot be loaded or perturbed.
        LogError: the checkpoint belongs to another run.
        RefusedError: the base weights are not the run's.
    """
    prepared = _prepare(spec, settings, checkpoint)
    parameters = sum(entry.elements for entry in prepared.manifest)
    start = starting_point(spec, parameters)
    sweep = _sweep(prepared, spec, settings, probes)
    trials = _Trials(sweep, began_s=now_s(), budget_s=budget_s, on_outcome=on_outcome, now_s=now_s)
    sweep.settle()
    rounds = _plan(sweep, now_s() - trials.began_s, SEARCH_SHARE * budget_s)
    trials.search(start, rounds)
    trials.compare(start, rounds)
    found = recommend(start, trials.outcomes, trials.final)
    return Tuned(
        model=spec.model.name,
        parameters=parameters,
        probes=sweep.probes,
        rounds=rounds,
        start=start,
        scale=sweep.scale,
        outcomes=tuple(trials.outcomes),
        final=tuple(trials.final),
        recommendation=found,
        compute_dtype=prepared.compute_dtype,
        estimator=sweep.estimator,
        warning=" ".join(filter(None, (prepared.warning((found.setting or start).epsilon), sweep.slowness))) or None,
        is_cut=trials.is_cut,
        seconds=now_s() - trials.began_s,
    )


class _Trials:
    """Settings tried within a budget of time: a search, then two of them for longer.

    Attributes:
        outcomes: of the search.
        final: of the longer trials; empty without two.
        is_cut: whether the budget ended a trial.
    """

    def __init__(
        self,
        sweep: Sweep[Any],
        *,
        began_s: float,
        budget_s: float,
        on_outcome: Callable[[Outcome], None],
        now_s: Callable[[], float],
    ) -> None:
        self.began_s, self._end_s = began_s, began_s + budget_s
        self.outcomes: list[Outcome] = []
        self.final: list[Outcome] = []
        self.is_cut = False
        self._sweep, self._on_outcome, self._now_s = sweep, on_outcome, now_s

    def search(self, start: Setting, rounds: int) -> None:
        """Try settings of so many rounds until nothing is left to try, or no time."""
        while not self.is_cut and (setting := self._next(start)) is not None:
            if (outcome := self._run(setting, rounds)) is None:
                self.is_cut = True
            else:
                self.outcomes.append(outcome)

    def _next(self, start: Setting) -> Setting | None:
        return next_setting(start, self.outcomes, has_epsilon=self._sweep.estimator == "spsa")

    def compare(self, start: Setting, rounds: int) -> None:
        """Try the two best for longer, if there is time for both."""
        longer = 0 if self.is_cut else _longer(self.outcomes, rounds, self._end_s - self._now_s())
        for setting in finalists(start, self.outcomes) if longer else ():
            if (outcome := self._run(setting, longer)) is None:
                self.final, self.is_cut = [], True  # one alone cannot be compared
                return
            self.final.append(outcome)

    def _run(self, setting: Setting, rounds: int) -> Outcome | None:
        at_s = self._now_s()
        # The first setting may take its time: without one there is nothing to say.
        outcome = self._sweep.run(
            setting, rounds, should_stop=lambda: bool(self.outcomes) and self._now_s() >= self._end_s
        )
        if outcome is None:
            return None
        outcome = replace(outcome, seconds=self._now_s() - at_s)
        self._on_outcome(outcome)
        return outcome


def _plan(sweep: Sweep[Any], round_s: float, budget_s: float) -> int:
    """Return the rounds of a setting that a typical sweep has time for; take fewer probes before too few rounds."""
    wanted = budget_s / SETTINGS_TYPICAL / max(round_s, 1e-6)
    if wanted < ROUNDS_MIN:
        sweep.probes = max(min(PROBES_MIN, sweep.probes), int(sweep.probes * wanted / ROUNDS_MIN))
        return ROUNDS_MIN
    return min(int(wanted), ROUNDS_MAX)


def _longer(outcomes: list[Outcome], rounds: int, left_s: float) -> int:
    """Return the rounds of two longer trials; 0 if they would hardly be longer."""
    whole = [one.seconds / one.rounds for one in outcomes if one.rounds == rounds]
    if not whole:
        return 0
    # A tenth in reserve: a trial that is cut short is lost.
    possible = int(0.9 * left_s / 2 / max(max(whole), 1e-6))
    return min(possible, FINAL_ROUNDS_MAX) if possible >= 1.5 * rounds else 0


def _prepare(spec: RunSpec, settings: NodeSettings, checkpoint: Path | None) -> Prepared:
    prepared = Prepared(spec, settings)
    if checkpoint is not None:
        load_checkpoint(
            checkpoint.expanduser(), prepared.manifest, prepared.named,
            spec_digest=spec.digest.hex(), base_digest=spec.model.digest,
            remedy="name another one, or leave out --checkpoint to start from the base weights",
        )  # fmt: skip
        prepared.changed()
        prepared.refresh()
    return prepared


def _sweep(prepared: Prepared, spec: RunSpec, settings: NodeSettings, probes: int | None) -> Sweep[Any]:
    held = evenly(prepared.held_out, HELD_OUT_MAX)

    def held_out() -> float:
        found = evaluate(prepared.runner, held)
        assert found is not None  # nothing stops it
        return found.loss

    def follow() -> None:
        prepared.changed()
        prepared.refresh()

    return Sweep(
        prepared.runner, spec, prepared.items, prepared.manifest, weights=list(prepared.named.values()),
        on_update=follow, held_out=held_out if held else None, probes=probes, rows_max=settings.rows or None,
        estimator=settings.estimator,
    )  # fmt: skip


def starting_point(spec: RunSpec, parameters: int) -> Setting:
    """Return where the search begins: what RUN.toml says, and the preset for the model's size where it says nothing.

    Raises:
        SpecError: the rule is `sgd`, whose rates have no preset, and no rate is given.
    """
    chosen = preset(
        parameters, spec.objective.kind, dtype=spec.model.dtype, is_adapter=spec.model.adapter is not None,
        estimators=spec.perturbation.estimators,
    )  # fmt: skip
    is_given = "learning_rate" in spec.step.model_fields_set
    if spec.step.rule == "sgd" and not is_given:
        raise SpecError('step.rule = "sgd" has no preset: give step.learning_rate, 1e-5 for instance, to start from')
    has_epsilon = "epsilon" in spec.perturbation.model_fields_set
    return Setting(
        epsilon=spec.perturbation.epsilon if has_epsilon else chosen.epsilon,
        learning_rate=spec.step.learning_rate if is_given else chosen.learning_rate,
    )
