"""How long rounds take, hence when the next one is due. Integers, so that every machine decides alike."""

from dataclasses import dataclass, field

from peerturb.ids import RoundNumber
from peerturb.spec import RoundSpec

DEADLINE_FACTOR = 4
"""A round may take this many times what the slowest contribution has taken of late."""

_DECAY_SHIFT = 3
_REMEMBERED_MAX = 256


@dataclass(slots=True)
class Pace:
    """Smoothed longest contribution latency.

    It rises at once to a longer latency and sinks by an eighth of the difference per round, so one quick round does not
    cut off a peer that is slow every other round.
    """

    spec: RoundSpec
    longest_ms: int | None = None
    """None until a round has been timed: then the deadline is the largest allowed."""
    _began_ms: dict[RoundNumber, int] = field(default_factory=dict)

    def after(self, latency_ms: int) -> int:
        """Return what `longest_ms` becomes when a round's slowest contribution took `latency_ms`."""
        assert latency_ms >= 0
        if self.longest_ms is None or latency_ms >= self.longest_ms:
            return latency_ms
        return self.longest_ms - ((self.longest_ms - latency_ms + (1 << _DECAY_SHIFT) - 1) >> _DECAY_SHIFT)

    def deadline_ms(self, longest_ms: int | None) -> int:
        """Return the deadline that follows from a smoothed latency, inside the RunSpec's bounds."""
        if longest_ms is None:
            return self.spec.deadline_ms_max
        return min(max(DEADLINE_FACTOR * longest_ms, self.spec.deadline_ms_min), self.spec.deadline_ms_max)

    def began(self, round_: RoundNumber, now_ms: int) -> None:
        """Note when a round's clock started; the oldest notes are dropped."""
        self._began_ms[round_] = now_ms
        while len(self._began_ms) > _REMEMBERED_MAX:
            del self._began_ms[next(iter(self._began_ms))]

    def latency_ms(self, round_: RoundNumber, now_ms: int) -> int | None:
        """Return the time since a round's clock started, None if that is not remembered."""
        began = self._began_ms.get(round_)
        return None if began is None else max(0, now_ms - began)
