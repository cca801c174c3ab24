"""The feed: the run log as ready-made stream messages, from any position on, for any number of sessions.

Catching up and following live are one path. Records near the head are kept in memory, encoded once and shared by all
sessions; older ones come from the store. It knows bytes and positions, neither peers nor rounds.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from peerturb import limits
from peerturb.ids import Position
from peerturb.wire.messages import encode_payloads
from peerturb_coordinator.store import LogStore

TAIL_BYTES_MAX = 4 * 1024 * 1024
"""Memory for the newest records, shared by all sessions: thousands of rounds of 512 codes."""
BATCH_BYTES = 64 * 1024
"""About what one message of catching up holds. Every session may have one in memory here and one in gRPC."""

assert BATCH_BYTES <= limits.RECORD_BATCH_BYTES


class Feed:
    """Hands out the log as encoded `ToPeer` messages."""

    def __init__(self, store: LogStore, *, tail_bytes_max: int = TAIL_BYTES_MAX) -> None:
        """Begin at the store's head with an empty tail."""
        self._store = store
        self._tail_bytes_max = tail_bytes_max
        self._tail: deque[bytes] = deque()
        """Frames of the records `_tail_first` .. head - 1."""
        self._tail_bytes = 0
        self._head = store.head
        self._newest = (self._head, b"")
        """Position and message of the last publication: what every session that keeps up sends next."""
        # One thread: the store lets one reader in at a time, and every thread costs memory.
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._wakers: set[Callable[[], None]] = set()

    @property
    def head(self) -> Position:
        """Number of records published."""
        return self._head

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Call `wake` after every publication."""
        self._wakers.add(wake)

    def unsubscribe(self, wake: Callable[[], None]) -> None:
        """Stop calling `wake`."""
        self._wakers.discard(wake)

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Announce records that the store has made durable."""
        frames = [_frame(payload) for payload in payloads]
        self._newest = (self._head, b"".join(frames))
        self._head = Position(self._head + len(frames))
        self._tail.extend(frames)
        self._tail_bytes += len(self._newest[1])
        while self._tail_bytes > self._tail_bytes_max and len(self._tail) > len(frames):
            self._tail_bytes -= len(self._tail.popleft())
        for wake in self._wakers:
            wake()

    def close(self) -> None:
        """Read no more from the store."""
        self._reading.shutdown(wait=True, cancel_futures=True)

    async def batch(self, cursor: Position) -> tuple[bytes, Position]:
        """Return the encoded message with the records from `cursor` on, and the cursor after it.

        Must not be called at the head. A message ends with the record that passes BATCH_BYTES.

        Raises:
            LogError: the store is damaged there.
        """
        assert cursor < self._head, "the caller waits at the head"
        first, message = self._newest
        if cursor == first:
            return message, self._head
        if cursor >= self._head - len(self._tail):
            return self._from_tail(cursor)
        loop = asyncio.get_running_loop()
        payloads = await loop.run_in_executor(self._reading, self._store.read, cursor, BATCH_BYTES)
        return encode_payloads(payloads).SerializeToString(), Position(cursor + len(payloads))

    def _from_tail(self, cursor: Position) -> tuple[bytes, Position]:
        """Join frames of the tail; one ToPeer message is the concatenation of its records' fields."""
        taken: list[bytes] = []
        size = 0
        tail_first = self._head - len(self._tail)
        for index in range(cursor - tail_first, len(self._tail)):
            taken.append(self._tail[index])
            size += len(self._tail[index])
            if size >= BATCH_BYTES:
                break
        return b"".join(taken), Position(cursor + len(taken))


def _frame(payload: bytes) -> bytes:
    """Return the message with this one record; such messages joined are the message with all their records."""
    return encode_payloads([payload]).SerializeToString()
