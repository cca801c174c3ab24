"""Lines between peers and the coordinator: when a message arrives, and how many bytes have passed.

A stream is TCP: in order, whole, as long as it stands. So loss is the time of a retransmission, a partition a silence,
and what overtakes are only messages of different streams. It knows lengths, not contents.
"""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peerturb.ids import PeerKey
from peerturb.protocol.messages import Hello
from peerturb.protocol.outputs import SessionId
from peerturb_sim.scenario import LineSpec

if TYPE_CHECKING:
    from peerturb_sim.peer import Peer

PACKET_BYTES = 1_400
"""What one packet carries; the chance of loss counts by it."""
FRAMING_BYTES = 70
"""Beside the message, for time on the line only: gRPC 5, HTTP/2 9, TLS 22, TCP and IP about 34."""
RETRANSMISSION_US = 200_000
"""Smallest wait before a lost packet is sent again, as Linux has it; doubles with each further loss."""
_LOSSES_MAX = 6


@dataclass(slots=True)
class Traffic:
    """Messages, and bytes of their encodings, that one end has sent to and heard from the other."""

    up_bytes: int = 0
    up_messages: int = 0
    down_bytes: int = 0
    down_messages: int = 0


class Host:
    """A peer's connection to the internet, shared by its streams."""

    __slots__ = ("_down_free_us", "_down_us", "_draws", "_loss", "_up_free_us", "_up_us", "blocked_until_us", "spec")

    def __init__(self, spec: LineSpec, draws: random.Random) -> None:
        self.spec = spec
        self.blocked_until_us = 0
        """End of the partition that cuts it off from the coordinator."""
        self._draws = draws
        self._up_us = 8 / spec.up_mbit
        self._down_us = 8 / spec.down_mbit
        self._loss = spec.loss
        self._up_free_us = self._down_free_us = 0.0

    def up(self, size: int, now_us: float) -> float:
        """Return when a message that the peer sends now arrives."""
        self._up_free_us = max(now_us, self._up_free_us) + (size + FRAMING_BYTES) * self._up_us
        return self._up_free_us + self.transit_us(size, now_us)

    def down(self, size: int, sent_us: float) -> float:
        """Return when a message that leaves the coordinator at `sent_us` arrives."""
        arrived_us = max(sent_us + self.transit_us(size, sent_us), self._down_free_us)
        self._down_free_us = arrived_us + (size + FRAMING_BYTES) * self._down_us
        return self._down_free_us

    def transit_us(self, size: int, now_us: float) -> float:
        """Draw the time between two ends: latency, jitter, retransmissions, the rest of a partition."""
        draws, spec = self._draws, self.spec
        transit_us = 1000 * (spec.latency_ms + draws.expovariate(1.0) * spec.jitter_ms)
        if self._loss:
            packets = 1 + size // PACKET_BYTES
            chance = self._loss if packets == 1 else 1 - (1 - self._loss) ** packets
            wait_us = max(RETRANSMISSION_US, 4_000 * spec.latency_ms)
            for _ in range(_LOSSES_MAX):
                if draws.random() >= chance:
                    break
                transit_us += wait_us
                wait_us *= 2
        if now_us < self.blocked_until_us:
            transit_us += self.blocked_until_us - now_us
        return transit_us


@dataclass(slots=True, eq=False)
class Line:
    """One session's stream."""

    session: SessionId
    peer: "Peer"
    is_open: bool = True
    """Whether messages under way still arrive."""
    takes: bool = True
    """Whether the ends may still send."""
    received: int = 0
    """Position of the next record that the peer will hear of."""
    sent: int = 0
    """Position of the next record to send."""
    head: int = 0
    """Length of the log when the peer was welcomed."""
    is_welcome: bool = False
    key: PeerKey | None = None
    """Who said Hello on it."""
    hello: Hello | None = None
    """What the peer said, until its proof has come."""
    last_up_us: float = field(default=0.0)
    last_down_us: float = field(default=0.0)
