"""The paths of the live page: three files, the run as JSON, and the stream of changes."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from importlib import resources

from aiohttp import web

from peerturb.wire.http import Handler
from peerturb_coordinator.live.broadcast import Broadcast
from peerturb_coordinator.live.view import View

_FILES = {
    "/": ("index.html", "text/html"),
    "/live.css": ("live.css", "text/css"),
    "/live.js": ("live.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
}
STALL_S = 30.0
"""A watcher that takes no bytes for so long is dropped."""
RETRY_MS = 2_000
"""Pause before a browser opens a lost stream again."""


class LivePage:
    """Serves one run's page.

    Args:
        view: what is shown.
        on_failure: hears why changes could not be told.
    """

    def __init__(self, view: View, *, on_failure: Callable[[Exception], None]) -> None:
        self._view = view
        self._broadcast = Broadcast(view, on_failure=on_failure)
        folder = resources.files("peerturb_coordinator.live").joinpath("page")
        self._files = {
            path: (folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()
        }  # fmt: skip

    @property
    def routes(self) -> list[tuple[str, Handler]]:
        """Paths and handlers for an `HttpServer`."""
        return [*((path, self._file) for path in self._files), ("/run.json", self._run), ("/events", self._events)]

    async def close(self) -> None:
        """End the streams."""
        await self._broadcast.close()

    async def _file(self, request: web.Request) -> web.StreamResponse:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _run(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(
            text=json.dumps(self._view.everything(), allow_nan=False), content_type="application/json", charset="utf-8"
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response(content_type="text/event-stream")
        if self._broadcast.is_full:
            return web.Response(text="too many watch this page; try again later\n", status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        await response.write(f"retry: {RETRY_MS}\n\n".encode())
        with contextlib.suppress(ConnectionError, TimeoutError):
            async for event in self._broadcast.watch():
                async with asyncio.timeout(STALL_S):
                    await response.write(event)
        return response
