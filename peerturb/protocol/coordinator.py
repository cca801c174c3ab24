"""The coordinator's half of the protocol: admits peers, collects contributions, decides when a round is sealed.

Pure: time comes in as `now_ms` (any monotonic milliseconds), decisions go out as outputs, and what the log holds
changes only in `apply`. It never sees weights. Use it through `peerturb.protocol.driver.drive`.
"""

from collections.abc import Iterable, Sequence
from typing import assert_never

from peerturb.errors import RejectCode
from peerturb.floats import f32
from peerturb.ids import Position, RoundNumber, Slot, short_hex
from peerturb.protocol import admission
from peerturb.protocol.contributions import Contributions
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.membership import Lease, Link, Membership
from peerturb.protocol.messages import Contribution, Disconnected, Evaluation, FromPeer, Hello, Leave, Proof, Welcome
from peerturb.protocol.outputs import Append, CoordinatorOutput, Notice, Reject, Send, SessionId
from peerturb.protocol.pace import Pace
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
from peerturb.protocol.sealing import SealDecision, SealReason, seal_decision
from peerturb.protocol.status import CoordinatorStatus, Counters, describe_run
from peerturb.protocol.trend import TrendNews
from peerturb.spec import RunSpec

_STALLS = (SealReason.NO_PEERS, SealReason.TOO_FEW)


