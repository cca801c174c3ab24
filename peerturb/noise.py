"""RunSpec section `perturbation`: the noise, and how its projected gradients are found."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from peerturb import limits
from peerturb.section import Section

Estimator = Literal["spsa", "exact"]
"""How a projected gradient is found: `spsa` from losses at perturbed weights, `exact` from the gradient itself."""

ESTIMATORS: tuple[Estimator, ...] = ("spsa", "exact")
"""In the order in which a record, a metric or a table names them."""


class ExactSpec(Section):
    """Contributions of exact projected gradients: many codes of one gradient."""

    examples: int = Field(default=32, ge=1, le=65_536)
    """Sequences whose mean loss is differentiated for a contribution; a node with fewer takes all it has."""
    codes: int = Field(default=4_096, ge=1, le=limits.PROBES_PER_CONTRIBUTION_MAX)
    """Most codes in one contribution; `round.probes_max` and `round.budget_ms` hold for `spsa`."""


class PerturbationSpec(Section):
    """The noise and its measurement."""

    family: Literal["rank1", "dense"] = "rank1"
    """`rank1`: a matrix's noise is an outer product of signs; `dense`: one sign per element."""
    epsilon: float = Field(default=1e-3, gt=0, le=1)
    """How far a probe moves the weights along its noise."""
    sides: Literal["two", "one"] = Field(default="two", exclude_if=lambda value: value == "two")
    """`two`: central difference (L(θ+εz) - L(θ-εz)) / 2ε, each probe on examples of its own. `one`: forward difference
    (L(θ+εz) - L(θ)) / ε, all probes of a contribution on the same `examples_per_probe` examples (the draw of sample 0).
    Their clean loss L(θ) is measured once a contribution, so n probes cost n + 1 forward passes of those examples
    instead of 2n. Left out of the canonical form while `two`, so that older runs keep their digest."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How g / s becomes an integer."""
    initial_scale: float = Field(default=0.5, gt=0, le=1e6)
    """s of round 0; later scales follow from the sealed codes."""
    estimators: tuple[Estimator, ...] = Field(
        default=("spsa",), min_length=1, exclude_if=lambda value: value == ("spsa",)
    )
    """How a node may find a projected gradient. Which of these it uses is a setting of the node. Left out of the
    canonical form while `spsa` alone, so that older runs keep their digest."""
    exact: ExactSpec | None = None
    """Rules of exact contributions, where they are allowed."""

    @model_validator(mode="before")
    @classmethod
    def _exact_has_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("estimators"), (list, tuple)):
            return data
        is_allowed = "exact" in data["estimators"] and data.get("exact") is None
        return {**data, "exact": {}} if is_allowed else data

    @model_validator(mode="after")
    def _estimators_fit(self) -> Self:
        if self.estimators != tuple(name for name in ESTIMATORS if name in self.estimators):
            raise ValueError('`estimators` must be ["spsa"], ["exact"] or ["spsa", "exact"]')
        if self.exact is not None and "exact" not in self.estimators:
            raise ValueError(
                'a section `exact` is given, but not allowed: write estimators = ["spsa", "exact"], or leave it out'
            )
        return self

    @property
    def side_count(self) -> int:
        """Perturbed evaluations of a probe: 2, or 1 beside the clean loss that all share."""
        return 2 if self.sides == "two" else 1

    @property
    def exact_rules(self) -> ExactSpec:
        """Rules of exact contributions; the defaults where none are allowed (a trial outside of a run)."""
        return self.exact or ExactSpec()

    @property
    def is_mixed(self) -> bool:
        """True if a round may hold codes of both estimators, which then have a scale each."""
        return len(self.estimators) > 1

    def allows(self, estimator: Estimator) -> bool:
        """Tell whether contributions of this estimator are taken."""
        return estimator in self.estimators
