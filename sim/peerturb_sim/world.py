"""A whole network in one process: production machines on a virtual clock, network and disk.

The world carries messages and ends streams; what peers and coordinator do with them is theirs (`peer`, `coordinator`),
when things go wrong is the scenario's (`life`), and what must never happen is the checkers' (`checks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerturb.ids import Slot
from peerturb.protocol.outputs import SessionId
from peerturb.protocol.records import Record, RunFinished
from peerturb.spec import RunSpec
from peerturb.wire.channel import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS
from peerturb_coordinator.traffic import FRAMING_BYTES as COUNTED_BYTES
from peerturb_sim.checks import Checks
from peerturb_sim.compute import Compute
from peerturb_sim.coordinator import Coordinator
from peerturb_sim.events import START_US, Events, stream
from peerturb_sim.log import SharedLog
from peerturb_sim.network import FRAMING_BYTES, Line
from peerturb_sim.peer import Peer
from peerturb_sim.recorder import Recorder
from peerturb_sim.scenario import CoordinatorSpec, GroupSpec

SILENCE_US = 1000 * (KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS)
"""After so long without an answer either end of a stream takes it for dead."""
ROUND_TRIPS = 3
"""Of opening a stream: TCP, TLS, HTTP/2."""


@dataclass(slots=True, kw_only=True)
class Chaos:
    """Faults per thousand events of their kind, whenever such events happen."""

    cut: int = 0
    """Streams cut, per message."""
    store: int = 0
    """Writes refused."""


class World:
    """Everything that one seed decides.

    Attributes:
        running: peers whose process runs and has not stopped.
        is_calm: no chance and no set fault strikes any more; peers neither come nor go.
        is_finished: whether the end of the run has been announced.
        holds_membership: let joins and leaves wait for the next round's records, for peers that have the rest: with
            thousands of peers, messages that say nothing to be done would be most of all events.
    """

    def __init__(
        self,
        spec: RunSpec,
        compute: Compute,
        log_path: Path,
        *,
        seed: int,
        coordinator: CoordinatorSpec | None = None,
        chaos: Chaos | None = None,
        holds_membership: bool = False,
    ) -> None:
        self.spec = spec
        self.compute = compute
        self.seed = seed
        self.events = Events()
        self.chaos = chaos or Chaos()
        self.holds_membership = holds_membership
        self.running = 0
        self.is_calm = self.is_finished = False
        self.up_bytes = self.down_bytes = 0
        self.peers: list[Peer] = []
        self.recorder = Recorder(self)
        self.coordinator = Coordinator(self, log_path)
        self.checks = Checks(self.coordinator.log, compute.base.digest)
        self._up_us = 8 / (coordinator or CoordinatorSpec()).up_mbit
        self._up_free_us = 0.0
        self._sessions = 0
        self._chaos_draws = stream(seed, "chaos")
        self.coordinator.start()

    @property
    def log(self) -> SharedLog:
        """The coordinator's log, and everybody's."""
        return self.coordinator.log

    @property
    def now_ms(self) -> int:
        """The coordinator's time."""
        return self.events.now_ms

    @property
    def waiting_for(self) -> str:
        """What the coordinator says that the open round waits for."""
        machine = self.coordinator.machine
        return "it is down" if machine is None else machine.status(self.now_ms).waiting_for

    def add(self, group: GroupSpec) -> Peer:
        """Put one more peer into the world; it does not run yet."""
        peer = Peer(self, len(self.peers), group)
        self.peers.append(peer)
        return peer

    def run(self, *, until_s: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let events happen until a time since the beginning; return whether `done` came true."""
        return self.events.run(until_us=START_US + round(until_s * 1e6), done=done)

    def chance(self, per_thousand: int) -> bool:
        """Draw a fault."""
        return per_thousand > 0 and self._chaos_draws.randrange(1000) < per_thousand

    def index_of(self, slot: Slot) -> int:
        """Return which peer has a slot; -1 if none has heard of it yet."""
        return next((peer.index for peer in self.peers if slot in peer.tally.slots), -1)

    def announced(self, record: Record, position: int) -> None:
        """The coordinator has announced the record at a position."""
        self.checks.announced(record, position)
        self.recorder.announced(record)
        self.is_finished = self.is_finished or isinstance(record, RunFinished)

    # --- messages ---------------------------------------------------------------------------------------------------

    def up(self, line: Line, data: bytes) -> None:
        """Carry a peer's message to the coordinator."""
        if line.takes:
            line.last_up_us = max(line.peer.host.up(len(data), self.events.now_us), line.last_up_us)
            self.events.at(round(line.last_up_us), self._arrives_up, line, data)
            self._may_cut(line)

    def down(self, line: Line, data: bytes) -> None:
        """Carry the coordinator's message to a peer."""
        if line.takes:
            at_us = self._leaves(line, len(data))
            self.events.at(at_us, self._arrives_down, line, data)

    def feed(self, line: Line, first: int, last: int) -> None:
        """Carry records first..last - 1 to a peer."""
        if line.takes:
            size = self.log.message_bytes(first, last)
            at_us = self._leaves(line, size)
            self.events.at(at_us, self._records_arrive, line, first, last, size)
            self._may_cut(line)

    def _leaves(self, line: Line, size: int) -> int:
        """Send so many bytes down a line, after what the coordinator sends before; return when they arrive."""
        self._up_free_us = max(self.events.now_us, self._up_free_us) + (size + FRAMING_BYTES) * self._up_us
        self.down_bytes += size + COUNTED_BYTES
        line.last_down_us = max(line.peer.host.down(size, self._up_free_us), line.last_down_us)
        return round(line.last_down_us)

    def _arrives_up(self, line: Line, data: bytes) -> None:
        if line.is_open:
            self.up_bytes += len(data) + COUNTED_BYTES
            line.peer.traffic.up_bytes += len(data) + COUNTED_BYTES
            self.coordinator.hear(line, data)

    def _arrives_down(self, line: Line, data: bytes) -> None:
        if line.is_open:
            line.peer.traffic.down_bytes += len(data) + COUNTED_BYTES
            line.peer.hear(line, data)

    def _records_arrive(self, line: Line, first: int, last: int, size: int) -> None:
        if line.is_open:
            line.peer.traffic.down_bytes += size + COUNTED_BYTES
            line.peer.hear_records(line, first, last)

    # --- streams ----------------------------------------------------------------------------------------------------

    def connect(self, peer: Peer) -> Line:
        """Begin to open a stream; `stands` or `hear_end` follows, or in a partition nothing."""
        self._sessions += 1
        line = Line(session=SessionId(self._sessions), peer=peer)
        host, now_us = peer.host, self.events.now_us
        if now_us >= host.blocked_until_us:
            trip_us = host.transit_us(0, now_us)
            self.events.after(round(2 * trip_us * ROUND_TRIPS), self._opens, line)
        return line

    def _opens(self, line: Line) -> None:
        if self.coordinator.machine is None:
            line.is_open = line.takes = False
            line.peer.hear_end(line)
        else:
            line.peer.stands(line)

    def closed_by_peer(self, line: Line) -> None:
        """The peer ends a stream; what it said before arrives first."""
        if line.takes:
            line.takes = False
            self._coordinator_hears_end(line, line.peer.host.transit_us(0, self.events.now_us))

    def closed_by_coordinator(self, line: Line) -> None:
        """The coordinator ends a stream; what it said before arrives first."""
        if line.takes:
            line.takes = False
            self.events.after(0, self.coordinator.hear_end, line)
            self._peer_hears_end(line, line.peer.host.transit_us(0, self.events.now_us))

    def lost_by_peer(self, line: Line, *, silently: bool) -> None:
        """The peer's process is gone; if its machine is too, the coordinator hears nothing for long."""
        if line.takes:
            line.takes = False
            self._coordinator_hears_end(line, SILENCE_US if silently else line.peer.draws.uniform(0, 40_000))

    def coordinator_died(self, line: Line) -> None:
        """The coordinator's process is gone; the peer hears it soon."""
        line.is_open = line.takes = False
        transit_us = line.peer.host.transit_us(0, self.events.now_us)
        self.events.after(round(min(transit_us, SILENCE_US)), line.peer.hear_end, line)

    def cut(self, line: Line) -> None:
        """End a stream from outside. What is under way may be lost or not; one end may hear of it much later."""
        if not line.takes:
            return
        draws = line.peer.draws
        line.takes = False
        line.is_open = draws.random() < 0.5
        up_us, down_us = draws.uniform(0, 40_000), draws.uniform(0, 40_000)
        if draws.random() < 0.2:
            up_us, down_us = draws.choice([(SILENCE_US, down_us), (up_us, SILENCE_US)])
        self._coordinator_hears_end(line, up_us)
        self._peer_hears_end(line, down_us)

    def partition(self, peers: Sequence[Peer], for_us: int) -> None:
        """Cut peers off from the coordinator: streams stand still, and die if it lasts."""
        until_us = self.events.now_us + for_us
        for peer in peers:
            peer.host.blocked_until_us = max(peer.host.blocked_until_us, until_us)
            if peer.line is not None and for_us > SILENCE_US:
                self.events.after(SILENCE_US, self._dies, peer.line)

    def _dies(self, line: Line) -> None:
        """Let both ends take a stream for dead: nothing that is under way on it arrives any more."""
        if line.takes and self.events.now_us < line.peer.host.blocked_until_us:
            line.takes = line.is_open = False
            self.events.after(0, self.coordinator.hear_end, line)
            self.events.after(0, line.peer.hear_end, line)

    def _coordinator_hears_end(self, line: Line, delay_us: float) -> None:
        self.events.at(self._end_us(line, delay_us, line.last_up_us), self.coordinator.hear_end, line)

    def _peer_hears_end(self, line: Line, delay_us: float) -> None:
        self.events.at(self._end_us(line, delay_us, line.last_down_us), line.peer.hear_end, line)

    def _end_us(self, line: Line, delay_us: float, last_us: float) -> int:
        """Return when an end of a stream is heard of: after what was sent before, in a partition by its silence."""
        now_us = self.events.now_us
        at_us = max(now_us + delay_us, last_us)
        return round(min(at_us, now_us + SILENCE_US) if now_us < line.peer.host.blocked_until_us else at_us)

    def _may_cut(self, line: Line) -> None:
        if self.chance(self.chaos.cut):
            self.events.after(round(line.peer.draws.uniform(0, 30_000)), self.cut, line)
