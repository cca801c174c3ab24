"""Hypothesis drives both machines with any input in any state; invariants are checked after every step."""

import math
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.ledger import Ledger, step_size
from peerturb.protocol.messages import (
    Contribution,
    Disconnected,
    Evaluation,
    FromPeer,
    Hello,
    Leave,
    Proof,
    Records,
    Refusal,
    Welcome,
)
from peerturb.protocol.outputs import (
    Append,
    Apply,
    CancelMeasure,
    Connect,
    CoordinatorOutput,
    Disconnect,
    Evaluate,
    HangUp,
    Measure,
    PeerOutput,
    Rebuild,
    Reject,
    Say,
    Send,
    SessionId,
    Stop,
)
from peerturb.protocol.peer import APPLIES_MAX, PeerMachine, Session
from peerturb.protocol.records import PeerJoined, Record, RoundOpened, RoundSealed, RunFinished, RunStarted
from peerturb.protocol.results import Applied, EvaluatedResult, Measured, Rebuilt
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec

SPEC = RunSpec(
    name="any",
    model=ModelSpec(name="toy", digest="00000000" + "ab" * 28),
    round=RoundSpec(count=6, probes_max=3, min_peers=2, deadline_ms_min=50, deadline_ms_max=1_000, lease_ms=500),
    objective=ObjectiveSpec(eval_every=2),
)
SESSIONS = st.integers(0, 5).map(SessionId)
CODES = st.binary(max_size=4)


class StoreError(Exception):
    """The store refuses."""


