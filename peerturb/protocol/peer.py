"""A peer's half of the protocol: follows the log, measures the open round, keeps connected.

Pure, like `CoordinatorMachine`: time comes in as `now_ms`, work and messages go out as outputs, and what it knows of
the log changes only in `apply`. It knows nothing of tensors; the shell does the work and answers with `completed`. Use
it through `peerturb.protocol.driver.drive`.
"""

from collections import deque
from collections.abc import Sequence
from typing import assert_never

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Slot, short_hex
from peerturb.noise import Estimator
from peerturb.protocol.backoff import HANDSHAKE_MS_MAX, is_worth_retrying, wait_ms
from peerturb.protocol.evaluating import Evaluating
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.measuring import Measuring
from peerturb.protocol.messages import (
    Challenge,
    Hello,
    Leave,
    Records,
    Refusal,
    ToPeer,
    Welcome,
)
from peerturb.protocol.outputs import (
    Append,
    Connect,
    Disconnect,
    HangUp,
    Notice,
    PeerOutput,
    Say,
    Stop,
)
from peerturb.protocol.peer_status import PeerStatus, Session
from peerturb.protocol.records import Record, RoundSealed, RunStarted
from peerturb.protocol.replica import APPLIES_MAX, Replica
from peerturb.protocol.results import Applied, EvaluatedResult, Measured, Rebuilt, Result
from peerturb.protocol.trend import TrendNews
from peerturb.spec import PROTOCOL_VERSION, RunSpec

__all__ = ["APPLIES_MAX", "PeerMachine", "PeerStatus", "Session"]

INBOX_RECORDS_MAX = 4_096
"""Records received and not yet taken in, above which the shell should stop reading."""


