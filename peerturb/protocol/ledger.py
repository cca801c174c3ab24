"""The fold of a run log: what is known after its first records, and which record may come next.

Coordinator, peers and `verify` share it, so that a record one of them writes is a record the others accept. It keeps no
codes: its size depends on the number of identities, not on the number of rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from peerturb import limits, stepping
from peerturb.errors import LogError
from peerturb.floats import f32
from peerturb.ids import PeerKey, Position, Slot, short_hex
from peerturb.plateau import Plateau
from peerturb.protocol.records import (
    Evaluated,
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.protocol.rules import alpha_of, estimator_objection, scales_after, shape_objection, step_size
from peerturb.spec import RunSpec
from peerturb.trend import Trend

__all__ = ["IllegalRecordError", "Ledger", "Member", "shape_objection", "step_size"]

_START = Position(0)

VOID_BYTE = stepping.VOID & 0xFF
"""A void code as it stands in a bytes object."""


class IllegalRecordError(LogError):
    """The record may not stand at this place of the log; the message says which rule it breaks."""


@dataclass(slots=True, kw_only=True)
class Member:
    """An identity the run has admitted, present or not."""

    slot: Slot
    key: PeerKey
    name: str
    is_joined: bool = True
    last_round: int = -1
    """Newest sealed round with a contribution of this peer; -1 if there is none."""
    last_evaluation: int = -1
    """Rounds applied at its newest evaluation; -1 if there is none."""
    probes: int = 0
    contributions: int = 0


@dataclass(slots=True, kw_only=True)
class Ledger:
    """State of a run after `position` records.

    Invariant: `members[slot].slot == slot`; `sealed_rounds` is the number of the open round, if one is open.
    """

    spec: RunSpec | None = None
    position: Position = _START
    members: list[Member] = field(default_factory=list)
    slot_of: dict[PeerKey, Slot] = field(default_factory=dict)
    open: RoundOpened | None = None
    """The round now open."""
    sealed_rounds: int = 0
    last_sealed_at: Position = _START
    """Position of the newest `RoundSealed`."""
    scale: float = 0.0
    """Scale the next round opens with; where the run allows both estimators that of `spsa`."""
    exact_scale: float = 0.0
    """That of exact codes; 0 unless the run allows both estimators."""
    last_scale: float = 0.0
    """Scale of the newest sealed round."""
    alpha: float = 0.0
    loss: float = float("nan")
    digest: int = 0
    """Of the newest sealed round."""
    probes: int = 0
    exact_probes: int = 0
    """How many of them are exact projections."""
    void_codes: int = 0
    is_finished: bool = False
    plateau: Plateau = field(default_factory=Plateau)
    """What the sealed losses say about the learning rate (`plateau` schedule)."""
    trend: Trend = field(default_factory=Trend)
    """Whether the sealed losses rise. Nothing in the log depends on it."""

    @classmethod
    def fold(cls, records: Iterable[Record]) -> "Ledger":
        """Apply all records to an empty ledger.

        Raises:
            IllegalRecordError: naming the first record that may not stand where it stands.
        """
        ledger = cls()
        for record in records:
            ledger.apply(record)
        return ledger

    def member(self, key: PeerKey) -> Member | None:
        """Return the identity's entry if it has ever been admitted."""
        slot = self.slot_of.get(key)
        return None if slot is None else self.members[slot]

    def next_slot(self, key: PeerKey) -> Slot:
        """Return the slot an identity has, or would get."""
        return self.slot_of.get(key, Slot(len(self.members)))

    @property
    def scales(self) -> tuple[float, float]:
        """`scale` and `exact_scale`."""
        return self.scale, self.exact_scale

    def scales_after(self, sealed: RoundSealed) -> tuple[float, float]:
        """Return the scales that follow the open round if it is sealed so: f32 values, as `scale`, `exact_scale`."""
        assert self.open is not None
        return scales_after(self.open, sealed)

    def alpha_for(self, sealed: RoundSealed) -> float:
        """Return the step size that follows from the open round's codes and the rounds before it: an f32 value."""
        assert self.spec is not None
        assert self.open is not None
        return alpha_of(self.spec, self.open, sealed, fraction=self.plateau.fraction)

    def apply(self, record: Record) -> None:
        """Check the record and take it in.

        Raises:
            IllegalRecordError: the record may not follow; the ledger is unchanged.
        """
        why = self.objection(record)
        if why is not None:
            raise IllegalRecordError(f"record {self.position} ({type(record).__name__}) {why}")
        match record:
            case RunStarted(spec=spec):
                self.spec = spec
                self.scale = f32(max(spec.perturbation.initial_scale, stepping.SCALE_MIN))
                self.exact_scale = self.scale if spec.perturbation.is_mixed else 0.0
            case PeerJoined():
                self._join(record)
            case PeerLeft(slot=slot):
                self.members[slot].is_joined = False
            case RoundOpened():
                self.open = record
            case RoundSealed():
                self._seal(record)
            case Evaluated(slot=slot, round=round_):
                self.members[slot].last_evaluation = round_
            case RunFinished():
                self.is_finished = True
            case _:
                assert_never(record)
        self.position = Position(self.position + 1)

    def objection(self, record: Record) -> str | None:
        """Say why the record may not come next, or return None if it may."""
        if isinstance(record, RunStarted):
            return None if self.position == 0 else "stands in the middle of the log; it begins one"
        spec = self.spec
        if spec is None:
            return "comes before RunStarted"
        match record:
            case PeerJoined():
                return self._objection_to_join(record)
            case PeerLeft():
                return self._objection_to_leave(record)
            case RoundOpened():
                return self._objection_to_open(record, spec)
            case RoundSealed():
                return self._objection_to_seal(record, spec)
            case Evaluated():
                return self._objection_to_evaluation(record)
            case RunFinished():
                return self._objection_to_finish(record, spec)
            case _:
                assert_never(record)

    def _join(self, record: PeerJoined) -> None:
        if record.slot == len(self.members):
            self.members.append(Member(slot=record.slot, key=record.key, name=record.name))
            self.slot_of[record.key] = record.slot
        else:
            member = self.members[record.slot]
            member.is_joined = True
            member.name = record.name

    def _seal(self, record: RoundSealed) -> None:
        assert self.open is not None
        assert self.spec is not None
        for slot, count in zip(record.slots, record.counts, strict=True):
            member = self.members[slot]
            member.last_round = record.round
            member.probes += count
            member.contributions += 1
        self.last_scale = self.open.scale
        self.scale, self.exact_scale = self.scales_after(record)
        self.alpha, self.loss, self.digest = record.alpha, record.loss, record.digest
        self.probes += len(record.codes)
        self.exact_probes += len(record.by_estimator()[1])
        self.void_codes += record.codes.count(VOID_BYTE)
        self.sealed_rounds = record.round + 1
        self.last_sealed_at = self.position
        self.plateau.take(self.spec.step, record.round, record.loss)
        self.trend.take(record.round, record.loss)
        self.open = None

    def _objection_to_join(self, record: PeerJoined) -> str | None:
        known = self.member(record.key)
        if len(record.key) != 32:
            return f"has a key of {len(record.key)} bytes; an identity has 32"
        if known is not None and known.is_joined:
            return f"admits slot {known.slot}, which is a member already"
        expected = self.next_slot(record.key)
        if record.slot != expected:
            return f"gives slot {record.slot} to an identity whose slot is {expected}"
        return None if record.slot < limits.SLOTS_MAX else f"exceeds the {limits.SLOTS_MAX} slots of a run"

    def _objection_to_leave(self, record: PeerLeft) -> str | None:
        if record.slot >= len(self.members) or not self.members[record.slot].is_joined:
            return f"names slot {record.slot}, which is not a member"
        return None if record.reason in LeaveReason else f"has the unknown reason {record.reason}"

    def _objection_to_open(self, record: RoundOpened, spec: RunSpec) -> str | None:
        if self.is_finished:
            return "opens a round after the end of the run"
        if self.open is not None:
            return f"opens a round while round {self.open.round} is open"
        if record.round != self.sealed_rounds:
            return f"opens round {record.round}; the next one is {self.sealed_rounds}"
        if spec.round.count and record.round >= spec.round.count:
            return f"opens round {record.round} of a run of {spec.round.count}"
        if record.scale != self.scale:
            return f"has scale {record.scale!r}; from the codes follows {self.scale!r}"
        if record.exact_scale != self.exact_scale:
            return f"has the exact scale {record.exact_scale!r}; from the codes follows {self.exact_scale!r}"
        if not spec.round.deadline_ms_min <= record.deadline_ms <= spec.round.deadline_ms_max:
            bounds = f"{spec.round.deadline_ms_min} and {spec.round.deadline_ms_max}"
            return f"has a deadline of {record.deadline_ms} ms; the RunSpec wants it between {bounds}"
        return None

    def _objection_to_seal(self, record: RoundSealed, spec: RunSpec) -> str | None:
        if self.open is None:
            return "seals a round while none is open"
        if record.round != self.open.round:
            return f"seals round {record.round}; open is round {self.open.round}"
        why = shape_objection(record) or estimator_objection(record, spec)
        if why is not None:
            return why
        if record.slots[-1] >= len(self.members):
            return f"holds a contribution of slot {record.slots[-1]}, which was never admitted"
        first = spec.first_digest if record.round == 0 else None
        if first is not None and record.digest != first:
            return f"was measured on weights {short_hex(record.digest)}; the base weights are {short_hex(first)}"
        alpha = self.alpha_for(record)
        if record.alpha != alpha:
            return f"has step size {record.alpha!r}; from the codes follows {alpha!r}"
        return None

    def _objection_to_evaluation(self, record: Evaluated) -> str | None:
        if record.slot >= len(self.members):
            return f"names slot {record.slot}, which was never admitted"
        if record.round > self.sealed_rounds:
            return f"is of {record.round} rounds, but only {self.sealed_rounds} are sealed"
        last = self.members[record.slot].last_evaluation
        return None if record.round > last else f"is not newer than slot {record.slot}'s last one, of {last} rounds"

    def _objection_to_finish(self, record: RunFinished, spec: RunSpec) -> str | None:
        if self.is_finished:
            return "ends a run that has ended"
        if self.open is not None:
            return f"ends the run while round {self.open.round} is open"
        if not spec.round.count:
            return "ends a run without an end"
        if not record.rounds == self.sealed_rounds == spec.round.count:
            return f"says {record.rounds} rounds, sealed are {self.sealed_rounds}, the RunSpec has {spec.round.count}"
        return None
