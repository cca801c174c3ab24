"""Rules of the coordinator's machine that a trace shows badly: deadlines in numbers, limits, memory, persistence."""

import math
from itertools import pairwise

import pytest

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.contributions import Contributions
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.membership import RETURN_GRACE_MS
from peerturb.protocol.messages import Contribution, Disconnected, Evaluation, FromPeer, Hello, Proof
from peerturb.protocol.outputs import Append, CoordinatorOutput, Reject, SessionId
from peerturb.protocol.pace import Pace
from peerturb.protocol.records import PeerJoined, Record, RoundOpened, RoundSealed, RunStarted
from peerturb.protocol.sealing import SealReason
from peerturb.spec import ModelSpec, RoundSpec, RunSpec, StepSpec

BASE = "07000000" + "ab" * 28
"""Digest of base weights whose short digest is 7."""


def make_spec(**settings: int) -> RunSpec:
    return RunSpec(name="unit", model=ModelSpec(name="toy", digest=BASE), round=RoundSpec(**settings))


class Shell:
    """The loop of a service without one."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.machine = CoordinatorMachine(spec)
        self.log: list[Record] = []
        self.now_ms = 0
        self.perform([])

    def perform(self, outputs: "list[CoordinatorOutput]") -> list[CoordinatorOutput]:
        effects = []
        for effect in drive(self.machine, outputs, self.now_ms):
            if isinstance(effect, Persist):
                self.log += effect.records
            else:
                effects.append(effect)
        return effects

    def say(self, session: int, message: FromPeer | Disconnected) -> list[CoordinatorOutput]:
        return self.perform(list(self.machine.receive(SessionId(session), message, self.now_ms)))

    def join(self, peer: int, session: int | None = None, *, position: int = 0) -> list[CoordinatorOutput]:
        hello = Hello(
            protocol=1,
            key=PeerKey(peer.to_bytes(32, "big")),
            name=f"peer {peer}",
            token="",
            spec_digest=self.spec.digest,
            base_digest=bytes.fromhex(BASE),
            manifest_digest=bytes(32),
            position=Position(position),
            chain=bytes(32),
        )
        return self.say(peer if session is None else session, hello)

    def contribute(self, peer: int, round_: int, codes: bytes = b"\x05", loss: float = 1.0) -> list[CoordinatorOutput]:
        return self.say(peer, Contribution(round=RoundNumber(round_), codes=codes, loss=loss, digest=7))

    @property
    def sealed(self) -> list[RoundSealed]:
        return [record for record in self.log if isinstance(record, RoundSealed)]

    @property
    def opened(self) -> list[RoundOpened]:
        return [record for record in self.log if isinstance(record, RoundOpened)]


def codes_of(effects: list[CoordinatorOutput]) -> list[RejectCode]:
    return [effect.code for effect in effects if isinstance(effect, Reject)]


def test_the_deadline_is_four_times_the_slowest_contribution_within_bounds() -> None:
    shell = Shell(make_spec(deadline_ms_min=100, deadline_ms_max=5_000))
    shell.join(0)
    for round_, latency_ms in enumerate((10, 500, 2_000, 0)):
        shell.now_ms += latency_ms
        shell.contribute(0, round_)
    assert [opened.deadline_ms for opened in shell.opened] == [5_000, 100, 2_000, 5_000, 5_000]


def test_the_smoothed_latency_rises_at_once_and_sinks_to_the_level_below() -> None:
    pace = Pace(RoundSpec())
    pace.longest_ms = pace.after(800)
    assert pace.longest_ms == 800
    assert pace.after(900) == 900
    seen = []
    for _ in range(200):
        pace.longest_ms = pace.after(100)
        seen.append(pace.longest_ms)
    assert seen[0] == 712
    assert seen[-1] == 100
    assert all(later < earlier or later == 100 for earlier, later in pairwise(seen))


def test_loss_is_weighted_by_valid_codes_and_void_losses_do_not_count() -> None:
    shell = Shell(make_spec(min_peers=3))
    for peer in range(3):
        shell.join(peer)
    shell.contribute(0, 0, b"\x01\x80", 1.0)
    shell.contribute(1, 0, b"\x01\x02\x03", 3.0)
    shell.contribute(2, 0, b"\x80", math.nan)
    sealed = shell.sealed[0]
    assert sealed.loss == (1.0 * 1 + 3.0 * 3) / 4
    assert sealed.slots == (0, 1, 2)
    assert sealed.counts == (2, 3, 1)
    assert sealed.codes == b"\x01\x80\x01\x02\x03\x80"
    assert shell.machine.status(0).void_codes == 2


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number_is_left_out_though_codes_are_valid(loss: float) -> None:
    shell = Shell(make_spec(min_peers=2))
    shell.join(0)
    shell.join(1)
    shell.contribute(0, 0, loss=loss)
    shell.contribute(1, 0, loss=2.0)
    assert shell.sealed[0].loss == 2.0


def test_a_round_of_void_codes_changes_nothing_and_keeps_the_scale() -> None:
    shell = Shell(make_spec())
    shell.join(0)
    shell.contribute(0, 0, b"\x80\x80", math.nan)
    assert math.isnan(shell.sealed[0].loss)
    assert shell.sealed[0].alpha == 0.0
    assert shell.opened[1].scale == shell.opened[0].scale


def test_seal_and_next_opening_are_one_transaction() -> None:
    shell = Shell(make_spec())
    shell.join(0)
    message = Contribution(round=RoundNumber(0), codes=b"\x05", loss=1.0, digest=7)
    assert list(shell.machine.receive(SessionId(0), message, 0)) == []
    effects = list(shell.machine.advance(0))
    assert [type(effect.record) for effect in effects if isinstance(effect, Append)] == [RoundSealed, RoundOpened]
    assert shell.machine.ledger.sealed_rounds == 0, "nothing changes before apply"
    assert list(shell.machine.advance(0)) == effects, "and the same is decided again"


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSIONS_MAX", 2)
    shell = Shell(make_spec())
    assert codes_of(shell.join(0) + shell.join(1) + shell.join(2)) == [RejectCode.RUN_FULL]
    assert codes_of(shell.join(1, session=9)) == [RejectCode.SUPERSEDED], "a member's new session replaces its old one"


def test_slots_are_bounded_but_known_identities_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SLOTS_MAX", 1)
    shell = Shell(make_spec())
    shell.join(0)
    assert codes_of(shell.join(1)) == [RejectCode.RUN_FULL]
    shell.say(0, Disconnected())
    assert codes_of(shell.join(0, session=5)) == []


def test_pending_contributions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(make_spec(min_peers=10))
    for peer in range(3):
        shell.join(peer)
    monkeypatch.setattr(limits, "SESSIONS_MAX", 2)
    assert codes_of([*shell.contribute(0, 0), *shell.contribute(1, 0), *shell.contribute(1, 0)]) == []
    assert codes_of(shell.contribute(2, 0)) == [RejectCode.RUN_FULL]


def test_of_a_slots_contributions_to_a_round_the_first_counts_once() -> None:
    """Who says another one may have seen what the others said: only weights that were made anew are a reason."""
    shell = Shell(make_spec(min_peers=2, probes_max=2))
    for peer in range(2):
        shell.join(peer)
    shell.contribute(0, 0, b"\x01\x02")
    for codes in (b"\x01\x02", b"\x03\x04"):
        assert codes_of(shell.contribute(0, 0, codes)) == []
    assert shell.machine.counters.repeated_contributions == 2
    shell.contribute(1, 0, b"\x05")
    assert [list(record.contributions()) for record in shell.sealed] == [[(0, b"\x01\x02"), (1, b"\x05")]]


def test_a_proof_after_the_handshake_is_refused() -> None:
    shell = Shell(make_spec())
    shell.join(0)
    assert codes_of(shell.say(0, Proof(signature=bytes(64)))) == [RejectCode.MALFORMED]


def test_a_member_evaluates_each_round_once() -> None:
    shell = Shell(make_spec())
    shell.join(0)
    evaluation = Evaluation(round=RoundNumber(0), loss=math.nan, accuracy=None, examples=3)
    assert codes_of(shell.say(0, evaluation)) == []
    assert codes_of(shell.say(0, evaluation)) == [RejectCode.STALE_ROUND]


def test_after_a_restart_recent_contributors_are_awaited_for_a_while() -> None:
    shell = Shell(make_spec(deadline_ms_min=10_000))
    shell.join(0)
    shell.join(1)
    for round_ in range(3):
        shell.contribute(0, round_)
        shell.contribute(1, round_)
    shell.contribute(1, 3)
    rounds = len(shell.sealed)
    shell.machine = CoordinatorMachine.from_records(shell.spec, shell.log)
    shell.perform([])
    shell.join(0, session=10, position=len(shell.log))
    shell.say(10, Contribution(round=RoundNumber(rounds), codes=b"\x01", loss=1.0, digest=7))
    assert len(shell.sealed) == rounds, "slot 1 may still come back"
    assert shell.machine.deadline_ms() == RETURN_GRACE_MS
    shell.now_ms = RETURN_GRACE_MS
    shell.perform([])
    assert len(shell.sealed) == rounds + 1
    assert shell.machine.counters.seals[SealReason.EVERYONE] == 1


def test_the_clock_stands_until_min_peers_are_connected() -> None:
    shell = Shell(make_spec(min_peers=2, deadline_ms_max=1_000))
    shell.join(0)
    shell.contribute(0, 0)
    shell.now_ms = 50_000
    shell.join(1)
    assert shell.machine.deadline_ms() == 51_000


def test_status_tells_what_happened() -> None:
    shell = Shell(make_spec())
    shell.join(0)
    shell.contribute(0, 0, b"\x01\x02", 1.5)
    status = shell.machine.status(shell.now_ms)
    assert (status.round, status.probes, status.loss, status.head) == (1, 2, 1.5, len(shell.log))
    assert [(peer.state, peer.probes, peer.last_round, peer.loss) for peer in status.peers] == [
        ("connected", 2, 0, 1.5)
    ]
    shell.say(0, Disconnected())
    assert shell.machine.status(shell.now_ms).peers[0].state == "away"


def test_a_log_of_another_spec_is_refused() -> None:
    other = make_spec(min_peers=7)
    with pytest.raises(IllegalRecordError, match="belongs to RunSpec"):
        CoordinatorMachine.from_records(make_spec(), [RunStarted(spec=other)])


def sound_log() -> list[Record]:
    shell = Shell(make_spec(count=2))
    shell.join(0)
    shell.contribute(0, 0)
    shell.contribute(0, 1)
    return shell.log


def test_the_ledger_objects_to_every_record_out_of_place() -> None:
    log = sound_log()
    Ledger.fold(log)
    for position in range(len(log)):
        for wrong in log:
            if wrong is log[position]:
                continue
            ledger = Ledger.fold(log[:position])
            legal = isinstance(wrong, PeerJoined) and position > 0 and not ledger.members
            assert (ledger.objection(wrong) is None) == legal, (position, wrong)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alpha": 0.25}, "step size"),
        ({"alpha": 0.1}, "not an f32"),
        ({"round": RoundNumber(1)}, "seals round 1"),
        ({"counts": (2,)}, "counts of 2"),
        ({"counts": (1, 1)}, "1 slots and 2 counts"),
        ({"slots": ()}, "no contribution"),
        ({"slots": (3,)}, "never admitted"),
        ({"slots": (0, 0), "counts": (1, 1), "codes": b"ab"}, "ascend"),
        ({"codes": b""}, "0 codes"),
        ({"digest": 8}, "base weights are 07000000"),
    ],
)
def test_the_ledger_objects_to_a_wrong_sealed_round(change: dict[str, object], why: str) -> None:
    log = sound_log()
    index = next(index for index, record in enumerate(log) if isinstance(record, RoundSealed))
    sealed = log[index]
    assert isinstance(sealed, RoundSealed)
    fields = {name: getattr(sealed, name) for name in sealed.__slots__} | change
    with pytest.raises(IllegalRecordError, match=why):
        Ledger.fold([*log[:index], RoundSealed(**fields)])


def test_in_a_tie_of_newcomers_the_lowest_slot_s_weights_hold() -> None:
    ledger = Ledger()
    ledger.apply(RunStarted(spec=make_spec(deadline_ms_min=100, deadline_ms_max=100)))
    pending = Contributions()
    for slot, digest in ((2, 9), (1, 8), (0, 5), (3, 5), (4, 8)):
        pending.add(Slot(slot), Contribution(round=RoundNumber(1), codes=b"\x01", loss=1.0, digest=digest), 1)
    for slot in range(5):
        ledger.apply(PeerJoined(slot=Slot(slot), key=PeerKey(bytes([slot]) * 32), name=""))
    assert pending.canonical_digest(ledger) == 5


def test_the_step_rule_of_the_spec_holds() -> None:
    spec = make_spec().model_copy(update={"step": StepSpec(rule="sgd", learning_rate=0.5)})
    shell = Shell(spec)
    shell.join(0)
    shell.contribute(0, 0, b"\x01\x02\x80")
    assert shell.sealed[0].alpha == pytest.approx(0.5 * shell.opened[0].scale / 2, rel=1e-6)
