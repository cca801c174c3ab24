"""A small HTTP server beside a coordinator or a node: health, readiness, and pages that their program adds.

Read-only and safe to show: GET and HEAD alone, no cookies, no file that is not named here. A handler that fails answers
500 and is told to `on_failure`; nothing of it reaches what the process is there for. Connections are bounded
(`peerturb.wire.http_site`). It knows no page.
"""

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from peerturb.errors import UnreachableError
from peerturb.wire.channel import join_address, split_address
from peerturb.wire.http_site import BoundedSite

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

STOP_S = 1.0
"""Time for open answers to end when the server stops."""
HEADER_BYTES_MAX = 8 * 1024
"""Of a request's line and of each of its header fields."""

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class HttpServer:
    """Answers on one address until it is stopped.

    Args:
        address: HOST:PORT to bind; port 0 takes a free one.
        routes: path and handler of each page; `/healthz` and `/readyz` are there already.
        readiness: why the program cannot do its work now, empty if it can; called for each `/readyz`.
        on_failure: is told the path and the error of a handler that failed.
    """

    def __init__(
        self,
        address: str,
        *,
        routes: Iterable[tuple[str, Handler]] = (),
        readiness: Callable[[], str],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._listen = address
        self._readiness = readiness
        self._on_failure = on_failure
        self._app = web.Application(middlewares=[self._guarded])
        self._app.on_response_prepare.append(_secured)
        for path, handler in [("/healthz", self._health), ("/readyz", self._ready), *routes]:
            self._app.router.add_get(path, handler)
        self._runner: web.AppRunner | None = None
        self._site: BoundedSite | None = None
        self.address = ""
        """Where it answers, once started."""

    async def start(self) -> None:
        """Bind and answer from now on.

        Raises:
            UnreachableError: the address cannot be bound.
        """
        host, port = split_address(self._listen)
        runner = web.AppRunner(
            self._app, access_log=None, handle_signals=False, shutdown_timeout=STOP_S,
            max_line_size=HEADER_BYTES_MAX, max_field_size=HEADER_BYTES_MAX,
        )  # fmt: skip
        await runner.setup()
        site = BoundedSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise UnreachableError(
                f"cannot serve HTTP on {self._listen}: {error.strerror or error}; choose another --http"
            ) from error
        self._runner, self._site = runner, site
        self.address = join_address(host, site.bound_port)

    async def stop(self) -> None:
        """Answer no more; harmless when repeated."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(text="alive\n")

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        why = self._readiness()
        return web.Response(text=f"{why or 'ready'}\n", status=503 if why else 200)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        site = self._site
        if site is not None:
            site.begin(request)
        try:
            return await handler(request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as error:
            self._on_failure(request.path, error)
            return web.Response(text="this page failed; the program goes on\n", status=500)
        finally:
            if site is not None:
                site.end(request)


async def _secured(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
