"""One peer of the simulated network: the production machine, a local log, a worker on toy weights, and its line."""

import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peerturb.ids import PeerKey, Position
from peerturb.manifest import manifest_digest
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.messages import Contribution, FromPeer, ToPeer
from peerturb.protocol.outputs import (
    Apply,
    CancelMeasure,
    Connect,
    Disconnect,
    Evaluate,
    Measure,
    PeerOutput,
    Rebuild,
    Say,
    SessionId,
    Stop,
    Work,
)
from peerturb.protocol.peer import PeerMachine
from peerturb.protocol.records import Record, RoundSealed
from peerturb.protocol.results import Applied, EvaluatedResult, Measured, Rebuilt, Result
from peerturb.runlog.chain import CHAIN_START, chain_after
from peerturb.wire.messages import encode_from_peer, parse_to_peer
from peerturb.wire.records import RecordDecoder, encode_record

if TYPE_CHECKING:
    from tests.simulation.world import World

BASE = 0x5EED0000
MANIFEST = manifest_digest(())


def mix(weights: int, sealed: RoundSealed) -> int:
    """Toy update: depends on the weights before, the step and every code with its slot."""
    text = struct.pack("<IIf", weights, sealed.round, sealed.alpha) + repr(sealed.contributions()).encode()
    return zlib.crc32(text)


def toy_codes(weights: int, slot: int, round_: int, count: int) -> bytes:
    """Codes that follow from weights, slot and round, a few of them void."""
    return bytes(zlib.crc32(struct.pack("<IIII", weights, slot, round_, sample)) & 0xFF for sample in range(count))


def key_of(index: int) -> PeerKey:
    """Identity of a peer of the world."""
    return PeerKey(bytes([index]) * 32)


@dataclass(eq=False)
class Line:
    """One session's stream: in order, delayed, cut at any moment."""

    session: SessionId
    peer: "Peer"
    is_open: bool = True
    is_welcome: bool = False
    sent: int = 0
    """Feed position."""
    decoder: RecordDecoder = field(default_factory=RecordDecoder)
    received: int = 0
    last_ms: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})


