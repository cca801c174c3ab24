"""What the run log may contain. The log is the run: base weights + these records = the model.

A record's position is its index in the log. Only `RoundSealed` changes weights.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.spec import RunSpec


class LeaveReason(IntEnum):
    """Why a peer stopped being a member."""

    LEFT = 1
    """It said goodbye."""
    LEASE_EXPIRED = 2
    """It stayed disconnected longer than its lease."""
    EVICTED = 3
    """The operator removed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """Record 0, and only there."""

    spec: RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJoined:
    """An identity became a member: for the first time with a new slot, later with the slot it always had."""

    slot: Slot
    key: PeerKey
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLeft:
    """A member is no longer waited for and its session slot is free."""

    slot: Slot
    reason: LeaveReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOpened:
    """Probes may begin. Its round number is that of the last sealed round + 1 (0 at first): it is not on the wire."""

    round: RoundNumber
    scale: float
    """s, an f32 value: projected gradient per code unit; where the run allows both estimators that of `spsa`."""
    deadline_ms: int
    """Milliseconds after opening at which the round is sealed without the missing peers."""
    exact_scale: float = 0.0
    """s of exact codes, an f32 value; 0 unless the run allows both estimators."""

    def scale_of(self, *, is_exact: bool) -> float:
        """Return the scale that a contribution is encoded with."""
        return self.exact_scale if is_exact and self.exact_scale else self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSealed:
    """Which contributions form a round. Columnar.

    Invariant: slots ascend strictly; len(slots) == len(counts); sum(counts) == len(codes); every count >= 1.
    """

    round: RoundNumber
    alpha: float
    """Step size, an f32 value, that multiplies the integer sum of codes x signs."""
    loss: float
    """Mean of the contributions' losses weighted by their valid codes, an f32 value; NaN if there is none."""
    digest: int
    """Canonical short digest (u32) of the weights the round was measured on."""
    slots: tuple[Slot, ...]
    counts: tuple[int, ...]
    codes: bytes
    """int8 codes, slot after slot in the order of `slots`, samples ascending."""
    exact: tuple[Slot, ...] = ()
    """Those of `slots`, in their order, whose codes are exact projections of one gradient; the others' are `spsa`."""

    def contributions(self) -> list[tuple[Slot, bytes]]:
        """Split the codes by slot."""
        ends = list(accumulate(self.counts))
        return [
            (slot, self.codes[end - count : end])
            for slot, count, end in zip(self.slots, self.counts, ends, strict=True)
        ]

    def by_estimator(self) -> tuple[bytes, bytes]:
        """Return the codes of `spsa` and the exact ones, each in the order of slots."""
        if not self.exact:
            return self.codes, b""
        exact = set(self.exact)
        parts = self.contributions()
        return (
            b"".join(codes for slot, codes in parts if slot not in exact),
            b"".join(codes for slot, codes in parts if slot in exact),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A peer's held-out evaluation of the weights after `round` rounds. A claim: nothing depends on it."""

    round: RoundNumber
    """Number of rounds applied to the evaluated weights."""
    slot: Slot
    loss: float
    accuracy: float | None
    """Fraction in [0, 1], None where the objective has no labels."""
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """All rounds of the RunSpec are sealed; nothing may follow but joins, leaves and evaluations.

    A member that was away when the run ended joins again to fetch the rest of the log.
    """

    rounds: int


Record = RunStarted | PeerJoined | PeerLeft | RoundOpened | RoundSealed | Evaluated | RunFinished