class AnyCoordinator(RuleBasedStateMachine):
    """Any message on any session at any time, with a store that may fail and a process that may restart."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Record] = []
        self.machine = CoordinatorMachine(SPEC)
        self.now_ms = 0
        self.fails = False
        self.dead: set[SessionId] = set()
        """Sessions the shell has closed: a shell never uses a number twice."""
        self.generation = 0
        self.perform([])

    def perform(self, outputs: Sequence[CoordinatorOutput]) -> None:
        try:
            for effect in drive(self.machine, outputs, self.now_ms):
                if isinstance(effect, Persist):
                    if self.fails:
                        raise StoreError
                    self.log += effect.records
                elif isinstance(effect, Reject) and effect.closes:
                    self.dead.add(effect.session)
                elif isinstance(effect, Send):
                    assert isinstance(effect.message, Welcome)
                    assert effect.message.head == len(self.log)
        except StoreError:
            return
        assert not self.machine.advance(self.now_ms), "content after the loop"

    def say(self, session: SessionId, message: FromPeer | Disconnected) -> None:
        number = SessionId(self.generation * 10 + session)
        if number in self.dead and not isinstance(message, Disconnected):
            return
        self.perform(list(self.machine.receive(number, message, self.now_ms)))

    @rule(session=SESSIONS, peer=st.integers(0, 3), protocol=st.sampled_from((1, 1, 1, 2)), back=st.integers(0, 5))
    def hello(self, session: SessionId, peer: int, protocol: int, back: int) -> None:
        message = Hello(
            protocol=protocol,
            key=PeerKey(bytes([peer]) * 32),
            name=f"p{peer}",
            token="",
            spec_digest=SPEC.digest,
            base_digest=bytes.fromhex(SPEC.model.digest),
            manifest_digest=bytes(32),
            position=Position(max(0, len(self.log) - back)),
            chain=bytes(32),
        )
        self.say(session, message)

    @rule(session=SESSIONS, offset=st.integers(-3, 1), codes=CODES, loss=st.floats(width=32), digest=st.integers(0, 1))
    def contribution(self, session: SessionId, offset: int, codes: bytes, loss: float, digest: int) -> None:
        round_ = RoundNumber(max(0, self.machine.ledger.sealed_rounds + offset))
        self.say(session, Contribution(round=round_, codes=codes, loss=loss, digest=digest))

    @rule(session=SESSIONS)
    def timely_contribution(self, session: SessionId) -> None:
        self.contribution_now(session)

    def contribution_now(self, session: SessionId) -> None:
        round_ = RoundNumber(self.machine.ledger.sealed_rounds)
        self.say(session, Contribution(round=round_, codes=b"\x07", loss=1.0, digest=0))

    @rule(session=SESSIONS, round_=st.integers(0, 8).map(RoundNumber))
    def evaluation(self, session: SessionId, round_: RoundNumber) -> None:
        self.say(session, Evaluation(round=round_, loss=math.nan, accuracy=None, examples=1))

    @rule(session=SESSIONS, message=st.sampled_from((Leave(), Proof(signature=bytes(64)), Disconnected())))
    def other(self, session: SessionId, message: Leave | Proof | Disconnected) -> None:
        self.say(session, message)

    @rule(ms=st.integers(0, 700))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.perform([])

    @rule()
    def wait_until_due(self) -> None:
        due_ms = self.machine.deadline_ms()
        if due_ms is not None and not self.fails:
            self.now_ms = max(self.now_ms, due_ms)
            self.perform([])
            later = self.machine.deadline_ms()
            assert later is None or later > self.now_ms, "a timer that rang does not ring again at once"

    @rule(fails=st.booleans())
    def store(self, fails: bool) -> None:
        self.fails = fails

    @rule()
    def restart(self) -> None:
        self.generation += 1
        self.machine = CoordinatorMachine.from_records(SPEC, self.log)
        self.perform([])

    @invariant()
    def the_state_is_the_fold_of_the_log(self) -> None:
        ledger, folded = self.machine.ledger, Ledger.fold(self.log)
        assert repr(ledger) == repr(folded)

    @invariant()
    def memory_is_bounded_and_sessions_and_leases_exclude_each_other(self) -> None:
        members = self.machine._members
        joined = {member.slot for member in self.machine.ledger.members if member.is_joined}
        connected = set(members.connected_slots)
        assert connected <= joined | set(members.leases)
        assert not connected & set(members.leases)
        assert members.active <= connected
        assert len(self.machine._pending.of_slot) <= 4
        if self.machine._now_ms is not None:
            assert joined <= connected | set(members.leases)

    @invariant()
    def status_can_always_be_told(self) -> None:
        assert self.machine.status(self.now_ms).waiting_for


def make_log(rounds: int) -> list[Record]:
    """A legal run of another peer; round r was measured on weights r."""
    ledger, log = Ledger(), []

    def add(record: Record) -> None:
        ledger.apply(record)
        log.append(record)

    add(RunStarted(spec=SPEC))
    add(PeerJoined(slot=Slot(0), key=PeerKey(b"o" * 32), name="other"))
    for number in range(rounds):
        round_ = RoundNumber(number)
        add(RoundOpened(round=round_, scale=ledger.scale, deadline_ms=1_000))
        assert ledger.open is not None
        alpha = step_size(SPEC, round_, ledger.open.scale, b"\x05")
        add(
            RoundSealed(
                round=round_, alpha=alpha, loss=1.0, digest=number, slots=(Slot(0),), counts=(1,), codes=b"\x05"
            )
        )
    add(RunFinished(rounds=rounds))
    return log


LOG = make_log(6)


class AnyPeer(RuleBasedStateMachine):
    """Any event at any time; weights after r rounds have digest r, unless a bit flips."""

    @initialize(have=st.integers(0, len(LOG)), data=st.data())
    def start(self, have: int, data: st.DataObject) -> None:
        local = LOG[:have]
        sealed = [record for record in local if isinstance(record, RoundSealed)]
        self.rounds = data.draw(st.integers(0, len(sealed)))
        self.log = list(local)
        self.now_ms = 0
        self.work: list[PeerOutput] = []
        self.flip = 0
        self.stopped = False
        self.fed = 0
        self.machine = PeerMachine(
            SPEC,
            key=PeerKey(b"k" * 32),
            name="k",
            token="",
            base_digest=bytes(32),
            manifest_digest=bytes(32),
            digest=self.rounds,
            ledger=Ledger.fold(local),
            unapplied=sealed[self.rounds :],
        )
        self.perform([])

    def perform(self, outputs: Sequence[PeerOutput]) -> None:
        for effect in drive(self.machine, outputs, self.now_ms):
            assert not self.stopped or isinstance(effect, Stop), "silence after a stop"
            match effect:
                case Persist(records=records):
                    self.log += records
                case Measure() | Apply() | Evaluate() | Rebuild():
                    self.work.append(effect)
                case Say():
                    assert self.machine.status.session in (Session.JOINED, Session.PAUSED, Session.STOPPED)
                case CancelMeasure(round=round_):
                    assert any(isinstance(work, Measure) and work.round == round_ for work in self.work)
                case Stop():
                    assert not self.stopped
                    self.stopped = True
                case Append():
                    raise AssertionError("appends come as Persist")
                case Connect() | Disconnect() | HangUp():
                    pass
        assert not self.machine.advance(self.now_ms), "content after the loop"

    @rule(ms=st.integers(0, 40_000))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.perform([])

    @rule()
    def connected(self) -> None:
        self.perform(list(self.machine.connected(self.now_ms)))
        self.fed = self.machine.hello(bytes(32)).position

    @rule()
    def disconnected(self) -> None:
        self.perform(list(self.machine.disconnected("cut", self.now_ms)))

    @rule(head=st.integers(0, len(LOG)).map(Position))
    def welcome(self, head: Position) -> None:
        message = Welcome(slot=Slot(1), head=Position(max(head, len(self.log))))
        self.perform(list(self.machine.receive(message, self.now_ms)))

    @rule(count=st.integers(1, 6), back=st.integers(0, 2), skip=st.sampled_from((0, 0, 0, 1)))
    def feed(self, count: int, back: int, skip: int) -> None:
        first = max(0, self.fed - back + skip * 3)
        records = tuple(LOG[first : first + count])
        self.fed = max(self.fed, first + len(records))
        self.perform(list(self.machine.receive(Records(first=Position(first), records=records), self.now_ms)))

    @rule(code=st.sampled_from(RejectCode), closes=st.sampled_from((False, False, False, True)))
    def refusal(self, code: RejectCode, closes: bool) -> None:
        message = Refusal(code=code, why="because", closes=closes)
        self.perform(list(self.machine.receive(message, self.now_ms)))

    @rule(flips=st.sampled_from((False, False, False, False, True)), codes=st.binary(min_size=1, max_size=3))
    @precondition(lambda self: self.work)
    def finish_work(self, flips: bool, codes: bytes) -> None:
        work = self.work.pop(0)
        match work:
            case Apply(sealed=sealed):
                assert sealed.round == self.rounds, "each round once, in order"
                self.rounds += 1
                self.flip |= flips
                more = bool(self.work) and isinstance(self.work[0], Apply)
                result: object = Applied(round=sealed.round, digest=None if more else self.digest)
            case Measure(round=round_):
                assert round_ == self.rounds
                result = Measured(round=round_, codes=codes, loss=1.0, elapsed_ms=5)
            case Evaluate(round=round_):
                assert round_ == self.rounds
                result = EvaluatedResult(round=round_, loss=1.0, accuracy=None, examples=1)
            case _:
                self.rounds = sum(isinstance(record, RoundSealed) for record in self.log)
                self.flip = 0
                result = Rebuilt(rounds=self.rounds, digest=self.digest)
        self.perform(list(self.machine.completed(result, self.now_ms)))  # type: ignore[arg-type]

    @property
    def digest(self) -> int:
        return self.rounds + 1_000 * self.flip

    @rule()
    @precondition(lambda self: self.machine.status.rounds_applied >= 3)
    def leave(self) -> None:
        self.perform(list(self.machine.leave()))

    @rule()
    def pause(self) -> None:
        self.perform(list(self.machine.pause()))
        status = self.machine.status
        assert status.session in (Session.PAUSED, Session.STOPPED) or status.is_finished

    @rule()
    def resume(self) -> None:
        self.perform(list(self.machine.resume(self.now_ms)))
        assert self.machine.status.session is not Session.PAUSED

    @invariant()
    def nothing_is_measured_in_a_pause(self) -> None:
        if hasattr(self, "machine") and self.machine.status.session is Session.PAUSED:
            assert self.machine.deadline_ms() is None
            assert self.machine.status.measuring is None or self.machine._measuring._is_cancelled

    @invariant()
    def the_local_log_is_a_prefix_of_the_runs(self) -> None:
        if hasattr(self, "log"):
            assert self.log == LOG[: len(self.log)]
            assert self.machine.ledger.position == len(self.log)

    @invariant()
    def work_is_bounded(self) -> None:
        if hasattr(self, "work"):
            assert sum(isinstance(work, Apply) for work in self.work) <= APPLIES_MAX
            for kind in (Measure, Evaluate, Rebuild):
                assert sum(isinstance(work, kind) for work in self.work) <= 1


TestAnyCoordinator = AnyCoordinator.TestCase
TestAnyCoordinator.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyPeer = AnyPeer.TestCase
TestAnyPeer.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
