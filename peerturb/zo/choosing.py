"""Which estimator a machine uses: what the run allows, what a person wants, what the model and free memory bear."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from peerturb.errors import ModelError, SpecError
from peerturb.noise import Estimator
from peerturb.spec import RunSpec
from peerturb.zo.batch import Evaluator
from peerturb.zo.coverage import SlowWarning
from peerturb.zo.exact import ExactEngine
from peerturb.zo.free import free_bytes
from peerturb.zo.gradients import Activations
from peerturb.zo.probe import ProbeEngine

Item = TypeVar("Item")
Wanted = Literal["auto", "spsa", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen(Generic[Item]):
    """An engine, and why it is this one."""

    engine: ProbeEngine[Item] | ExactEngine[Item]
    estimator: Estimator
    why: str
    """A sentence for people; empty where there was nothing to choose."""


def candidate(wanted: Wanted, spec: RunSpec) -> Estimator:
    """Return the estimator to try first: what is wanted, if the run allows it; `auto`: exact where it is allowed.

    Raises:
        SpecError: the run does not allow what is wanted.
    """
    allowed = spec.perturbation.estimators
    if wanted == "auto":
        return "exact" if "exact" in allowed else "spsa"
    if wanted not in allowed:
        raise SpecError(
            f'estimator = "{wanted}" is not allowed in this run, whose RunSpec has perturbation.estimators = '
            f'[{", ".join(f"{name!r}" for name in allowed)}]; set estimator = "auto"'
        )
    return wanted


def choose_engine(
    evaluator: Evaluator[Item],
    spec: RunSpec,
    items: Sequence[Item],
    *,
    wanted: Wanted = "auto",
    rows_max: int | None = None,
    activations: Activations = "auto",
    carry: float = 0.0,
) -> Chosen[Item]:
    """Make the engine of a machine.

    Args:
        wanted: `exact` or `spsa`, or `auto`: exact where the run allows it, the loss can be differentiated and free
            memory holds gradients and activations of one row; probes otherwise.
        rows_max, activations, carry: see the engines.

    Raises:
        SpecError: the run does not allow what is wanted.
        ModelError: the model cannot be perturbed, or not be differentiated where nothing else is wanted or allowed.
        DataError: too few items.
    """
    first, why = candidate(wanted, spec), ""
    if first == "exact":
        try:
            exact = ExactEngine(evaluator, spec, items, rows_max=rows_max, activations=activations, carry=carry)
        except ModelError as error:
            if wanted == "exact" or not spec.perturbation.allows("spsa"):
                raise
            why = f"probes by perturbation (spsa), because {error}"
        else:
            return Chosen(engine=exact, estimator="exact", why=_explained(exact))
    with warnings.catch_warnings(action="ignore", category=SlowWarning):  # told as a node tells things
        probes = ProbeEngine(evaluator, spec, items, rows_max=rows_max)
    return Chosen(engine=probes, estimator="spsa", why=why)


def _explained(engine: ExactEngine[Item]) -> str:
    backward, free = engine.backward, free_bytes(engine.evaluator.device)
    need, is_twice = backward.need, backward.is_recomputed
    token = need.token_recomputed if is_twice else need.token
    left = "free memory is not known" if free is None else f"{free / 2**20:,.0f} MiB free"
    return (
        f"exact projected gradients: {engine.examples} examples and {engine.spec.perturbation.exact_rules.codes:,} "
        f"codes a round; gradients take {need.sums / 2**20:,.1f} MiB, activations {token / 2**10:,.0f} KiB a token"
        f"{' (computed twice)' if is_twice else ''}, {left}"
    )
