"""One session's stream: opens it, writes in order, reads into an inbox, counts bytes. It holds no rules.

Bytes counted are those of gRPC messages with their 5-byte prefix; HTTP/2 frames come on top (about 9 bytes each).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from peerturb.errors import PeerturbError
from peerturb.ids import Position
from peerturb.protocol.messages import FromPeer, Records, ToPeer
from peerturb.wire import WireError
from peerturb.wire.channel import open_channel
from peerturb.wire.messages import encode_from_peer, parse_to_peer
from peerturb.wire.records import RecordDecoder
from peerturb_node.client import Address, explain

_METHOD = "/peerturb.wire.v1.Coordinator/Session"
_PREFIX_BYTES = 5
_GOODBYE_S = 2.0


@dataclass(slots=True)
class Traffic:
    """Bytes since the start of the process."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp:
    """The stream stands."""

    link: "Link"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """The stream ended, or never stood."""

    link: "Link"
    why: str
    error: PeerturbError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message came."""

    link: "Link"
    message: ToPeer


LinkEvent = LinkUp | LinkDown | Received


class Link:
    """A stream that reports into `deliver`, which may wait when the node has enough to do (back-pressure).

    After `LinkDown` nothing more comes.
    """

    def __init__(self, address: Address, traffic: Traffic, deliver: Callable[[LinkEvent], Awaitable[None]]) -> None:
        self._address = address
        self._traffic = traffic
        self._deliver = deliver
        self._outbox: asyncio.Queue[FromPeer | None] = asyncio.Queue()
        self._next = Position(0)
        self._decoder = RecordDecoder()
        self._task = asyncio.create_task(self._run(), name="link")

    def expect(self, position: Position, *, sealed_rounds: int) -> None:
        """Set what the first record of the feed will be: our Hello asks for it."""
        self._next = position
        self._decoder = RecordDecoder(sealed_rounds=sealed_rounds)

    def say(self, message: FromPeer) -> None:
        """Queue a message; it is sent when the stream stands and lost if the stream ends before."""
        self._outbox.put_nowait(message)

    async def finish(self) -> None:
        """Send what is queued, half-close, and wait a moment for the other side to end the stream."""
        self._outbox.put_nowait(None)
        await asyncio.wait([self._task], timeout=_GOODBYE_S)
        await self.abort()

    async def abort(self) -> None:
        """End the stream now."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        why, error = "the coordinator closed the stream", None
        try:
            async with await open_channel(self._address.target, self._address.security) as channel:
                await self._converse(channel)
        except grpc.aio.AioRpcError as failure:
            error = explain(failure, self._address)
            why = str(error)
        except WireError as failure:
            why = f"the coordinator sent what we do not understand: {failure}"
        except PeerturbError as failure:
            why, error = str(failure), failure
        await self._deliver(LinkDown(link=self, why=why, error=error))

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(_METHOD)()
        writer = asyncio.create_task(self._write(call), name="link writer")
        try:
            await call.wait_for_connection()
            await self._deliver(LinkUp(link=self))
            async for data in call:
                self._traffic.down += len(data) + _PREFIX_BYTES
                message = parse_to_peer(data, first=self._next, decoder=self._decoder)
                if isinstance(message, Records):
                    self._next = Position(self._next + len(message.records))
                await self._deliver(Received(link=self, message=message))
        finally:
            writer.cancel()
            call.cancel()

    async def _write(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        """Write in order; a broken stream shows on the reading side."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while (message := await self._outbox.get()) is not None:
                data = encode_from_peer(message).SerializeToString()
                await call.write(data)
                self._traffic.up += len(data) + _PREFIX_BYTES
            await call.done_writing()