class CoordinatorMachine:
    """Decides for one run. Invariant: `ledger` is the fold of the applied records and nothing else."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.ledger = Ledger()
        self.counters = Counters()
        self._members = Membership()
        self._pending = Contributions()
        self._pace = Pace(spec.round)
        self._manifest_digest: bytes | None = None
        self._now_ms: int | None = None
        self._clock_ms: int | None = None
        self._sealing: SealReason | None = None
        self._stall: SealReason | None = None
        self._losses: dict[Slot, float] = {}
        self._lagging: list[Slot] = []
        self._trend_news = TrendNews()

    @staticmethod
    def first_record(spec: RunSpec) -> RunStarted:
        """Return record 0, which the shell appends to an empty log."""
        return RunStarted(spec=spec)

    @classmethod
    def from_records(cls, spec: RunSpec, records: Iterable[Record]) -> "CoordinatorMachine":
        """Fold a log.

        Raises:
            IllegalRecordError: the log is not a legal one, or belongs to another RunSpec.
        """
        machine = cls(spec)
        for record in records:
            machine.apply(record)
        return machine

    def receive(self, session: SessionId, message: FromPeer | Disconnected, now_ms: int) -> Sequence[CoordinatorOutput]:
        """Take in a message. A `Hello` must have passed the shell's checks of token, signature and chain."""
        self._touch(now_ms)
        if isinstance(message, Hello):
            return self._hello(session, message)
        if isinstance(message, Disconnected):
            self._close(session, self.spec.round.lease_ms, LeaveReason.LEASE_EXPIRED)
            return []
        link = self._members.links.get(session)
        if link is None or link.slot is None:
            name = type(message).__name__.lower()
            return [
                self._reject(session, RejectCode.NOT_JOINED, f"a {name} came before the handshake was complete", True)
            ]
        match message:
            case Contribution():
                return self._contribution(link.session, link.slot, message)
            case Evaluation():
                return self._evaluation(link.session, link.slot, message)
            case Leave():
                self._close(session, 0, LeaveReason.LEFT)
                return []
            case Proof():
                return [self._reject(session, RejectCode.MALFORMED, "a proof came after the handshake", True)]
            case _:
                assert_never(message)

    def advance(self, now_ms: int) -> Sequence[CoordinatorOutput]:
        """Decide what is to be done now; call until it returns nothing (`drive` does).

        After a failed append it decides the same again.
        """
        self._touch(now_ms)
        if self.ledger.spec is None:
            return [Append(record=self.first_record(self.spec))]
        link = self._members.unadmitted()
        if link is not None:
            return self._admission(link)
        leaving: list[CoordinatorOutput] = [
            Append(record=PeerLeft(slot=slot, reason=reason)) for slot, reason in self._members.expired(now_ms)
        ]
        if leaving:
            return leaving
        if self._lagging:
            slots, self._lagging = self._lagging, []
            return [
                Notice(
                    code="lagging", text=f"slot {slot} missed its deadlines; it is awaited again once it contributes"
                )
                for slot in slots
            ]
        if (news := self._trend_news.next(self.ledger.trend)) is not None:
            return [news]
        if self.ledger.is_finished:
            return []
        if self.ledger.open is None:
            scales, longest_ms = self.ledger.scales, self._pace.longest_ms
            return [Append(record=self._next_record(self.ledger.sealed_rounds, scales, longest_ms))]
        return self._decide()

    def deadline_ms(self) -> int | None:
        """Return when `advance` must be called next (0: now; None: not before the next message).

        It may lie in the past after a failed append: the shell chooses when to try again.
        """
        now_ms = self._now_ms
        if now_ms is None or self.ledger.spec is None:
            return 0
        times = [self._members.deadline_ms(now_ms)]
        due_in_ms = self._due_in_ms()
        if due_in_ms is not None and due_in_ms > 0:
            times.append(now_ms + due_in_ms)
        return min((time for time in times if time is not None), default=None)

    def apply(self, record: Record) -> None:
        """Take in a record that is in the log.

        Raises:
            IllegalRecordError: the record may not come next; nothing has changed.
        """
        if isinstance(record, RunStarted) and record.spec.digest != self.spec.digest:
            theirs, ours = record.spec.digest.hex()[:16], self.spec.digest.hex()[:16]
            raise IllegalRecordError(f"the log belongs to RunSpec {theirs}, this run's is {ours}")
        self.ledger.apply(record)
        match record:
            case PeerJoined(key=key):
                link = self._members.session_of(key)
                if link is not None:
                    self._admit(link, record.slot)
            case PeerLeft(slot=slot):
                self._members.left(slot)
                self._losses.pop(slot, None)
            case RoundOpened():
                self._start_clock()
            case RoundSealed():
                self._sealed(record)
            case RunStarted() | Evaluated() | RunFinished():
                pass
            case _:
                assert_never(record)

    def reject(self, session: SessionId, code: RejectCode, why: str, *, closes: bool) -> Reject:
        """Make and count a refusal that the shell decided on (token, signature, chain, undecodable bytes)."""
        return self._reject(session, code, why, closes)

    def decision(self, now_ms: int) -> SealDecision | None:
        """Return what the seal rule says about the open round, None if there is none. Changes nothing."""
        if self.ledger.open is None:
            return None
        return seal_decision(
            contributed=self._pending.of_slot.keys(),
            awaited=self._members.awaited(now_ms),
            connected=self._members.connected_slots,
            min_peers=self.spec.round.min_peers,
            due_in_ms=self._due_in_ms(now_ms),
        )

    def status(self, now_ms: int) -> CoordinatorStatus:
        """Describe the run. Changes nothing."""
        return describe_run(self.spec, self.ledger, self._members, self._losses, self.decision(now_ms))

    # --- time -------------------------------------------------------------------------------------------------------

    def _touch(self, now_ms: int) -> None:
        """Let time pass; the first call after the fold starts the leases of the log's members."""
        if self._now_ms is None:
            self._now_ms = now_ms
            recent_round = self.ledger.sealed_rounds - 2
            self._members.restart(
                self.ledger.members, now_ms, lease_ms=self.spec.round.lease_ms, recent_round=recent_round
            )
        self._now_ms = max(self._now_ms, now_ms)
        self._start_clock()

    def _start_clock(self) -> None:
        """The open round's deadline counts from when min_peers are connected, and anew after nobody was."""
        opened = self.ledger.open
        if opened is None or self._now_ms is None:
            return
        if not self._members.connected:
            self._clock_ms = None
        elif self._clock_ms is None and self._members.connected >= self.spec.round.min_peers:
            self._clock_ms = self._now_ms
            self._pace.began(opened.round, self._now_ms)

    def _due_in_ms(self, now_ms: int | None = None) -> int | None:
        opened, now = self.ledger.open, self._now_ms if now_ms is None else now_ms
        if opened is None or self._clock_ms is None or now is None:
            return None
        return self._clock_ms + opened.deadline_ms - now

    # --- sessions ---------------------------------------------------------------------------------------------------

    def _hello(self, session: SessionId, hello: Hello) -> Sequence[CoordinatorOutput]:
        members = self._members
        if session in members.links:
            return [self._reject(session, RejectCode.MALFORMED, "a second hello in one session", True)]
        old = members.session_of(hello.key)
        refusal = admission.refusal(
            hello,
            spec=self.spec,
            ledger=self.ledger,
            manifest_digest=self._manifest_digest if members.links else None,
            sessions=len(members.links) - (old is not None),
        )
        if refusal is not None:
            return [self._reject(session, refusal.code, refusal.why, True)]
        outputs: list[CoordinatorOutput] = []
        if old is not None:
            why = "the same identity opened another session; is the node started twice with one key?"
            outputs.append(self._reject(old.session, RejectCode.SUPERSEDED, why, True))
            self._close(old.session, self.spec.round.lease_ms, LeaveReason.LEASE_EXPIRED)
        self._manifest_digest = hello.manifest_digest
        members.open(Link(session=session, key=hello.key, name=hello.name, position=hello.position))
        return outputs

    def _admission(self, link: Link) -> list[CoordinatorOutput]:
        """Welcome a session whose identity is a member; else log its joining first."""
        member = self.ledger.member(link.key)
        slot = self.ledger.next_slot(link.key)
        if member is not None and member.is_joined:
            self._admit(link, slot)
            return [Send(session=link.session, message=Welcome(slot=slot, head=self.ledger.position))]
        head = Position(self.ledger.position + 1)
        return [
            Append(record=PeerJoined(slot=slot, key=link.key, name=link.name)),
            Send(session=link.session, message=Welcome(slot=slot, head=head)),
        ]

    def _admit(self, link: Link, slot: Slot) -> None:
        """A peer that has contributed before and has the newest sealed round is awaited at once.

        Any other, a newcomer or one with a long log to catch up on, is awaited from its first contribution on.
        """
        is_active = self.ledger.members[slot].last_round >= 0 and link.position >= self.ledger.last_sealed_at
        self._members.admit(link, slot, is_active=is_active)
        self._start_clock()

    def _close(self, session: SessionId, lease_ms: int, reason: LeaveReason) -> None:
        assert self._now_ms is not None
        self._members.close(session, Lease(until_ms=self._now_ms + lease_ms, reason=reason))
        self._start_clock()

    # --- contributions ----------------------------------------------------------------------------------------------

    def _contribution(self, session: SessionId, slot: Slot, message: Contribution) -> Sequence[CoordinatorOutput]:
        assert self._now_ms is not None
        refusal = admission.contribution_refusal(message, self.ledger, spec=self.spec)
        if refusal is None:
            if self._pending.is_full and slot not in self._pending.of_slot:
                why = "the round holds as many contributions as a record can"
                return [self._reject(session, RejectCode.RUN_FULL, why, False)]
            self.counters.repeated_contributions += slot in self._pending.of_slot
            self._members.contributed(slot)
            self._losses[slot] = message.loss
            self._pending.add(slot, message, self._pace.latency_ms(message.round, self._now_ms) or 0)
            return []
        if refusal.code is RejectCode.STALE_ROUND:
            self._late(slot, message.round)
        self.counters.digest_mismatches += refusal.code is RejectCode.DIGEST_MISMATCH
        return [self._reject(session, refusal.code, refusal.why, refusal.closes)]

    def _late(self, slot: Slot, round_: RoundNumber) -> None:
        """A late contribution tells how long its peer takes: await the peer if deadlines can be long enough for it."""
        assert self._now_ms is not None
        latency_ms = self._pace.latency_ms(round_, self._now_ms)
        if latency_ms is not None and latency_ms <= self.spec.round.deadline_ms_max:
            self._pace.longest_ms = max(self._pace.longest_ms or 0, latency_ms)
            self._members.contributed(slot)

    def _evaluation(self, session: SessionId, slot: Slot, message: Evaluation) -> Sequence[CoordinatorOutput]:
        record = Evaluated(
            round=message.round,
            slot=slot,
            loss=f32(message.loss),
            accuracy=None if message.accuracy is None else f32(message.accuracy),
            examples=message.examples,
        )
        why = self.ledger.objection(record)
        if why is None:
            return [Append(record=record)]
        code = RejectCode.FUTURE_ROUND if message.round > self.ledger.sealed_rounds else RejectCode.STALE_ROUND
        return [self._reject(session, code, f"the evaluation {why}", False)]

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _decide(self) -> Sequence[CoordinatorOutput]:
        assert self._now_ms is not None
        decision = self.decision(self._now_ms)
        assert decision is not None
        if decision.is_seal:
            self._sealing = decision.reason
            return self._seal()
        stall = decision.reason if decision.reason in _STALLS else None
        if stall is None or stall is self._stall:
            return []
        self._stall = stall
        return [Notice(code=stall.value, text=f"round {self.ledger.sealed_rounds} is not sealed: {decision.text}")]

    @property
    def sealing(self) -> SealReason | None:
        """Why a round is being sealed, from the decision until the machine has applied the record; None otherwise."""
        return self._sealing

    def _seal(self) -> list[CoordinatorOutput]:
        """Seal the round and open the next one (or end the run) in one transaction."""
        opened = self.ledger.open
        assert opened is not None
        sealed = self._pending.seal(self.ledger)
        longest_ms = self._pace.after(self._pending.longest_ms(sealed.slots))
        scales = self.ledger.scales_after(sealed)
        outputs: list[CoordinatorOutput] = [
            Append(record=sealed),
            Append(record=self._next_record(opened.round + 1, scales, longest_ms)),
        ]
        for slot, pending in sorted(self._pending.of_slot.items()):
            link = self._members.link_of(slot)
            if pending.contribution.digest != sealed.digest and link is not None:
                outputs.append(self._digest_mismatch(link.session, pending.contribution, sealed))
        if self._stall is not None:
            outputs.append(Notice(code="resumed", text=f"round {opened.round} is sealed: the run goes on"))
        return outputs

    def _digest_mismatch(self, session: SessionId, contribution: Contribution, sealed: RoundSealed) -> Reject:
        why = (
            f"round {sealed.round} was measured on weights {short_hex(sealed.digest)} "
            f"({len(sealed.slots)} of {len(self._pending.of_slot)} peers), by you on {short_hex(contribution.digest)}: "
            "rebuild from the log"
        )
        return Reject(session=session, code=RejectCode.DIGEST_MISMATCH, why=why, closes=False)

    def _next_record(
        self, round_: int, scales: tuple[float, float], longest_ms: int | None
    ) -> RoundOpened | RunFinished:
        if self.spec.round.count and round_ >= self.spec.round.count:
            return RunFinished(rounds=round_)
        due_ms = self._pace.deadline_ms(longest_ms)
        return RoundOpened(round=RoundNumber(round_), scale=scales[0], deadline_ms=due_ms, exact_scale=scales[1])

    def _sealed(self, record: RoundSealed) -> None:
        """Count what the sealed round says about its peers, then forget its contributions."""
        if self._now_ms is None or self._sealing is None:  # folding a log: nothing of this process is in it
            return
        awaited = set(self._members.awaited(self._now_ms))
        present = {slot for slot in record.slots if slot in self._pending.of_slot}
        for slot, pending in self._pending.of_slot.items():
            if pending.contribution.digest == record.digest:
                continue
            self.counters.digest_mismatches += 1
            self.counters.rejects[RejectCode.DIGEST_MISMATCH] += 1
            self._members.active.discard(slot)  # it has to rebuild first
        for slot in sorted(awaited - self._pending.of_slot.keys()):
            if self._members.missed(slot):
                self._lagging.append(slot)
        if present:
            self._pace.longest_ms = self._pace.after(self._pending.longest_ms(tuple(present)))
        self.counters.seals[self._sealing] += 1
        self._pending = Contributions()
        self._sealing = self._stall = self._clock_ms = None

    def _reject(self, session: SessionId, code: RejectCode, why: str, closes: bool) -> Reject:
        self.counters.rejects[code] += 1
        return Reject(session=session, code=code, why=why, closes=closes)
