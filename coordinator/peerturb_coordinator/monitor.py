"""What shows a run to people and machines over HTTP: live page, health, metrics. Training goes on without it.

It puts the parts together; each of them knows only the runner that it reads.
"""

from pathlib import Path

from peerturb.wire.http import HttpServer
from peerturb.wire.metrics import new_registry, scrape_page
from peerturb_coordinator.events import Events
from peerturb_coordinator.live.history import History
from peerturb_coordinator.live.routes import LivePage
from peerturb_coordinator.live.view import View
from peerturb_coordinator.metrics import Metrics
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.watching import Watchers


class Monitor:
    """One coordinator's HTTP side.

    Args:
        address: HOST:PORT to bind.
        watchers: of the records; the page joins them here, before the log is folded.
        events: hear of what fails.
        data_dir: folder of the log.
    """

    def __init__(self, address: str, watchers: Watchers, events: Events, *, data_dir: Path) -> None:
        self._listen, self._watchers, self._data_dir = address, watchers, data_dir
        self._events = events
        self._history = History()
        watchers.add(self._history)
        self._page: LivePage | None = None
        self._server: HttpServer | None = None
        self._why_not = ""

    @property
    def address(self) -> str:
        """Where it answers; empty before `start`."""
        return "" if self._server is None else self._server.address

    async def start(self, runner: Runner, *, join: str, needs_token: bool) -> None:
        """Answer from now on.

        Args:
            runner: of the run that is shown.
            join: the command for volunteers, without the token.
            needs_token: whether that takes one.

        Raises:
            UnreachableError: the address cannot be bound.
        """

        def readiness() -> str:
            return self._why_not or (f"no round is sealed: {runner.fault}" if runner.fault else "")

        registry = new_registry()
        metrics = Metrics(registry, runner, self._history, self._data_dir)
        self._watchers.add(metrics)
        view = View(runner, self._history, join=join, needs_token=needs_token)
        self._page = LivePage(view, on_failure=lambda why: self._failed("/events", why))
        routes = [*self._page.routes, ("/metrics", scrape_page(registry))]
        self._server = HttpServer(self._listen, routes=routes, readiness=readiness, on_failure=self._failed)
        await self._server.start()

    async def stop(self) -> None:
        """Answer no more; harmless when repeated."""
        self._why_not = "the coordinator stops"
        if self._page is not None:
            await self._page.close()
        if self._server is not None:
            await self._server.stop()

    def _failed(self, path: str, error: Exception) -> None:
        self._events.error("page_failed", path=path, why=repr(error), text="training goes on", exc_info=error)
