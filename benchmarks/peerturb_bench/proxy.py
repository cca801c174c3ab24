"""A TCP proxy that counts: what a node and a coordinator really put on their sockets, all framing included.

It knows bytes and directions, nothing of gRPC. Above TCP: headers of TCP and IP are not counted.
"""

import asyncio
import contextlib
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024


class CountingProxy:
    """Listens on loopback and passes everything on to `host`:`port`."""

    def __init__(self, host: str, port: int) -> None:
        """Name the server behind the proxy; `async with` opens it."""
        self.up_bytes = 0
        """From clients to the server, all connections together."""
        self.down_bytes = 0
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """HOST:PORT for clients."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut every connection."""
        assert self._server is not None
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer, is_up=True))
                group.create_task(self._pass(far_reader, writer, is_up=False))
        except* (OSError, asyncio.CancelledError):
            pass  # one side went away: so does the other
        finally:
            writer.close()
            self._pipes.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                if is_up:
                    self.up_bytes += len(chunk)
                else:
                    self.down_bytes += len(chunk)
                writer.write(chunk)
                await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
