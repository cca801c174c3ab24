"""The seal rule: one pure function that says whether a round is sealed now, and why.

The reason's code is a metric label; its sentence goes to logs, status and tests.
"""

from collections.abc import Set
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SealDecision:
    """Whether to seal, and why."""

    is_seal: bool
    reason: SealReason
    text: str


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
    have = _count(len(contributed), "contribution")
    missing = awaited - contributed
    is_due = due_in_ms is not None and due_in_ms <= 0
    if len(contributed) >= min_peers:
        if not missing:
            return SealDecision(is_seal=True, reason=SealReason.EVERYONE, text=f"have {have}, nobody else is awaited")
        if is_due:
            text = f"deadline passed with {have}; without {_slots(missing)}"
            return SealDecision(is_seal=True, reason=SealReason.DEADLINE, text=text)
    elif not connected:
        text = f"no peer is connected; have {have}, need min_peers {min_peers}"
        return SealDecision(is_seal=False, reason=SealReason.NO_PEERS, text=text)
    elif is_due or not (missing or connected - contributed):
        text = f"have {have}, need min_peers {min_peers}"
        return SealDecision(is_seal=False, reason=SealReason.TOO_FEW, text=text)
    when = "no deadline yet" if due_in_ms is None else f"deadline in {due_in_ms} ms"
    text = f"have {have}, awaiting {_slots(missing or connected - contributed)} ({when})"
    return SealDecision(is_seal=False, reason=SealReason.AWAITING, text=text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _slots(slots: Set[Slot]) -> str:
    """Name a few slots and count the rest."""
    names = ", ".join(map(str, sorted(slots)[:_NAMED_MAX]))
    rest = len(slots) - _NAMED_MAX
    noun = "slot" if len(slots) == 1 else "slots"
    return f"{noun} {names}" if rest <= 0 else f"{noun} {names} and {rest} more"
