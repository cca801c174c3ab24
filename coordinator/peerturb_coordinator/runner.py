"""Drives the coordinator's machine: writes what it decides, then announces it. The only place that touches the machine.

Everything here runs on the event loop without an `await`, so each input is taken to its end before the next one begins
and no lock is needed. The log is written on the loop too: nothing could be announced before the disk answers anyway,
and a commit in a thread takes 0.2 ms longer (measured, docs/LOG.md).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import assert_never

from peerturb.errors import RejectCode
from peerturb.ids import Slot
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import Disconnected, FromPeer, Welcome
from peerturb.protocol.outputs import Append, CoordinatorOutput, Notice, Reject, Send, SessionId
from peerturb.protocol.records import PeerJoined, PeerLeft, Record, RoundOpened, RoundSealed, RunFinished
from peerturb.protocol.status import CoordinatorStatus
from peerturb.protocol.trend import DIVERGING
from peerturb.wire.records import encode_record
from peerturb_coordinator.events import Events
from peerturb_coordinator.feed import Feed
from peerturb_coordinator.session import Session
from peerturb_coordinator.store import Entry, LogStore, StoreFault
from peerturb_coordinator.trace import Trace
from peerturb_coordinator.traffic import Traffic
from peerturb_coordinator.watching import Watchers

_PROBLEMS = frozenset(
    {RejectCode.BAD_TOKEN, RejectCode.BAD_SIGNATURE, RejectCode.LOG_DIVERGED, RejectCode.DIGEST_MISMATCH}
)
"""Refusals an operator should look at; the others are a peer's own affair."""


