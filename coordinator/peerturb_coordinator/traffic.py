"""Bytes of the sessions' messages, as gRPC hands them over: what a page and the metrics say about the wire.

Counted are the messages and 14 bytes for each: HTTP/2's DATA header (9) and gRPC's prefix (5). Not counted: window
updates, headers of streams, what compression saves on the way down, TLS, TCP/IP. `peerturb bench wire` counts a socket.
"""

from collections import Counter

FRAMING_BYTES = 14
KINDS = {
    "up": ("hello", "proof", "contribution", "evaluation", "leave"),
    "down": ("answer", "records"),
}
"""Of messages, by direction: `answer` is a challenge, a welcome or a refusal."""


class Traffic:
    """Counters of one process."""

    def __init__(self) -> None:
        nothing = {(way, kind): 0 for way, kinds in KINDS.items() for kind in kinds}
        self.bytes: Counter[tuple[str, str]] = Counter(nothing)
        """By direction (`up` from peers, `down` to them) and kind. All begin at 0: a first one would have no rate."""
        self.messages: Counter[tuple[str, str]] = Counter(nothing)
        """Likewise."""

    def count(self, direction: str, kind: str, size: int) -> None:
        """Note a message of `size` bytes."""
        self.bytes[direction, kind] += size + FRAMING_BYTES
        self.messages[direction, kind] += 1

    def total(self, direction: str) -> int:
        """Return the bytes of all kinds."""
        return sum(size for (way, _), size in self.bytes.items() if way == direction)