class Peer:
    """Shell around a peer's machine: a local log, one worker, toy weights."""

    def __init__(self, world: "World", index: int, *, probe_ms: int) -> None:
        self.world = world
        self.index = index
        self.probe_ms = probe_ms
        self.log: list[bytes] = []
        self.weights = BASE
        self.rounds = 0
        self.machine: PeerMachine | None = None
        self.line: Line | None = None
        self.incarnation = 0
        self.rebuilds = 0
        self.lies = False
        self.measured = 0
        self.stop: Stop | None = None
        self._work: deque[Work] = deque()
        self._cancelled = -1
        self._timer = -1

    def start(self) -> None:
        """Replay the local log and take part; a part of the rounds may be left to the machine to apply."""
        self.incarnation += 1
        self.stop, self._timer = None, -1
        decoder = RecordDecoder()
        records = [decoder.decode(payload) for payload in self.log]
        sealed = [record for record in records if isinstance(record, RoundSealed)]
        keep = self.world.random.randrange(len(sealed) + 1)
        self.weights, self.rounds = BASE, 0
        for record in sealed[:keep]:
            self._apply(record)
        self._work.clear()
        self.machine = PeerMachine(
            self.world.spec,
            key=key_of(self.index),
            name=f"peer-{self.index}",
            token="",
            base_digest=bytes.fromhex(self.world.spec.model.digest),
            manifest_digest=MANIFEST,
            digest=self.weights,
            ledger=Ledger.fold(records),
            unapplied=sealed[keep:],
        )
        self._perform([])

    def lie(self) -> None:
        """From now on, name other weights than it has in every contribution, and care for nobody's digests."""
        assert self.machine is not None
        self.lies = True
        self.machine._replica._compare = lambda sealed: None  # type: ignore[method-assign]

    def restart(self) -> None:
        """Start if it is down."""
        if self.machine is None:
            self.start()

    def crash(self) -> None:
        """kill -9: lose memory and the unsynced end of the local log."""
        if self.machine is None:
            return
        self.machine = None
        self.incarnation += 1
        if self.line is not None:
            self.world.cut(self.line)
            self.line = None
        del self.log[len(self.log) - self.world.random.randrange(min(4, len(self.log) + 1)) :]

    def hear(self, line: Line, data: bytes) -> None:
        """A message came down a line."""
        if self.machine is None or line is not self.line:
            return
        message: ToPeer = parse_to_peer(data, first=Position(line.received), decoder=line.decoder)
        line.received += len(getattr(message, "records", ()))
        self._perform(self.machine.receive(message, self.world.now_ms))

    def hear_end(self, line: Line) -> None:
        """A stream ended."""
        if self.machine is not None and line is self.line:
            self.line = None
            self._perform(self.machine.disconnected("cut", self.world.now_ms))

    def _perform(self, outputs: Sequence[PeerOutput]) -> None:
        machine = self.machine
        assert machine is not None
        for effect in drive(machine, outputs, self.world.now_ms):
            self._do(effect)
        due_ms = machine.deadline_ms()
        if due_ms is not None and due_ms != self._timer:
            self._timer = due_ms
            incarnation = self.incarnation
            self.world.after(due_ms - self.world.now_ms, lambda: self._tick(incarnation))

    def _tick(self, incarnation: int) -> None:
        if self.machine is not None and incarnation == self.incarnation:
            self._timer = -1
            self._perform([])

    def _do(self, effect: PeerOutput | Persist) -> None:
        match effect:
            case Persist(records=records):
                self.log.extend(map(encode_record, records))
                coordinator = self.world.coordinator.store
                assert self.log == coordinator[: len(self.log)], "a local log is a prefix of the coordinator's"
            case Connect():
                self._connect()
            case Disconnect():
                if self.line is not None:
                    line, self.line = self.line, None
                    self.world.cut(line)
            case Say(message=message):
                self._say(message)
            case Measure() | Apply() | Evaluate() | Rebuild():
                self._work.append(effect)
                if len(self._work) == 1:
                    self._begin()
            case CancelMeasure(round=round_):
                self._cancelled = round_
            case Stop():
                self.stop = effect

    def _connect(self) -> None:
        line = Line(session=self.world.next_session(), peer=self)
        self.line = line
        if self.world.coordinator.machine is None or self.world.chance(self.world.faults.cut):
            self.world.after(5, lambda: self._refused(line))
        else:
            self.world.after(self.world.random.randrange(1, 10), lambda: self._stands(line))

    def _refused(self, line: Line) -> None:
        line.is_open = False
        self.hear_end(line)

    def _stands(self, line: Line) -> None:
        if self.machine is None or line is not self.line:
            return
        outputs = self.machine.connected(self.world.now_ms)
        chain = CHAIN_START
        for payload in self.log:
            chain = chain_after(chain, payload)
        hello = self.machine.hello(chain)
        line.received = hello.position
        line.decoder = RecordDecoder(self.machine.ledger.sealed_rounds)
        self._say(hello)
        self._perform(outputs)

    def _say(self, message: FromPeer) -> None:
        if self.lies and isinstance(message, Contribution):
            message = replace(message, digest=message.digest ^ 1)
        if (line := self.line) is not None:
            data = encode_from_peer(message).SerializeToString()
            self.world.deliver(line, "up", lambda: self.world.coordinator.hear(line, data))

    # --- the worker -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        incarnation, work = self.incarnation, self._work[0]
        duration_ms = {Apply: 1, Rebuild: 20, Evaluate: 15}.get(type(work), 0)
        if isinstance(work, Measure):
            duration_ms = work.count * self.probe_ms
            if work.round <= self._cancelled:
                duration_ms = 0
        self.world.after(duration_ms, lambda: self._finish(incarnation))

    def _finish(self, incarnation: int) -> None:
        if self.machine is None or incarnation != self.incarnation:
            return
        work = self._work.popleft()
        result = self._result(work)
        if self._work:
            self._begin()
        self._perform(self.machine.completed(result, self.world.now_ms))

    def _result(self, work: Work) -> Result:
        assert self.machine is not None
        match work:
            case Measure(round=round_, count=count):
                self.measured += 1
                assert round_ == self.rounds, "probes are measured on the weights of their round"
                codes = toy_codes(self.weights, self.index, round_, count)
                return Measured(round=round_, codes=codes, loss=2.5, elapsed_ms=count * self.probe_ms)
            case Apply(sealed=sealed):
                self._apply(sealed)
                more = bool(self._work) and isinstance(self._work[0], Apply)
                return Applied(round=sealed.round, digest=None if more else self.weights)
            case Evaluate(round=round_):
                assert round_ == self.rounds
                return EvaluatedResult(round=round_, loss=1.5, accuracy=0.5, examples=10)
            case Rebuild():
                self.rebuilds += 1
                self.weights, self.rounds = BASE, 0
                for record in self.records():
                    if isinstance(record, RoundSealed):
                        self._apply(record)
                return Rebuilt(rounds=self.rounds, digest=self.weights)

    def records(self) -> list[Record]:
        """The local log's records."""
        decoder = RecordDecoder()
        return [decoder.decode(payload) for payload in self.log]

    def _apply(self, sealed: RoundSealed) -> None:
        assert sealed.round == self.rounds, "rounds are applied once, in order"
        self.weights = mix(self.weights, sealed)
        self.rounds += 1
        self.world.agree(self.rounds, self.weights)