class Runner:
    """The machine, its log and its sessions, joined."""

    def __init__(
        self,
        machine: CoordinatorMachine,
        store: LogStore,
        events: Events,
        *,
        trace: Trace,
        watchers: Watchers,
        retry_s: float,
        now_s: Callable[[], float],
    ) -> None:
        """Join a machine that has folded the store's records with that store. Nothing happens before `start`.

        Args:
            trace: hears of every input.
            watchers: hear of every record that is written.
            retry_s: pause between attempts to write while the store refuses.
            now_s: a monotonic clock in seconds, the event loop's.
        """
        self.machine = machine
        self.feed = Feed(store)
        self.fault = ""
        """Why nothing is sealed; empty when healthy."""
        self.counts: Counter[str] = Counter()
        """Events of this process by name; what a metrics page reads, beside the machine's own counters."""
        self.traffic = Traffic()
        """Bytes of the sessions."""
        self._store = store
        self._events = events
        self._trace = trace
        self._watchers = watchers
        self._retry_s = retry_s
        self._now_s = now_s
        self._sessions: dict[SessionId, Session] = {}
        self._sessions_begun = 0
        self._standing: dict[Slot, SessionId] = {}
        """Members with a session, as the operator was told."""
        self._new: set[Slot] = set()
        """Members whose record has been told and who are not welcomed yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._retry_at_s = 0.0
        self._is_stopped = False

    @property
    def now_ms(self) -> int:
        """The machine's time."""
        return int(self._now_s() * 1000)

    def start(self) -> None:
        """Let the machine begin: record 0 of a new log, the open round of an old one."""
        now_ms = self.now_ms
        self._events.bind(round=self.machine.ledger.sealed_rounds)
        self._trace.started(now_ms, records=self._store.head)
        self._run((), now_ms)

    def stop(self, why: str) -> None:
        """Tell every session to come back later; accept nothing more."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for session in self._sessions.values():
            session.refuse(RejectCode.SHUTTING_DOWN, why, closes=True)

    def status(self) -> CoordinatorStatus:
        """Describe the run. Changes nothing."""
        return self.machine.status(self.now_ms)

    @property
    def streams(self) -> int:
        """Streams that stand, handshakes included."""
        return len(self._sessions)

    @property
    def lag(self) -> int:
        """Records that the slowest session has yet to be sent."""
        return max((session.lag for session in self._sessions.values()), default=0)

    def next_session_id(self) -> SessionId:
        """Return a number no session has had."""
        self._sessions_begun += 1
        return SessionId(self._sessions_begun)

    def opened(self, session: Session) -> None:
        """A stream stands; its peer has not said anything yet."""
        self._sessions[session.id] = session

    def closed(self, session: Session) -> None:
        """A stream has ended, for whatever reason."""
        self._sessions.pop(session.id, None)
        self.receive(session, Disconnected())
        self._parted(session)

    def receive(self, session: Session, message: FromPeer | Disconnected) -> None:
        """Take in a message that passed the service's checks."""
        if not self._is_stopped:
            now_ms = self.now_ms
            self._trace.heard(now_ms, session.id, message)
            self._run(self.machine.receive(session.id, message, now_ms), now_ms)

    def refuse(self, session: Session, code: RejectCode, why: str) -> None:
        """Refuse on the service's own account, and end the session."""
        self._reject(self.machine.reject(session.id, code, why, closes=True), session)

    def drop(self, session: Session, code: RejectCode, why: str) -> None:
        """Refuse a stream by ending it at once: its peer may be one that reads nothing."""
        self.machine.reject(session.id, code, why, closes=True)
        self._events.debug("dropped", session=session.id, code=code.name.lower(), why=why)
        session.cut(why)

    def _tick(self) -> None:
        """The machine, or the store's next attempt, is due."""
        now_ms = self.now_ms
        self._trace.ticked(now_ms)
        self._run((), now_ms)

    def _run(self, outputs: Sequence[CoordinatorOutput], now_ms: int) -> None:
        """Do what the machine decides until it is content, then announce the new records at once."""
        written: list[bytes] = []
        try:
            for effect in drive(self.machine, outputs, now_ms):
                match effect:
                    case Persist(records=records):
                        written += self._persist(records)
                    case Send(session=number, message=message):
                        if (session := self._sessions.get(number)) is not None:
                            session.send(message)
                            if isinstance(message, Welcome):
                                self._met(session.id, message.slot)
                    case Reject():
                        self._reject(effect, self._sessions.get(effect.session))
                    case Notice(code=code, text=text):
                        self.counts[f"notice_{code}"] += 1
                        report = self._events.warning if code == DIVERGING else self._events.info
                        report(code, text=text)
                    case Append():
                        raise AssertionError("drive hands records out as Persist")
                    case _:
                        assert_never(effect)
        except StoreFault as fault:
            self._trace.refused(records=self._store.head)
            self._suspend(str(fault))
        self._trace.settle()
        if written:
            self.feed.publish(written)
        self._arm()

    def _persist(self, records: Sequence[Record]) -> list[bytes]:
        """Make records durable and return their bytes.

        Raises:
            StoreFault: not now; the disk is not even asked before the pause has passed.
        """
        if self.fault and self._now_s() < self._retry_at_s:
            raise StoreFault(self.fault)
        payloads = [encode_record(record) for record in records]
        self._trace.write()  # first: whatever is in the log then has its cause in the trace, wherever a crash comes
        self._store.append([Entry.of(record, payload) for record, payload in zip(records, payloads, strict=True)])
        if self.fault:
            self.fault = ""
            self._events.info("log_writable_again", head=self._store.head)
        now_ms, at_s = self.now_ms, time.time()
        for record in records:
            reason = self.machine.sealing if isinstance(record, RoundSealed) else None
            self._watchers.hear(record, now_ms=now_ms, at_s=at_s, reason="" if reason is None else reason.value)
            self._tell(record)
        return payloads

    def _suspend(self, why: str) -> None:
        """Stop sealing until the store takes records again. What is announced is on disk and stays."""
        if not self.fault:
            self.counts["store_fault"] += 1
            self._events.error(
                "log_not_writable",
                why=why,
                text="no round is sealed until the log can be written; nothing announced is lost",
                retry_s=self._retry_s,
            )
        self.fault = why
        if self._now_s() >= self._retry_at_s:
            self._retry_at_s = self._now_s() + self._retry_s

    def _reject(self, reject: Reject, session: Session | None) -> None:
        report = self._events.warning if reject.code in _PROBLEMS else self._events.debug
        slot = {} if session is None or session.slot is None else {"slot": session.slot}
        report("refused", session=reject.session, **slot, code=reject.code.name.lower(), why=reject.why)
        if session is not None:
            session.refuse(reject.code, reject.why, closes=reject.closes)

    def _tell(self, record: Record) -> None:
        """Tell the operator of a record. Rounds pass by the hundred: only the progress line speaks of them."""
        match record:
            case RoundSealed():
                self._events.bind(round=record.round + 1)
                self._events.debug("round_sealed", round=record.round, loss=record.loss, codes=len(record.codes))
            case PeerJoined():
                self._new.add(record.slot)
                self._events.info("peer_joined", slot=record.slot, name=record.name, key=record.key.hex()[:16])
            case PeerLeft():
                self._events.info("peer_left", slot=record.slot, reason=record.reason.name.lower())
            case RunFinished():
                self._events.info("run_finished", rounds=record.rounds)
            case RoundOpened():
                pass
            case _:
                self._events.debug(type(record).__name__.lower(), position=self._store.head)

    def _met(self, session: SessionId, slot: Slot) -> None:
        """Tell that a member stands again. Of a new one its record tells; a session in place of another is no news."""
        is_new = slot in self._new
        self._new.discard(slot)
        if not is_new and slot not in self._standing:
            member = self.machine.ledger.members[slot]
            self._events.info("peer_back", slot=slot, name=member.name)
            self._watchers.stand(slot, is_there=True, at_s=time.time())
        self._standing[slot] = session

    def _parted(self, session: Session) -> None:
        """Tell that a member's stream is gone, unless it has said goodbye or come again meanwhile."""
        slot = session.slot
        if slot is None or self._standing.get(slot) != session.id:
            return
        del self._standing[slot]
        member = self.machine.ledger.members[slot]
        if member.is_joined and not self._is_stopped:
            lease_s = self.machine.spec.round.lease_ms / 1000
            self._events.info("peer_away", slot=slot, name=member.name, lease_s=lease_s)
            self._watchers.stand(slot, is_there=False, at_s=time.time())

    def _arm(self) -> None:
        """Set the one timer to when the machine, or the store's next attempt, is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_stopped:
            return
        if self.fault:
            at_s = self._retry_at_s
        else:
            deadline_ms = self.machine.deadline_ms()
            if deadline_ms is None:
                return
            # Never at once: a deadline that `advance` does not clear must not become a busy loop.
            at_s = max(deadline_ms / 1000, self._now_s() + 0.001)
        self._timer = asyncio.get_running_loop().call_at(at_s, self._tick)
