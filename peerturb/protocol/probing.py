"""How many probes a peer measures in a round."""

from dataclasses import dataclass

FIRST_PROBES = 16
"""Probes of a peer's first round when a time budget holds and its speed is not known."""

_WEIGHT = 0.25


@dataclass(slots=True, kw_only=True)
class ProbeBudget:
    """As many probes as fit the time budget at the measured rate; without a budget always `probes_max`."""

    probes_max: int
    budget_ms: int
    probe_ms: float | None = None
    """Smoothed time of one probe; None until one was measured."""

    def __post_init__(self) -> None:
        assert self.probes_max >= 1
        assert self.budget_ms >= 0

    def count(self) -> int:
        """Return the number of probes for the next measurement: 1..probes_max."""
        if not self.budget_ms:
            return self.probes_max
        if self.probe_ms is None:
            return min(FIRST_PROBES, self.probes_max)
        fitting = self.budget_ms / self.probe_ms if self.probe_ms > 0 else self.probes_max
        return int(min(max(fitting, 1), self.probes_max))

    def observe(self, *, probes: int, elapsed_ms: float) -> None:
        """Take in a finished measurement; a quarter of the news counts."""
        if probes < 1 or elapsed_ms < 0:
            return
        news = elapsed_ms / probes
        self.probe_ms = news if self.probe_ms is None else self.probe_ms + _WEIGHT * (news - self.probe_ms)
