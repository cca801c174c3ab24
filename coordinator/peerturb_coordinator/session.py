"""One peer's stream, outgoing side: messages for this peer, then the log from the peer's position on, for ever.

Memory per session is bounded: at most one batch is being written, and the rest of the log waits where it is kept. It
knows no rules; the runner tells it what to say.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, Slot
from peerturb.protocol.messages import Refusal, ToPeer, Welcome
from peerturb.protocol.outputs import SessionId
from peerturb.wire.messages import encode_to_peer
from peerturb_coordinator.feed import Feed
from peerturb_coordinator.traffic import Traffic

OUTBOX_MESSAGES_MAX = 64
"""Answers a peer may leave unread; who provokes more refusals without reading them is cut off."""

Write = Callable[[bytes], Awaitable[None]]


class Session:
    """A stream and what is still to be sent on it."""

    def __init__(
        self, session: SessionId, feed: Feed, write: Write, *, traffic: Traffic, stall_timeout_s: float
    ) -> None:
        """Begin with nothing to say; records flow from the `Welcome` on. What is written counts in `traffic`."""
        self.id = session
        self.position = Position(0)
        """Records the peer had when it said Hello."""
        self.key: PeerKey | None = None
        """The identity, once the session is admitted."""
        self.slot: Slot | None = None
        """The peer's, once it is a member."""
        self.cut_why = ""
        """Why the stream was cut off; empty if it was not."""
        self._feed = feed
        self._write = write
        self._traffic = traffic
        self._stall_timeout_s = stall_timeout_s
        self._outbox: deque[bytes] = deque()
        self._cursor: Position | None = None
        self._is_closing = False
        self._wake = asyncio.Event()
        self._patience = asyncio.Timeout(None)

    @property
    def is_closing(self) -> bool:
        """Say whether the stream ends once what was said is written."""
        return self._is_closing

    @property
    def lag(self) -> int:
        """Records that are published and not yet handed to this stream."""
        return 0 if self._cursor is None else self._feed.head - self._cursor

    def send(self, message: ToPeer) -> None:
        """Queue a message. A `Welcome` also starts the feed."""
        if self._is_closing:
            return
        if isinstance(message, Welcome):
            self._cursor, self.slot = self.position, message.slot
        self._outbox.append(encode_to_peer(message).SerializeToString())
        if len(self._outbox) > OUTBOX_MESSAGES_MAX:
            self.close()
        self._wake.set()

    def refuse(self, code: RejectCode, why: str, *, closes: bool) -> None:
        """Queue a refusal; with `closes` it is the last message."""
        self.send(Refusal(code=code, why=why, closes=closes))
        if closes:
            self.close()

    def close(self) -> None:
        """End the stream after what is queued; harmless when repeated."""
        self._is_closing = True
        self._wake.set()

    def cut(self, why: str) -> None:
        """End the stream at once, whether or not the peer reads; what is queued is lost. Only while `pump` runs."""
        self.cut_why = why
        self.close()
        self._patience.reschedule(0)

    async def pump(self) -> None:
        """Write until the session closes. Called once.

        Raises:
            TimeoutError: the peer took nothing for `stall_timeout_s`, or the stream was cut off.
            LogError: the store is damaged where the peer reads.
        """
        wake, feed, outbox = self._wake, self._feed, self._outbox
        feed.subscribe(wake.set)
        try:
            async with self._patience:
                while True:
                    if self.cut_why:
                        raise TimeoutError(self.cut_why)
                    if outbox:
                        await self._write_in_time(outbox.popleft(), "answer")
                    elif self._is_closing:
                        return
                    elif self._cursor is not None and self._cursor < feed.head:
                        message, self._cursor = await feed.batch(self._cursor)
                        await self._write_in_time(message, "records")
                    else:
                        wake.clear()
                        await wake.wait()
        finally:
            feed.unsubscribe(wake.set)

    async def _write_in_time(self, message: bytes, kind: str) -> None:
        async with asyncio.timeout(self._stall_timeout_s):
            await self._write(message)
        self._traffic.count("down", kind, len(message))
