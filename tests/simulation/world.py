"""A whole network in one process: the production machines, a virtual clock, an unreliable line, toy weights.

Everything follows from one seed. Weights are one integer that every sealed round mixes; that is enough to see a round
applied twice, skipped or in another order. What the world tells the machines goes through the wire's conversions.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peerturb.errors import RejectCode
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import Disconnected, Hello, Refusal
from peerturb.protocol.outputs import CoordinatorOutput, Notice, Reject, Send, SessionId
from peerturb.runlog.chain import CHAIN_START, chain_after
from peerturb.spec import RunSpec
from peerturb.wire.messages import encode_payloads, encode_to_peer, parse_from_peer
from peerturb.wire.records import RecordDecoder, encode_record
from tests.simulation.peer import BASE, Line, Peer


class DiskFullError(Exception):
    """The coordinator's store refuses."""


@dataclass(kw_only=True)
class Faults:
    """How much goes wrong, per thousand events of its kind."""

    cut: int = 0
    store: int = 0


class World:
    """Event heap and everything that hangs on it."""

    def __init__(self, spec: RunSpec, *, seed: int, peers: int, faults: Faults | None = None) -> None:
        self.spec = spec
        self.random = random.Random(seed)
        self.faults = faults or Faults()
        self.now_ms = 1_000
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._sessions = 0
        self.coordinator = Coordinator(self)
        self.peers = [Peer(self, index, probe_ms=self.random.choice((1, 2, 5))) for index in range(peers)]
        self.digests: dict[int, int] = {0: BASE}
        """Canonical weights by rounds applied: the agreement checker."""
        self.checks_agreement = True

    def after(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Schedule an action."""
        self._sequence += 1
        heapq.heappush(self._events, (self.now_ms + max(0, delay_ms), self._sequence, action))

    def run(self, *, until_ms: int, done: Callable[[], bool] = lambda: False) -> bool:
        """Let events happen; return whether `done` came true."""
        while self._events and not done():
            if self._events[0][0] > until_ms:
                self.now_ms = until_ms
                return False
            self.now_ms, _, action = heapq.heappop(self._events)
            action()
            self.coordinator.check()
        return done()

    def next_session(self) -> SessionId:
        """Number a stream."""
        self._sessions += 1
        return SessionId(self._sessions)

    def chance(self, per_thousand: int) -> bool:
        """Draw a fault."""
        return per_thousand > 0 and self.random.randrange(1000) < per_thousand

    def agree(self, rounds: int, weights: int) -> None:
        """All weights with the same number of rounds are the same."""
        if not self.checks_agreement:
            return
        assert self.digests.setdefault(rounds, weights) == weights, f"peers disagree after {rounds} rounds"

    def deliver(self, line: Line, direction: str, action: Callable[[], None]) -> None:
        """Carry something along a line after a while, in order, unless it is cut first."""
        at_ms = max(line.last_ms[direction], self.now_ms + self.random.randrange(1, 20))
        line.last_ms[direction] = at_ms
        self.after(at_ms - self.now_ms, lambda: action() if line.is_open else None)
        if self.chance(self.faults.cut):
            self.after(self.random.randrange(30), lambda: self.cut(line))

    def cut(self, line: Line) -> None:
        """End a stream; both sides hear of it, at different times."""
        if line.is_open:
            line.is_open = False
            self.after(self.random.randrange(40), lambda: self.coordinator.hear_end(line))
            self.after(self.random.randrange(40), lambda: line.peer.hear_end(line))


class Coordinator:
    """Shell around the coordinator's machine: a durable list of payloads and the feed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store: list[bytes] = []
        self.announced: list[bytes] = []
        self.chains = [CHAIN_START]
        self.lines: dict[SessionId, Line] = {}
        self.machine: CoordinatorMachine | None = None
        self.incarnation = 0
        self.refusals: list[RejectCode] = []
        self.notices: list[str] = []
        self._timer = -1
        self.start()

    def start(self) -> None:
        """Fold the store and go on."""
        decoder = RecordDecoder()
        self.incarnation += 1
        self.machine = CoordinatorMachine.from_records(self.world.spec, map(decoder.decode, self.store))
        self._timer = -1
        self._perform([])

    def restart(self) -> None:
        """Start if it is down."""
        if self.machine is None:
            self.start()

    def crash(self) -> None:
        """Lose everything but the store; all streams end."""
        self.machine = None
        self.lines.clear()
        for peer in self.world.peers:
            if peer.line is not None:
                self.world.cut(peer.line)

    def hear(self, line: Line, data: bytes) -> None:
        """A message came up a line."""
        if self.machine is None:
            self.world.cut(line)
            return
        message = parse_from_peer(data)
        if isinstance(message, Hello):
            self.lines[line.session] = line
            if message.position < len(self.chains) and self.chains[message.position] != message.chain:
                reject = self.machine.reject(line.session, RejectCode.LOG_DIVERGED, "chain", closes=True)
                self._perform([reject])
                return
            line.sent = message.position
        self._perform(self.machine.receive(line.session, message, self.world.now_ms))

    def hear_end(self, line: Line) -> None:
        """A stream ended."""
        self.lines.pop(line.session, None)
        if self.machine is not None:
            self._perform(self.machine.receive(line.session, Disconnected(), self.world.now_ms))

    def check(self) -> None:
        """Checker: what was announced stays, byte for byte."""
        assert self.store[: len(self.announced)] == self.announced

    def _perform(self, outputs: Sequence[CoordinatorOutput]) -> None:
        machine, incarnation = self.machine, self.incarnation
        assert machine is not None
        try:
            for effect in drive(machine, outputs, self.world.now_ms):
                self._do(effect)
        except DiskFullError:
            self.world.after(50, lambda: self._tick(incarnation))
        self._feed()
        self._arm()

    def _do(self, effect: CoordinatorOutput | Persist) -> None:
        match effect:
            case Persist(records=records):
                if self.world.chance(self.world.faults.store):
                    raise DiskFullError
                for record in records:
                    payload = encode_record(record)
                    self.store.append(payload)
                    self.chains.append(chain_after(self.chains[-1], payload))
            case Send(session=session, message=message):
                if line := self.lines.get(session):
                    line.is_welcome = True
                    self._send(line, encode_to_peer(message).SerializeToString())
            case Reject(session=session, code=code, why=why, closes=closes):
                self.refusals.append(code)
                if line := self.lines.get(session):
                    refusal = Refusal(code=code, why=why, closes=closes)
                    self._send(line, encode_to_peer(refusal).SerializeToString())
            case Notice(code=code):
                self.notices.append(code)

    def _feed(self) -> None:
        """Send every welcome session what it lacks, a few records at a time."""
        for line in self.lines.values():
            while line.is_welcome and line.sent < len(self.store):
                batch = self.store[line.sent : line.sent + 7]
                line.sent += len(batch)
                self._send(line, encode_payloads(batch).SerializeToString())
        self.announced.extend(self.store[len(self.announced) :])

    def _send(self, line: Line, data: bytes) -> None:
        self.world.deliver(line, "down", lambda: line.peer.hear(line, data))

    def _arm(self) -> None:
        machine, incarnation = self.machine, self.incarnation
        assert machine is not None
        due_ms = machine.deadline_ms()
        if due_ms is not None and due_ms != self._timer and due_ms > self.world.now_ms:
            self._timer = due_ms
            self.world.after(due_ms - self.world.now_ms, lambda: self._tick(incarnation))

    def _tick(self, incarnation: int) -> None:
        if self.machine is not None and incarnation == self.incarnation:
            self._timer = -1
            self._perform([])
