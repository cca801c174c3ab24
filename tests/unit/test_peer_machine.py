"""Rules of the peer's machine in numbers: waiting, budgets, bounds, overlaps and gaps of the feed."""

import pytest

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.backoff import REFUSALS_MAX, WAIT_MS_MAX, WAIT_MS_MIN, wait_ms
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.ledger import Ledger, step_size
from peerturb.protocol.messages import Contribution, Records, Refusal, Welcome
from peerturb.protocol.outputs import Apply, Connect, Disconnect, Evaluate, Measure, PeerOutput, Rebuild, Say, Stop
from peerturb.protocol.peer import APPLIES_MAX, INBOX_RECORDS_MAX, PeerMachine, Session
from peerturb.protocol.probing import FIRST_PROBES, ProbeBudget
from peerturb.protocol.records import PeerJoined, Record, RoundOpened, RoundSealed, RunFinished, RunStarted
from peerturb.protocol.results import Applied, Measured
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec

SPEC = RunSpec(
    name="unit",
    model=ModelSpec(name="toy", digest="00000000" + "ab" * 28),
    round=RoundSpec(probes_max=4),
    objective=ObjectiveSpec(eval_every=0),
)
KEY = PeerKey(b"k" * 32)


def make_log(rounds: int) -> list[Record]:
    """A run with one other peer, `rounds` rounds sealed and one open; round r was measured on weights r."""
    ledger = Ledger()
    log: list[Record] = []

    def add(record: Record) -> None:
        ledger.apply(record)
        log.append(record)

    add(RunStarted(spec=SPEC))
    add(PeerJoined(slot=Slot(0), key=PeerKey(b"o" * 32), name="other"))
    for number in range(rounds + 1):
        round_ = RoundNumber(number)
        add(RoundOpened(round=round_, scale=ledger.scale, deadline_ms=1_000))
        if number < rounds:
            assert ledger.open is not None
            alpha = step_size(SPEC, round_, ledger.open.scale, b"\x05")
            add(
                RoundSealed(
                    round=round_, alpha=alpha, loss=1.0, digest=number, slots=(Slot(0),), counts=(1,), codes=b"\x05"
                )
            )
    return log


class Shell:
    """The loop of a node without one; weights after r rounds have digest r."""

    def __init__(self, log: list[Record] | None = None, unapplied: int = 0) -> None:
        local = log or []
        ledger = Ledger.fold(local)
        sealed = [record for record in local if isinstance(record, RoundSealed)]
        self.machine = PeerMachine(
            SPEC,
            key=KEY,
            name="unit",
            token="",
            base_digest=bytes(32),
            manifest_digest=bytes(32),
            digest=len(sealed) - unapplied,
            ledger=ledger,
            unapplied=sealed[len(sealed) - unapplied :],
        )
        self.now_ms = 0
        self.log = list(local)

    def perform(self, outputs: list[PeerOutput]) -> list[PeerOutput]:
        effects = []
        for effect in drive(self.machine, outputs, self.now_ms):
            if isinstance(effect, Persist):
                self.log += effect.records
            else:
                effects.append(effect)
        return effects

    def join(self, head: int) -> list[PeerOutput]:
        effects = self.perform([])
        effects += self.perform(list(self.machine.connected(self.now_ms)))
        welcome = Welcome(slot=Slot(1), head=Position(head))
        return effects + self.perform(list(self.machine.receive(welcome, self.now_ms)))

    def feed(self, first: int, records: list[Record]) -> list[PeerOutput]:
        message = Records(first=Position(first), records=tuple(records))
        return self.perform(list(self.machine.receive(message, self.now_ms)))

    def applied(self, round_: int) -> list[PeerOutput]:
        result = Applied(round=RoundNumber(round_), digest=round_ + 1)
        return self.perform(list(self.machine.completed(result, self.now_ms)))


def test_waiting_doubles_from_200_ms_to_10_s_and_follows_from_the_key() -> None:
    waits = [wait_ms(KEY, attempt) for attempt in range(40)]
    for attempt, wait in enumerate(waits):
        longest = min(WAIT_MS_MIN * 2 ** min(attempt, 16), WAIT_MS_MAX)
        assert longest // 2 <= wait <= longest
    assert waits == [wait_ms(KEY, attempt) for attempt in range(40)]
    assert waits != [wait_ms(PeerKey(b"l" * 32), attempt) for attempt in range(40)]


def test_the_budget_follows_the_measured_rate_and_never_leaves_its_bounds() -> None:
    budget = ProbeBudget(probes_max=100, budget_ms=1_000)
    assert budget.count() == FIRST_PROBES
    budget.observe(probes=16, elapsed_ms=320)
    assert budget.count() == 50
    for _ in range(100):
        budget.observe(probes=50, elapsed_ms=200_000)
    assert budget.count() == 1
    for _ in range(200):
        budget.observe(probes=1, elapsed_ms=0)
    assert budget.count() == 100
    assert ProbeBudget(probes_max=7, budget_ms=0).count() == 7


def test_applies_are_bounded_in_a_long_catch_up_and_the_shell_is_told_to_stop_reading() -> None:
    log = make_log(3_000)
    shell = Shell()
    shell.join(len(log))
    effects = shell.feed(0, log)
    assert [type(effect) for effect in effects] == [Apply] * APPLIES_MAX
    assert not shell.machine.wants_records
    assert len(log) > INBOX_RECORDS_MAX
    done = 0
    while shell.machine.status.rounds_applied < 3_000:
        effects = shell.applied(done)
        done += 1
    assert [type(effect) for effect in effects] == [Measure]
    assert shell.log == log
    assert shell.machine.wants_records


