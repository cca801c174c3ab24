"""A bound on the connections of an HTTP server, so that whoever opens many takes no file descriptors from the run.

When all places are taken, the oldest connection without a request gives way; if there is none, the new one is closed.
It knows no page.
"""

import asyncio
import resource

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

CONNECTIONS_MAX = 256
"""Open at once: those who watch the live page (200), scrapers, probes of health."""
DESCRIPTORS_SHARE = 4
"""At most one in so many of the files that the process may open."""
_BACKLOG = 32
"""Connections that are accepted in one turn of the event loop."""


def places() -> int:
    """Return how many connections this process can spare."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(1, min(CONNECTIONS_MAX, soft // DESCRIPTORS_SHARE))


class BoundedSite(web.BaseSite):
    """Accepts connections for a runner, so many at once.

    Args:
        runner: has been set up.
        host: address to bind.
        port: 0 takes a free one.
    """

    __slots__ = ("_busy", "_host", "_places", "_port", "bound_port")

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        super().__init__(runner, backlog=_BACKLOG)
        self._host, self._port = host, port
        self._busy: set[RequestHandler] = set()
        self._places = places()
        self.bound_port = port
        """Once started, the port that was taken."""

    @property
    def name(self) -> str:
        """Where it listens, as aiohttp wants to know it."""
        return f"http://{self._host}:{self.bound_port}"

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            OSError: the address cannot be bound.
        """
        await super().start()
        server = await asyncio.get_running_loop().create_server(
            self._connection, self._host, self._port, backlog=self._backlog
        )
        self._server = server
        self.bound_port = server.sockets[0].getsockname()[1]

    def begin(self, request: web.Request) -> None:
        """A request is being answered: its connection keeps its place."""
        self._busy.add(request.protocol)

    def end(self, request: web.Request) -> None:
        """It is answered."""
        self._busy.discard(request.protocol)

    def _connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None:
            return _Refused()
        taken = [one for one in server.connections if one.transport is not None]  # others are being closed
        if len(taken) >= self._places:
            resting = next((one for one in taken if one not in self._busy), None)
            if resting is None:
                return _Refused()
            resting.force_close()
        return server()


class _Refused(asyncio.Protocol):
    """A connection for which there is no place."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