class PeerMachine:
    """Follows one run with one identity.

    Invariant: every sealed round is handed out for `Apply` once, in order (or replayed by a `Rebuild`); a `Measure` is
    given only when nothing is left to apply.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        key: PeerKey,
        name: str,
        token: str,
        base_digest: bytes,
        manifest_digest: bytes,
        digest: int,
        ledger: Ledger | None = None,
        unapplied: Sequence[RoundSealed] = (),
        probes_max: int | None = None,
        estimator: Estimator = "spsa",
        evaluates: bool = True,
        doubts: bool = True,
    ) -> None:
        """Begin from what the peer has.

        Args:
            spec: the run's.
            key: identity.
            name: display name.
            token: join token, empty if none is needed.
            base_digest: 32 bytes, of the loaded base weights.
            manifest_digest: 32 bytes, of what it trains.
            digest: short digest (u32) of the weights as they are now.
            ledger: fold of the local log; None for an empty one.
            unapplied: sealed rounds of the local log, its last ones, that the weights do not have yet.
            probes_max: local limit on probes per round, below the RunSpec's.
            estimator: how the shell measures; with `exact` there is no time budget, all codes are of one gradient.
            evaluates: whether it has held-out examples.
            doubts: whether it rebuilds weights that the log or the coordinator calls wrong; a simulated liar does not.
        """
        self.spec, self.doubts = spec, doubts
        self.ledger = ledger if ledger is not None else Ledger()
        assert self.ledger.spec is None or self.ledger.spec.digest == spec.digest
        self.slot: Slot | None = None
        self._key, self._name, self._token = key, name, token
        self._base_digest, self._manifest_digest = base_digest, manifest_digest
        self._measuring = Measuring(spec, estimator, probes_max)
        self._replica = Replica(self.ledger.sealed_rounds, unapplied, digest)
        self._evaluating = Evaluating(every=spec.objective.eval_every if evaluates else 0)
        self._session = Session.WAITING
        self._attempt, self._connect_at_ms = 0, 0
        self._give_up_at_ms = 0
        self._refusals = 0
        self._head = 0
        self._inbox: deque[Record] = deque()
        self._trend_news = TrendNews()

    # --- what the shell tells ---------------------------------------------------------------------------------------

    def hello(self, chain: bytes) -> Hello:
        """Return the Hello for a new session; `chain` is the chain hash of the local log as it is now."""
        return Hello(
            protocol=PROTOCOL_VERSION,
            key=self._key,
            name=self._name,
            token=self._token,
            spec_digest=self.spec.digest,
            base_digest=self._base_digest,
            manifest_digest=self._manifest_digest,
            position=self.ledger.position,
            chain=chain,
        )

    def connected(self, now_ms: int) -> Sequence[PeerOutput]:
        """The stream stands; the shell sends the Hello, which must be made at this moment."""
        if self._session is Session.CONNECTING:
            self._session = Session.JOINING
            self._inbox.clear()  # the coordinator sends again from the Hello's position
        return []

    def disconnected(self, why: str, now_ms: int) -> Sequence[PeerOutput]:
        """The stream has ended, or could not be opened."""
        if not self._session.has_stream:
            return []
        self._wait(now_ms)
        return [
            Notice(code="disconnected", text=f"no session: {why}; next attempt in {self._connect_at_ms - now_ms} ms")
        ]

    def receive(self, message: ToPeer, now_ms: int) -> Sequence[PeerOutput]:
        """Take in a message of the current session. The shell answers `Challenge` itself."""
        if not self._session.has_stream:
            return []
        match message:
            case Challenge():
                return []
            case Welcome():
                return self._welcome(message, now_ms)
            case Records():
                return self._records(message, now_ms)
            case Refusal():
                return self._refusal(message, now_ms)
            case _:
                assert_never(message)

    def completed(self, result: Result, now_ms: int) -> Sequence[PeerOutput]:
        """A piece of work is done."""
        outputs = self._completed(result)
        return [] if self._session is Session.STOPPED else outputs

    def leave(self) -> Sequence[PeerOutput]:
        """The user wants to stop."""
        return self._stop(None, "left")

    def pause(self) -> Sequence[PeerOutput]:
        """Take no part until `resume`: say goodbye, so that nobody waits, and measure nothing. What is at hand is
        still applied; what is sealed meanwhile comes afterwards. A peer that has seen the run's end goes on to its own.
        """
        if self._session in (Session.PAUSED, Session.STOPPED) or self.ledger.is_finished:
            return []
        outputs = self._measuring.cancel()
        if self._session is Session.JOINED:
            outputs.append(Say(message=Leave()))
        if self._session.has_stream:
            outputs.append(HangUp())
        self._part()
        self._session = Session.PAUSED
        self._inbox.clear()
        return outputs

    def resume(self, now_ms: int) -> Sequence[PeerOutput]:
        """Take part again after a `pause`."""
        if self._session is Session.PAUSED:
            self._session, self._connect_at_ms, self._attempt = Session.WAITING, now_ms, 0
        return []

    # --- decisions --------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int) -> Sequence[PeerOutput]:
        """Decide what is to be done now; call until it returns nothing (`drive` does)."""
        if self._session is Session.STOPPED:
            return []
        if self._session is Session.WAITING and now_ms >= self._connect_at_ms and not self.ledger.is_finished:
            self._session = Session.CONNECTING
            self._give_up_at_ms = now_ms + HANDSHAKE_MS_MAX
            return [Connect()]
        if self._session in (Session.CONNECTING, Session.JOINING) and now_ms >= self._give_up_at_ms:
            return self._reconnect("the coordinator did not answer", now_ms)
        if self.doubts and self._replica.suspicion is not None:
            return self._rebuild()
        if self._replica.is_hopeless:
            why = (
                f"{self._replica.dispute}, {limits.DISPUTES_MAX} rounds before it were disputed too, after a rebuild "
                "from the log: faulty memory here, or false digests there"
            )
            return self._stop(RejectCode.DIGEST_MISMATCH, why)
        if self.ledger.is_finished and (cancelled := self._measuring.cancel()):
            return cancelled
        if handed := self._replica.hand_out():
            return handed
        if self._inbox and not self._replica.is_full:
            return self._take_in()
        if self._replica.is_applying or self._inbox:
            return []
        return self._finish() if self.ledger.is_finished else self._work()

    def deadline_ms(self) -> int | None:
        """Return when `advance` must be called next; None: not before the next message or result."""
        match self._session:
            case Session.WAITING:
                return None if self.ledger.is_finished else self._connect_at_ms
            case Session.CONNECTING | Session.JOINING:
                return self._give_up_at_ms
            case Session.JOINED | Session.PAUSED | Session.STOPPED:
                return None
            case _:
                assert_never(self._session)

    def apply(self, record: Record) -> None:
        """Take in a record that is in the local log.

        Raises:
            IllegalRecordError: the record may not come next; nothing has changed.
        """
        self.ledger.apply(record)
        if self._inbox and self._inbox[0] is record:
            self._inbox.popleft()
        if isinstance(record, RoundSealed):
            self._replica.sealed(record)

    @property
    def wants_records(self) -> bool:
        """False while so many records wait that the shell should not read the stream further."""
        return len(self._inbox) < INBOX_RECORDS_MAX

    @property
    def status(self) -> PeerStatus:
        """Describe what the peer is doing."""
        member = None if self.slot is None or self.slot >= len(self.ledger.members) else self.ledger.members[self.slot]
        return PeerStatus(
            session=self._session,
            slot=self.slot,
            position=self.ledger.position,
            head=max(self._head, self.ledger.position),
            rounds_sealed=self.ledger.sealed_rounds,
            rounds_applied=self._replica.rounds,
            measuring=self._measuring.round,
            backlog=len(self._inbox),
            digest=self._replica.digest,
            is_finished=self.ledger.is_finished,
            contributions=0 if member is None else member.contributions,
            warning=self.ledger.trend.warning,
        )

    # --- session ----------------------------------------------------------------------------------------------------

    def _wait(self, now_ms: int) -> None:
        self._session = Session.WAITING
        self._connect_at_ms = now_ms + wait_ms(self._key, self._attempt)
        self._attempt += 1
        self._part()

    def _part(self) -> None:
        """The session is over: what is sealed until the next one is old news."""
        self._replica.is_live = False
        self._measuring.disconnected()

    def _reconnect(self, why: str, now_ms: int) -> list[PeerOutput]:
        self._wait(now_ms)
        self._inbox.clear()
        return [Disconnect(why=why)]

    def _stop(self, code: RejectCode | None, why: str) -> list[PeerOutput]:
        if self._session is Session.STOPPED:
            return []
        goodbye = self._measuring.cancel()
        if self._session is Session.JOINED and code is None:
            goodbye.append(Say(message=Leave()))
        self._session = Session.STOPPED
        self._inbox.clear()
        return [*goodbye, Stop(code=code, why=why)]

    def _welcome(self, welcome: Welcome, now_ms: int) -> list[PeerOutput]:
        if self._session is Session.JOINED:
            return self._reconnect("the coordinator sent a second welcome", now_ms)
        if welcome.head < self.ledger.position:
            why = f"the coordinator's log has {welcome.head} records, ours {self.ledger.position}"
            return self._stop(RejectCode.LOG_DIVERGED, why)
        self._session = Session.JOINED
        self._attempt = self._refusals = 0
        self._measuring.joined()
        self.slot, self._head = welcome.slot, welcome.head
        return []

    def _refusal(self, refusal: Refusal, now_ms: int) -> list[PeerOutput]:
        if not refusal.closes:
            if refusal.code is RejectCode.DIGEST_MISMATCH:
                self._replica.doubted(refusal.why)
            quiet = refusal.code in (RejectCode.STALE_ROUND, RejectCode.RUN_FINISHED)
            return [] if quiet else [Notice(code=f"refused_{refusal.code.name.lower()}", text=refusal.why)]
        self._refusals += 1
        if is_worth_retrying(refusal.code, self._refusals):
            self._attempt = max(self._attempt, 1)
            return self._reconnect(f"refused ({refusal.code.name.lower()}): {refusal.why}", now_ms)
        return self._stop(refusal.code, refusal.why)

    def _records(self, message: Records, now_ms: int) -> list[PeerOutput]:
        """Queue the records we lack; what we have already is skipped, a gap ends the session."""
        expected = self.ledger.position + len(self._inbox)
        if message.first > expected:
            return self._reconnect(f"the coordinator skipped records {expected}..{message.first - 1}", now_ms)
        self._inbox.extend(message.records[expected - message.first :])
        return []

    # --- the log ----------------------------------------------------------------------------------------------------

    def _take_in(self) -> list[PeerOutput]:
        """Append the next record if it may follow; give up on a coordinator that sends one that may not."""
        record = self._inbox[0]
        why = self.ledger.objection(record)
        if isinstance(record, RunStarted) and record.spec.digest != self.spec.digest:
            why = "belongs to another RunSpec"
        if why is not None:
            text = f"the coordinator sent an illegal log: record {self.ledger.position} ({type(record).__name__}) {why}"
            return self._stop(RejectCode.LOG_DIVERGED, text)
        cancelled = self._measuring.cancel_late() if isinstance(record, RoundSealed) else []
        return [*cancelled, Append(record=record)]

    def _rebuild(self) -> list[PeerOutput]:
        """Once nothing else is being done, replay the local log."""
        is_working = self._replica.is_applying or self._measuring.round is not None or self._evaluating.is_running
        if is_working or self._replica.rebuilding:
            return self._measuring.cancel()
        return self._replica.rebuild()

    # --- work -------------------------------------------------------------------------------------------------------

    def _work(self) -> list[PeerOutput]:
        """At the head of the log with nothing left to apply: contribute to the open round, then evaluate."""
        opened = self.ledger.open
        if self._session is not Session.JOINED or opened is None or self.ledger.position < self._head:
            return []
        self._replica.is_live = True
        if (news := self._trend_news.next(self.ledger.trend)) is not None:
            return [news]
        return self._measuring.step(opened, self._replica.digest) or self._evaluation()

    def _evaluation(self) -> list[PeerOutput]:
        return self._evaluating.step(self._replica.rounds, is_last=self.ledger.is_finished)

    def _finish(self) -> list[PeerOutput]:
        """Everything is applied: evaluate once more, then say goodbye."""
        outputs = self._evaluation()
        if outputs or self._evaluating.is_running or self._measuring.round is not None:
            return outputs
        return self._stop(None, f"the run is finished after {self.ledger.sealed_rounds} rounds")

    # --- results ----------------------------------------------------------------------------------------------------

    def _completed(self, result: Result) -> list[PeerOutput]:
        match result:
            case Measured():
                return self._measuring.completed(result, is_joined=self._session is Session.JOINED)
            case Applied():
                self._replica.applied(result)
                return []
            case EvaluatedResult():
                return self._evaluating.completed(result, is_joined=self._session is Session.JOINED)
            case Rebuilt():
                return self._completed_rebuild(result)
            case _:
                assert_never(result)

    def _completed_rebuild(self, result: Rebuilt) -> list[PeerOutput]:
        wanted_rounds = self.ledger.sealed_rounds
        assert result.rounds == wanted_rounds, f"rebuilt {result.rounds} of {wanted_rounds} rounds"
        first = self.spec.first_digest
        if result.rounds == 0 and first is not None and result.digest != first:
            ours, wanted = short_hex(result.digest), short_hex(first)
            why = f"the base weights are {ours} after a rebuild, the RunSpec's {wanted}: faulty memory?"
            return self._stop(RejectCode.DIGEST_MISMATCH, why)
        self._replica.rebuilt(result)
        self._measuring.rebuilt(result.digest)
        return [
            Notice(
                code="rebuilt", text=f"weights rebuilt from the log: {result.rounds} rounds, {short_hex(result.digest)}"
            )
        ]
