"""Shell around a production peer's machine: a local log, one worker, a clock that drifts, a process that may die.

The local log is a position in the shared log, the weights are one object with everybody who has the same ones. A peer
that joins far behind the head downloads the log as all do, then begins as a node that had it on its disk: what
thousands of joiners would fold record by record is folded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha512
from typing import TYPE_CHECKING, Any

from peerturb.ids import PeerKey, Position
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import Challenge, Contribution, FromPeer, Proof, Records, Refusal, ToPeer, Welcome
from peerturb.protocol.outputs import (
    Apply,
    CancelMeasure,
    Connect,
    Disconnect,
    Evaluate,
    HangUp,
    Measure,
    PeerOutput,
    Rebuild,
    Say,
    Stop,
)
from peerturb.protocol.peer import PeerMachine
from peerturb.wire.messages import encode_from_peer, parse_to_peer
from peerturb.wire.records import RecordDecoder
from peerturb_sim.events import stream
from peerturb_sim.liars import Liar
from peerturb_sim.log import SharedLedger
from peerturb_sim.network import Host, Line, Traffic
from peerturb_sim.scenario import GroupSpec
from peerturb_sim.worker import Worker

if TYPE_CHECKING:
    from peerturb_sim.world import World

FAR_RECORDS = 512
"""Lag from which a joiner takes in the log at once."""
UNSYNCED_RECORDS_MAX = 3
"""Records at the end of a local log that a crash may take."""
UNSAVED_ROUNDS_MAX = 16
"""Rounds that a checkpoint may lag behind the local log."""


@dataclass(slots=True)
class Tally:
    """What a peer did and met, over all its processes."""

    present_us: int = 0
    sessions: int = 0
    measured: int = 0
    """Probes."""
    refused: int = 0
    crashes: int = 0
    rebuilds: int = 0
    slots: list[int] = field(default_factory=list)


class Peer:
    """One peer of the world."""

    def __init__(self, world: "World", index: int, group: GroupSpec) -> None:
        self.world = world
        self.index = index
        self.group = group
        self.name = f"{group.name}-{index}"
        self.draws = stream(world.seed, "line", index)
        card = stream(world.seed, "card", index)
        low, high = group.probes_per_s
        self.probes_per_s: float = low * (high / low) ** card.random()
        self._clock_rate = 1.0 + group.drift_ppm * 1e-6 * card.uniform(-1.0, 1.0)
        self.host = Host(group.line_spec, self.draws)
        self.traffic = Traffic()
        self.tally = Tally()
        self.liar = None if group.lie is None else Liar(group.lie, stream(world.seed, "lie", index))
        self.kept = 0
        """Records of its local log."""
        self.weights: Any = world.compute.base
        self.machine: PeerMachine | None = None
        self.line: Line | None = None
        self.stop: Stop | None = None
        self.is_corrupt = False
        self.has_left = False
        """Whether it said goodbye, or would have had it not been down."""
        self.resumes_us = 0
        """When a paused process goes on."""
        self._generation = 0
        self._incarnation = 0
        self._worker = Worker(self)
        self._started_us = 0
        self._timer_ms = -1
        self._behind: Welcome | None = None

    # --- the process ------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether its process is up and its machine has not stopped."""
        return self.machine is not None and self.stop is None

    @property
    def rounds(self) -> int:
        """Sealed rounds that its weights have."""
        return int(self.weights.rounds)

    def present_us(self) -> int:
        """Time for which its processes have run."""
        return self.tally.present_us + (self.world.events.now_us - self._started_us if self.is_running else 0)

    def now_ms(self) -> int:
        """The time by its own clock."""
        return int(self.world.events.now_us * self._clock_rate) // 1000

    def start(self) -> None:
        """Read the local log and take part, if it is not running; the last rounds may be left to apply."""
        if self.is_running:
            return
        self.has_left = False
        sealed = self.world.log.sealed[: SharedLedger(self.world.log, self.kept).sealed_rounds]
        saved = len(sealed) - self.draws.randrange(min(len(sealed), UNSAVED_ROUNDS_MAX) + 1)
        self._begin_process(saved)

    def crash(self, *, power: bool = False, disk: bool = False) -> None:
        """End without a word: memory and the unsynced end of the local log are gone.

        Args:
            power: the operating system dies too, so that nobody tells the coordinator.
            disk: log, checkpoints and identity are gone.
        """
        if not self.is_running:
            return
        self._end_process()
        self.machine = None
        self.tally.crashes += 1
        if (line := self.line) is not None:
            self.line = None
            self.world.lost_by_peer(line, silently=power or disk)
        self.kept -= self.draws.randrange(min(UNSYNCED_RECORDS_MAX, self.kept) + 1)
        if disk:
            self.kept = 0
            self._generation += 1

    def restart(self) -> None:
        """Come back after a crash, unless its time was over meanwhile or nobody comes any more."""
        if not self.has_left and not self.world.is_calm:
            self.start()

    def leave(self) -> None:
        """Say goodbye, as after Ctrl-C; who is down stays down."""
        self.has_left = True
        if self.is_running:
            assert self.machine is not None
            self.perform(self.machine.leave())

    def corrupt(self) -> None:
        """Flip a bit of the weights, as faulty memory does."""
        self.is_corrupt = True
        self.weights = self.world.compute.corrupt(self.weights, self.index)
        self.world.recorder.corrupted(self)

    def lie(self, liar: Liar) -> None:
        """From now on, lie."""
        self.liar = liar
        if self.machine is not None:
            self.machine.doubts = liar.doubts

    def _begin_process(self, saved_rounds: int) -> None:
        """Start a process with a checkpoint of so many rounds and the whole local log."""
        self._incarnation += 1
        self.stop, self._timer_ms, self._behind = None, -1, None
        self._started_us = self.world.events.now_us
        self.world.running += 1
        self._make_machine(saved_rounds)
        self.perform([])

    def _make_machine(self, saved_rounds: int) -> None:
        self._worker.drop()
        ledger = SharedLedger(self.world.log, self.kept)
        sealed = self.world.log.sealed[: ledger.sealed_rounds]
        self.weights = self.replay(saved_rounds)
        self.machine = PeerMachine(
            self.world.spec,
            key=PeerKey(sha512(f"{self.world.seed} {self.index} {self._generation}".encode()).digest()[:32]),
            name=self.name,
            token="",
            base_digest=self.world.compute.base_digest,
            manifest_digest=self.world.compute.manifest_digest,
            digest=self.weights.digest,
            ledger=ledger,
            unapplied=sealed[saved_rounds:],
            estimator=self.group.estimator,
            evaluates=self.group.evaluates,
            doubts=self.liar is None or self.liar.doubts,
        )

    def _end_process(self) -> None:
        self._incarnation += 1
        self._worker.drop()
        self.world.running -= 1
        self.tally.present_us += self.world.events.now_us - self._started_us

    def replay(self, rounds: int) -> Any:
        """Return the weights after so many rounds of the log."""
        self.is_corrupt = False
        self.world.recorder.mended(self)
        weights = self.world.compute.base
        for sealed in self.world.log.sealed[:rounds]:
            weights = self.world.compute.apply(weights, sealed)
        return weights

    # --- the session ------------------------------------------------------------------------------------------------

    def hear(self, line: Line, data: bytes) -> None:
        """A message other than records came down a line."""
        if self.waits(self.hear, line, data) or line is not self.line:
            return
        message = parse_to_peer(data, first=Position(0), decoder=RecordDecoder())
        if isinstance(message, Challenge):
            self._say(Proof(signature=sha512(message.nonce).digest()))
        else:
            self.tally.refused += isinstance(message, Refusal)
            self._take(message)

    def hear_records(self, line: Line, first: int, last: int) -> None:
        """Records came down a line."""
        if self.waits(self.hear_records, line, first, last) or line is not self.line:
            return
        line.received = last
        if self._behind is None:
            self._take_records(first, last)
        elif last >= self._behind.head:
            rounds = SharedLedger(self.world.log, last).sealed_rounds - self.rounds
            replay_us = round(1000 * self.group.apply_ms * rounds)
            self.world.events.after(replay_us, self._caught_up, line, self._incarnation)

    def _take_records(self, first: int, last: int) -> None:
        first = self._skip_membership(first, last)
        self._take(Records(first=Position(first), records=tuple(self.world.log.records[first:last])))

    def _skip_membership(self, first: int, last: int) -> int:
        """In a crowd, take in the joins and leaves at the front at once: no machine does anything about them."""
        ledger = None if self.machine is None else self.machine.ledger
        if not self.world.holds_membership or not isinstance(ledger, SharedLedger) or ledger.position != first:
            return first
        first = self.world.log.after_membership(first, last)
        ledger.stand(first)
        self.kept = first
        return first

    def hear_end(self, line: Line) -> None:
        """A stream ended."""
        if self.waits(self.hear_end, line) or line is not self.line:
            return
        self.line = None
        if self._behind is not None:
            self._stand_at(line.received)
        elif self.is_running:
            assert self.machine is not None
            self.perform(self.machine.disconnected("the stream ended", self.now_ms()))

    def stands(self, line: Line) -> None:
        """A stream that was asked for stands: say Hello."""
        if self.waits(self.stands, line) or line is not self.line or self.machine is None:
            return
        outputs = self.machine.connected(self.now_ms())
        hello = self.machine.hello(self.world.log.chains[self.kept])
        line.received = hello.position
        self.tally.sessions += 1
        self._say(hello)
        self.perform(outputs)

    def _take(self, message: ToPeer) -> None:
        if not self.is_running:
            return
        assert self.machine is not None
        if isinstance(message, Welcome):
            if message.slot not in self.tally.slots:
                self.tally.slots.append(message.slot)
            if message.head - self.kept > FAR_RECORDS:
                self._behind = message
                return
        self.perform(self.machine.receive(message, self.now_ms()))

    def _caught_up(self, line: Line, incarnation: int) -> None:
        """The log is here and replayed: go on as a node that had it and was welcomed just now."""
        if incarnation != self._incarnation or line is not self.line or self._behind is None:
            return
        welcome = self._behind
        self._stand_at(welcome.head)
        assert self.machine is not None
        self._timer_ms = -1
        self.perform([*self.machine.connected(self.now_ms()), *self.machine.receive(welcome, self.now_ms())])
        if line is self.line and line.received > welcome.head:
            self._take_records(welcome.head, line.received)  # what came while it replayed

    def _stand_at(self, position: int) -> None:
        """Begin anew with so much of the log, applied; a line that stands is kept."""
        self._behind = None
        self.kept = position
        self._make_machine(SharedLedger(self.world.log, position).sealed_rounds)
        if self.line is None:
            self.perform([])
        else:
            assert self.machine is not None
            self.machine.advance(self.now_ms())  # asks to connect, which it is

    def _say(self, message: FromPeer) -> None:
        if self.line is None:
            return
        if self.liar is not None and isinstance(message, Contribution):
            falsified = self.liar.falsify(message)
            if falsified is None:
                return
            message = falsified
        self.world.up(self.line, encode_from_peer(message).SerializeToString())

    # --- the machine ------------------------------------------------------------------------------------------------

    def waits(self, action: Any, *arguments: Any) -> bool:
        """Put off what a paused process would do; return whether it is paused."""
        if self.world.events.now_us >= self.resumes_us:
            return False
        self.world.events.at(self.resumes_us, action, *arguments)
        return True

    def perform(self, outputs: Sequence[PeerOutput]) -> None:
        """Do what the machine wants done, and wake it when it wants to be woken."""
        machine, incarnation = self.machine, self._incarnation
        assert machine is not None
        now_ms = self.now_ms()
        for effect in drive(machine, outputs, now_ms):
            self._do(effect)
        due_ms = machine.deadline_ms()
        if due_ms is not None and due_ms != self._timer_ms and incarnation == self._incarnation:
            self._timer_ms = due_ms
            delay_us = round(max(0, due_ms + 1 - now_ms) * 1000 / self._clock_rate)
            self.world.events.after(delay_us, self._tick, incarnation)

    def _tick(self, incarnation: int) -> None:
        if incarnation != self._incarnation or self._behind is not None or self.waits(self._tick, incarnation):
            return
        self._timer_ms = -1
        self.perform([])

    def _do(self, effect: PeerOutput | Persist) -> None:
        match effect:
            case Persist(records=records):
                self.kept += len(records)
            case Say(message=message):
                self._say(message)
            case Measure() | Apply() | Evaluate() | Rebuild():
                self._worker.add(effect)
            case CancelMeasure(round=round_):
                self._worker.cancel(round_)
            case Connect():
                self.line = self.world.connect(self)
            case Disconnect() | HangUp():
                if (line := self.line) is not None:
                    self.line = None
                    self.world.closed_by_peer(line)
            case Stop():
                self.stop = effect
                self._end_process()
                if (line := self.line) is not None:
                    self.line = None
                    self.world.closed_by_peer(line)
