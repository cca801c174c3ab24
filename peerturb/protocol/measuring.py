"""A peer's measuring of the open round: what is being measured, what was contributed last, and whether it is said."""

from peerturb.floats import f32
from peerturb.ids import RoundNumber
from peerturb.noise import Estimator
from peerturb.protocol.messages import Contribution
from peerturb.protocol.outputs import CancelMeasure, Measure, PeerOutput, Say
from peerturb.protocol.probing import ProbeBudget
from peerturb.protocol.records import RoundOpened
from peerturb.protocol.results import Measured
from peerturb.protocol.rules import codes_max
from peerturb.spec import RunSpec


class Measuring:
    """At most one measurement at a time, and the contribution that came of the last one.

    Attributes:
        round: the round being measured, also when its measurement is cancelled and not yet back; None for none.
    """

    def __init__(self, spec: RunSpec, estimator: Estimator = "spsa", probes_max: int | None = None) -> None:
        """Begin with nothing measured; `estimator` is how the shell measures, `probes_max` a limit of its own."""
        self.round: RoundNumber | None = None
        self._is_exact = estimator == "exact"
        self._probes_max = codes_max(spec, is_exact=self._is_exact)
        most = self._probes_max if probes_max is None else min(probes_max, self._probes_max)
        self._budget = ProbeBudget(probes_max=most, budget_ms=0 if self._is_exact else spec.round.budget_ms)
        self._measured_on = 0
        self._is_cancelled = False
        self._may_cancel = False
        self._last: Contribution | None = None
        self._is_said = False

    def joined(self) -> None:
        """A new session stands: it has not heard our contribution."""
        self._is_said = False

    def disconnected(self) -> None:
        """The session has ended: the next one must hear a contribution before a late one may be cancelled."""
        self._may_cancel = False

    def step(self, opened: RoundOpened, digest: int) -> list[PeerOutput]:
        """Measure the open round on the weights `digest`, or say what came of it; nothing if both are done."""
        if self._last is not None and self._last.round == opened.round:
            if self._is_said:
                return []
            self._is_said = self._may_cancel = True
            return [Say(message=self._last)]
        if self.round is not None:
            return []
        self.round, self._measured_on, self._is_cancelled = opened.round, digest, False
        scale = opened.scale_of(is_exact=self._is_exact)
        return [Measure(round=opened.round, scale=scale, count=self._budget.count())]

    def cancel(self) -> list[PeerOutput]:
        """Give up what is being measured; nothing if that is done already or nothing is being measured."""
        if self.round is None or self._is_cancelled:
            return []
        self._is_cancelled = True
        return [CancelMeasure(round=self.round)]

    def cancel_late(self) -> list[PeerOutput]:
        """Give up what is being measured because its round is sealed, unless the coordinator should hear of it.

        Never twice in a row, and never before this session's first contribution: a contribution that comes late shows
        the coordinator that we keep up and how long we take; without it a slow peer would never be awaited.
        """
        if not self._may_cancel:
            return []
        cancelled = self.cancel()
        self._may_cancel = not cancelled
        return cancelled

    def completed(self, result: Measured, *, is_joined: bool) -> list[PeerOutput]:
        """Send the contribution, even a late one: it shows the coordinator how long we take."""
        assert result.round == self.round, f"measured round {result.round}, asked for {self.round}"
        self.round = None
        if self._is_cancelled:
            return []
        assert 1 <= len(result.codes) <= self._probes_max
        self._budget.observe(probes=len(result.codes), elapsed_ms=result.elapsed_ms)
        self._last = Contribution(
            round=result.round,
            codes=result.codes,
            loss=f32(result.loss),
            digest=self._measured_on,
            is_exact=self._is_exact,
        )
        self._is_said = self._may_cancel = is_joined
        return [Say(message=self._last)] if is_joined else []

    def rebuilt(self, digest: int) -> None:
        """The weights are now `digest`: forget a contribution that was measured on others."""
        if self._last is not None and self._last.digest != digest:
            self._last = None
