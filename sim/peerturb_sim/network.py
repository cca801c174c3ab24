"""Lines between peers and the coordinator: when a message arrives, and how many bytes have passed.

A stream is TCP: in order, whole, once, as long as it stands. So a lost packet is the time of its retransmission, one
that others overtake the time until it comes, one that comes twice time on the line, a partition a silence; what is
repeated or overtakes are only messages of different streams. It knows lengths, not contents.
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
    """Messages, and their bytes as a coordinator's metrics count them, that arrived at either end."""

    up_bytes: int = 0
    down_bytes: int = 0


class Host:
    """A peer's connection to the internet, shared by its streams."""

    __slots__ = ("_down_free_us", "_down_us", "_draws", "_up_free_us", "_up_us", "blocked_until_us", "spec")

    def __init__(self, spec: LineSpec, draws: random.Random) -> None:
        self.spec = spec
        self.blocked_until_us = 0
        """End of the partition that cuts it off from the coordinator."""
        self._draws = draws
        self._up_us = 8 / spec.up_mbit
        self._down_us = 8 / spec.down_mbit
        self._up_free_us = self._down_free_us = 0.0

    def up(self, size: int, now_us: float) -> float:
        """Return when a message that the peer sends now arrives."""
        self._up_free_us = max(now_us, self._up_free_us) + self._carried(size) * self._up_us
        return self._up_free_us + self.transit_us(size, now_us)

    def down(self, size: int, sent_us: float) -> float:
        """Return when a message that leaves the coordinator at `sent_us` arrives."""
        arrived_us = max(sent_us + self.transit_us(size, sent_us), self._down_free_us)
        self._down_free_us = arrived_us + self._carried(size) * self._down_us
        return self._down_free_us

    def transit_us(self, size: int, now_us: float) -> float:
        """Draw the time between two ends: latency, jitter, retransmissions, packets overtaken, a partition's rest."""
        draws, spec = self._draws, self.spec
        transit_us = 1000 * (spec.latency_ms + draws.expovariate(1.0) * spec.jitter_ms)
        if spec.loss:
            chance = _any_of(spec.loss, size)
            wait_us = max(RETRANSMISSION_US, 4_000 * spec.latency_ms)
            for _ in range(_LOSSES_MAX):
                if draws.random() >= chance:
                    break
                transit_us += wait_us
                wait_us *= 2
        if spec.reordering and draws.random() < _any_of(spec.reordering, size):
            transit_us += draws.random() * 2_000 * spec.latency_ms
        if now_us < self.blocked_until_us:
            transit_us += self.blocked_until_us - now_us
        return transit_us

    def _carried(self, size: int) -> int:
        """Draw how many bytes the line carries for a message: a packet of it may come twice."""
        whole = size + FRAMING_BYTES
        if self.spec.duplication and self._draws.random() < _any_of(self.spec.duplication, size):
            whole += min(whole, PACKET_BYTES)
        return whole


def _any_of(chance: float, size: int) -> float:
    """Return how likely something happens to any packet of a message, if it happens to one with that chance."""
    packets = 1 + size // PACKET_BYTES
    return chance if packets == 1 else 1 - (1 - chance) ** packets


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
    is_over: bool = False
    """Whether the coordinator has heard of its end."""
    key: PeerKey | None = None
    """Who said Hello on it."""
    hello: Hello | None = None
    """What the peer said, until its proof has come."""
    last_up_us: float = field(default=0.0)
    last_down_us: float = field(default=0.0)
