"""Shell around the production coordinator's machine: virtual clock, virtual lines, a log file that crashes can tear."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from peerturb.errors import RejectCode
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import Challenge, Disconnected, FromPeer, Hello, Proof, Refusal
from peerturb.protocol.outputs import CoordinatorOutput, Notice, Reject, Send, SessionId
from peerturb.protocol.records import RoundSealed
from peerturb.protocol.sealing import SealReason
from peerturb.wire.errors import WireError
from peerturb.wire.messages import encode_to_peer, parse_from_peer
from peerturb.wire.records import RecordDecoder
from peerturb_coordinator.feed import BATCH_BYTES
from peerturb_sim.disk import Disk, DiskFullError, TornWriteError
from peerturb_sim.log import MEMBERSHIP, SharedLog
from peerturb_sim.network import Line

if TYPE_CHECKING:
    from peerturb_sim.world import World

RETRY_US = 50_000
"""Pause before a store that refused is asked again."""


class Coordinator:
    """The machine, its disk and its sessions, joined."""

    def __init__(self, world: "World", path: Path) -> None:
        self.world = world
        self.log = SharedLog()
        self.disk = Disk(path, self.log)
        self.lines: dict[SessionId, Line] = {}
        self.machine: CoordinatorMachine | None = None
        self.refusals: dict[RejectCode, int] = {}
        """How often it refused, by code, over all its processes."""
        self.notices: list[str] = []
        self.seals: dict[SealReason, int] = dict.fromkeys(SealReason, 0)
        self.crashes = 0
        self.down_until_us = self.refuses_until_us = 0
        """Ends of a scenario's faults, the latest where some overlap."""
        self._counted = dict.fromkeys(SealReason, 0)
        """Of `seals`, those by the process that runs now."""
        self._incarnation = 0
        self._timer_ms = -1
        self._is_retrying = False
        self._fresh: list[Line] = []
        """Welcomed, and not yet fed all that was there then."""

    @property
    def store(self) -> list[bytes]:
        """The records on disk, as their bytes."""
        return self.log.payloads

    def start(self) -> None:
        """Read the log file and go on, if it is down."""
        if self.machine is not None:
            return
        self._incarnation += 1
        self._timer_ms = -1
        self._is_retrying = False
        self._counted = dict.fromkeys(SealReason, 0)
        records = self.disk.recover()
        self.world.checks.restarted(records)
        decoder = RecordDecoder()
        self.machine = CoordinatorMachine.from_records(self.world.spec, map(decoder.decode, self.log.payloads))
        self._perform([])

    def crash(self, *, tear_at: float | None = None) -> None:
        """Lose everything but the log file.

        Args:
            tear_at: die in the middle of the next write, after this part (0..1) of it; None: now.
        """
        if self.machine is None:
            return
        if tear_at is not None:
            self.disk.tear_at = tear_at
            return
        self.machine = None
        self.disk.tear_at = None
        self.crashes += 1
        self._incarnation += 1
        self._fresh.clear()
        lines, self.lines = list(self.lines.values()), {}
        for line in lines:
            self.world.coordinator_died(line)

    def hear(self, line: Line, data: bytes) -> None:
        """A message came up a line."""
        if line.is_over:
            return
        if self.machine is None:
            self.world.coordinator_died(line)
            return
        try:
            message = parse_from_peer(data)
        except WireError as error:
            self._refuse(line, error.code, error.why)
            return
        if line.hello is not None and not isinstance(message, Proof):
            self._refuse(line, RejectCode.NOT_JOINED, "another message came where a proof was due")
        elif isinstance(message, Hello):
            self._greet(line, message)
        elif line.hello is not None:
            hello, line.hello = line.hello, None
            line.sent = hello.position
            self._receive(line, hello, len(data))
        else:
            self._receive(line, message, len(data))

    def hear_end(self, line: Line) -> None:
        """A stream ended."""
        line.is_over = True
        if self.lines.pop(line.session, None) is not None and self.machine is not None:
            self._perform(self.machine.receive(line.session, Disconnected(), self.world.now_ms))

    def tick(self, incarnation: int) -> None:
        """The machine's time has come."""
        if self.machine is not None and incarnation == self._incarnation:
            self._timer_ms = -1
            self._perform([])

    def _retry(self, incarnation: int) -> None:
        """Ask the store again; one attempt is under way at a time, however many messages come meanwhile."""
        if self.machine is not None and incarnation == self._incarnation:
            self._is_retrying = False
            self._perform([])

    def _greet(self, line: Line, hello: Hello) -> None:
        """Hold the handshake as the service does, but for the signature: a virtual peer is who it says."""
        self.lines[line.session] = line
        line.key = hello.key
        chains = self.log.chains
        if hello.position >= len(chains) or chains[hello.position] != hello.chain:
            self._refuse(line, RejectCode.LOG_DIVERGED, "the peer's log is not a beginning of the run's")
            return
        line.hello = hello
        nonce = sha256(b"nonce" + line.session.to_bytes(8, "little")).digest()
        self._send(line, encode_to_peer(Challenge(nonce=nonce)).SerializeToString())

    def _receive(self, line: Line, message: FromPeer, size: int) -> None:
        assert self.machine is not None
        self.world.checks.heard(line, message, size)
        self._perform(self.machine.receive(line.session, message, self.world.now_ms))

    def _refuse(self, line: Line, code: RejectCode, why: str) -> None:
        assert self.machine is not None
        self._perform([self.machine.reject(line.session, code, why, closes=True)])

    def _perform(self, outputs: Sequence[CoordinatorOutput]) -> None:
        machine = self.machine
        assert machine is not None
        try:
            for effect in drive(machine, outputs, self.world.now_ms):
                self._do(effect)
        except DiskFullError:
            if not self._is_retrying:
                self._is_retrying = True
                self.world.events.after(RETRY_US, self._retry, self._incarnation)
        except TornWriteError:
            self.crash()
            return
        self._announce()
        self._arm()

    def _do(self, effect: CoordinatorOutput | Persist) -> None:
        match effect:
            case Persist(records=records):
                if self.world.chance(self.world.chaos.store):
                    raise DiskFullError
                self.disk.append(records)
            case Send(session=session, message=message):
                if (line := self.lines.get(session)) is not None:
                    line.is_welcome = True
                    line.head = len(self.log.payloads)
                    self._fresh.append(line)
                    self._send(line, encode_to_peer(message).SerializeToString())
            case Reject(session=session, code=code, why=why, closes=closes):
                self.refusals[code] = self.refusals.get(code, 0) + 1
                if (line := self.lines.get(session)) is not None:
                    refusal = Refusal(code=code, why=why, closes=closes)
                    self._send(line, encode_to_peer(refusal).SerializeToString())
                    if closes:
                        self.world.closed_by_coordinator(line)
            case Notice(code=code):
                self.notices.append(code)

    def _announce(self) -> None:
        """Tell the world of new records and feed every session that lacks some."""
        first = len(self.log.records)
        new = self.log.announce()
        if any(isinstance(record, RoundSealed) for record in new):
            self._count_seals()
        for position, record in enumerate(new, first):
            self.world.announced(record, position)
        if new:
            is_quiet = self.world.holds_membership and all(isinstance(record, MEMBERSHIP) for record in new)
            lines = self._fresh if is_quiet else [line for line in self.lines.values() if line.is_welcome]
        else:
            lines = self._fresh
        head = len(self.log.records)
        for line in lines:
            while line.sent < head:
                first, line.sent = line.sent, self.log.batch_end(line.sent, BATCH_BYTES)
                self.world.feed(line, first, line.sent)
        self._fresh.clear()

    def _count_seals(self) -> None:
        """Add what this process has sealed since it was last asked."""
        assert self.machine is not None
        for reason, count in self.machine.counters.seals.items():
            self.seals[reason] += count - self._counted[reason]
            self._counted[reason] = count

    def _send(self, line: Line, data: bytes) -> None:
        self.world.down(line, data)

    def _arm(self) -> None:
        """Keep one timer for when the machine is due."""
        assert self.machine is not None
        due_ms = self.machine.deadline_ms()
        if due_ms is not None and due_ms != self._timer_ms and due_ms > self.world.now_ms:
            self._timer_ms = due_ms
            self.world.events.at(due_ms * 1000, self.tick, self._incarnation)
