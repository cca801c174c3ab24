"""The seal rule: one pure function that says whether a round is sealed now, and why.

The reason's code is a metric label; its sentence goes to logs, status and tests.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from enum import Enum

from peerturb.ids import Slot

_NAMED_MAX = 8


class SealReason(Enum):
    """Why a round is sealed or not; the value is the metric label."""

    EVERYONE = "everyone"
    """Sealed: every awaited peer has contributed."""
    DEADLINE = "deadline"
    """Sealed: the deadline has passed and enough have contributed."""
    AWAITING = "awaiting"
    """Waits for the contributions of awaited peers."""
    TOO_FEW = "too_few"
    """Waits: fewer contributions than min_peers, and everybody connected has contributed or the deadline is over."""
    NO_PEERS = "no_peers"
    """Waits: nobody is connected."""


_SEALS = (SealReason.EVERYONE, SealReason.DEADLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealDecision:
    """Whether to seal, and why."""

    is_seal: bool
    reason: SealReason
    _say: Callable[[], str]

    @property
    def text(self) -> str:
        """The reason as a sentence, of the sets as they are now.

        Made when asked for: with a thousand peers it costs many times what the decision does, and that is taken after
        every message.
        """
        return self._say()


def seal_decision(
    *, contributed: Set[Slot], awaited: Set[Slot], connected: Set[Slot], min_peers: int, due_in_ms: int | None
) -> SealDecision:
    """Decide whether the open round is sealed now.

    Args:
        contributed: slots whose contributions have arrived.
        awaited: slots the round waits for until its deadline.
        connected: slots with a session, awaited or not.
        min_peers: contributions without which no round is sealed.
        due_in_ms: time left until the deadline, not positive once it has passed; None while its clock stands.
    """
    assert min_peers >= 1
    is_complete = contributed >= awaited
    is_due = due_in_ms is not None and due_in_ms <= 0

    def decide(reason: SealReason, say: Callable[[str], str]) -> SealDecision:
        def text() -> str:
            return say(_count(len(contributed), "contribution"))

        return SealDecision(is_seal=reason in _SEALS, reason=reason, _say=text)

    if len(contributed) >= min_peers:
        if is_complete:
            return decide(SealReason.EVERYONE, lambda have: f"have {have}, nobody else is awaited")
        if is_due:
            missing = awaited - contributed
            return decide(SealReason.DEADLINE, lambda have: f"deadline passed with {have}; without {_slots(missing)}")
    elif not connected:
        return decide(
            SealReason.NO_PEERS, lambda have: f"no peer is connected; have {have}, need min_peers {min_peers}"
        )
    elif is_due or (is_complete and contributed >= connected):
        return decide(SealReason.TOO_FEW, lambda have: f"have {have}, need min_peers {min_peers}")

    def awaiting(have: str) -> str:
        when = "no deadline yet" if due_in_ms is None else f"deadline in {due_in_ms} ms"
        return f"have {have}, awaiting {_slots((awaited - contributed) or (connected - contributed))} ({when})"

    return decide(SealReason.AWAITING, awaiting)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _slots(slots: Set[Slot]) -> str:
    """Name a few slots and count the rest."""
    names = ", ".join(map(str, sorted(slots)[:_NAMED_MAX]))
    rest = len(slots) - _NAMED_MAX
    noun = "slot" if len(slots) == 1 else "slots"
    return f"{noun} {names}" if rest <= 0 else f"{noun} {names} and {rest} more"