def test_nothing_is_measured_before_the_head_of_the_welcome() -> None:
    log = make_log(2)
    shell = Shell()
    shell.join(len(log))
    shell.feed(0, log[:3])
    assert shell.machine.status.measuring is None


def test_rounds_of_the_local_log_that_a_checkpoint_lacks_are_applied_first() -> None:
    log = make_log(4)
    shell = Shell(log, unapplied=2)
    effects = shell.join(len(log))
    assert [effect.sealed.round for effect in effects if isinstance(effect, Apply)] == [2, 3]
    assert shell.applied(2) == []
    assert [type(effect) for effect in shell.applied(3)] == [Measure]


def test_a_checkpoint_with_wrong_weights_is_rebuilt_before_anything_else() -> None:
    log = make_log(4)
    shell = Shell(log, unapplied=2)
    shell.machine = PeerMachine(
        SPEC,
        key=KEY,
        name="unit",
        token="",
        base_digest=bytes(32),
        manifest_digest=bytes(32),
        digest=77,
        ledger=Ledger.fold(log),
        unapplied=[record for record in log if isinstance(record, RoundSealed)][2:],
    )
    effects = shell.perform([])
    assert [type(effect) for effect in effects] == [Connect, Rebuild]


def test_overlapping_records_are_skipped_and_a_gap_ends_the_session() -> None:
    log = make_log(2)
    shell = Shell()
    shell.join(len(log))
    shell.feed(0, log[:3])
    shell.feed(1, log[1:4])
    assert shell.log == log[:4]
    effects = shell.feed(5, log[5:])
    assert [type(effect) for effect in effects] == [Disconnect]
    assert shell.log == log[:4]
    assert shell.machine.status.session is Session.WAITING


def test_a_contribution_is_said_again_after_a_reconnect_while_its_round_is_open() -> None:
    log = make_log(0)
    shell = Shell()
    shell.join(len(log))
    shell.feed(0, log)
    measured = Measured(round=RoundNumber(0), codes=b"\x01", loss=1.0, elapsed_ms=1)
    said = shell.perform(list(shell.machine.completed(measured, 0)))
    assert [type(effect) for effect in said] == [Say]
    shell.perform(list(shell.machine.disconnected("cut", 0)))
    shell.now_ms = 60_000
    again = [effect for effect in shell.join(len(log)) if isinstance(effect, Say)]
    assert again == said
    assert isinstance(again[0].message, Contribution)


def test_a_coordinator_that_lost_its_log_is_left() -> None:
    shell = Shell(make_log(3))
    effects = shell.join(2)
    assert isinstance(effects[-1], Stop)
    assert effects[-1].code is RejectCode.LOG_DIVERGED


@pytest.mark.parametrize("code", list(RejectCode))
def test_every_closing_refusal_leads_to_another_attempt_or_to_a_stop_with_its_code(code: RejectCode) -> None:
    shell = Shell()
    attempts = 0
    for _ in range(REFUSALS_MAX + 1):
        shell.now_ms += 60_000
        shell.perform([])
        shell.perform(list(shell.machine.connected(shell.now_ms)))
        refusal = Refusal(code=code, why="because", closes=True)
        effects = shell.perform(list(shell.machine.receive(refusal, shell.now_ms)))
        if isinstance(effects[-1], Stop):
            assert effects[-1].code is code
            break
        assert isinstance(effects[-1], Disconnect)
        attempts += 1
    passes = code in (RejectCode.RUN_FULL, RejectCode.SHUTTING_DOWN)
    assert (attempts == REFUSALS_MAX + 1) == passes


def test_a_finished_run_is_not_connected_to_again() -> None:
    spec = SPEC.model_copy(update={"round": RoundSpec(count=1), "objective": ObjectiveSpec(eval_every=5)}, deep=True)
    ledger = Ledger()
    ledger.apply(RunStarted(spec=spec))
    ledger.apply(PeerJoined(slot=Slot(0), key=KEY, name="unit"))
    ledger.apply(RoundOpened(round=RoundNumber(0), scale=ledger.scale, deadline_ms=1_000))
    alpha = step_size(spec, RoundNumber(0), ledger.scale, b"\x05")
    ledger.apply(
        RoundSealed(round=RoundNumber(0), alpha=alpha, loss=1.0, digest=0, slots=(Slot(0),), counts=(1,), codes=b"\x05")
    )
    ledger.apply(RunFinished(rounds=1))
    machine = PeerMachine(
        spec,
        key=KEY,
        name="unit",
        token="",
        base_digest=bytes(32),
        manifest_digest=bytes(32),
        digest=1,
        ledger=ledger,
    )
    assert [type(effect) for effect in drive(machine, [], 0)] == [Evaluate]
    assert machine.deadline_ms() is None


@pytest.mark.parametrize("doubts", [True, False])
def test_weights_that_the_coordinator_calls_wrong_are_rebuilt_unless_the_peer_never_doubts(doubts: bool) -> None:
    shell = Shell(make_log(3))
    shell.machine.doubts = doubts
    shell.join(len(shell.log))
    news = Refusal(code=RejectCode.DIGEST_MISMATCH, why="your weights differ", closes=False)
    effects = shell.perform(list(shell.machine.receive(news, shell.now_ms)))
    measured = Measured(round=RoundNumber(3), codes=b"" if doubts else b"\x01" * 4, loss=1.0, elapsed_ms=1.0)
    effects += shell.perform(list(shell.machine.completed(measured, shell.now_ms)))
    assert any(isinstance(effect, Rebuild) for effect in effects) == doubts
    assert any(isinstance(effect, Say) for effect in effects) != doubts, "it contributes instead"
