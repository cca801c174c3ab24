"""A loopback TCP relay that counts: what one node really sends and receives, HTTP/2 and gRPC framing included.

Counted are the payload bytes of the TCP connection in each direction, everything above TCP: HTTP/2 preface, settings,
headers, window updates, pings, gRPC and protobuf framing, the handshake, the records of a replay. TCP, IP and Ethernet
headers are not.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Self

_CHUNK_BYTES = 256 * 1024


@dataclass(slots=True)
class Count:
    """Bytes so far."""

    up: int = 0
    """From the node to the coordinator."""
    down: int = 0
    """From the coordinator to the node."""


class CountingRelay:
    """Listens on a free loopback port and passes every connection on to `127.0.0.1:port`."""

    def __init__(self, server: asyncio.Server, target_port: int, count: Count) -> None:
        self._server = server
        self._target_port = target_port
        self.count = count
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, target_port: int) -> Self:
        """Start listening."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            relay._connections.add(task)
            try:
                await relay._pass_on(reader, writer)
            finally:
                relay._connections.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        relay = cls(server, target_port, Count())
        return relay

    @property
    def port(self) -> int:
        """The port nodes connect to."""
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Close the port and every connection."""
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=2.0)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            # The coordinator is down: the node sees its connection end at once, as it would without a relay.
            writer.transport.abort()
            return
        up = asyncio.ensure_future(_pump(reader, far_writer, self.count, is_up=True))
        down = asyncio.ensure_future(_pump(far_reader, writer, self.count, is_up=False))
        try:
            # Either side's end is the connection's end: HTTP/2 knows no half-closed connection.
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in (up, down):
                pump.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            for end in (writer, far_writer):
                with contextlib.suppress(OSError):
                    end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Count, *, is_up: bool) -> None:
    """Copy bytes until the reader ends or either side breaks."""
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            if is_up:
                count.up += len(chunk)
            else:
                count.down += len(chunk)
            writer.write(chunk)
            await writer.drain()
    except OSError:
        return
