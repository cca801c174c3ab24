"""Tells everybody who watches what has changed, once a second: server-sent events, one text for all.

A watcher that does not read is left behind and dropped: it comes back by itself and is told everything again.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from peerturb_coordinator.live.view import View

EVERY_S = 1.0
SILENT_S = 15.0
"""A comment is sent after so long without a change, so that proxies keep the line."""
WATCHERS_MAX = 200
BEHIND_MAX = 30
"""Messages that may wait for a watcher."""

_END = b""


class Broadcast:
    """The watchers of one run. It works only while somebody watches.

    Args:
        view: what is told.
        on_failure: hears why changes could not be told.
        every_s: seconds between two looks for changes.
    """

    def __init__(self, view: View, *, on_failure: Callable[[Exception], None], every_s: float = EVERY_S) -> None:
        self._view = view
        self._on_failure = on_failure
        self._every_s = every_s
        self._watchers: set[asyncio.Queue[bytes]] = set()
        self._told: dict[str, Any] = {}
        """Newest figures that were sent."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """Say whether one more watcher is too many."""
        return len(self._watchers) >= WATCHERS_MAX

    async def watch(self) -> AsyncIterator[bytes]:
        """Yield events for one watcher: everything, then changes, until it is left behind or the broadcast closes."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(BEHIND_MAX)
        self._tell()  # the others are up to date now, so that the next changes follow on everything
        queue.put_nowait(event_of("everything", self._view.everything()))
        self._watchers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._repeat(), name="live page")
        try:
            while queue in self._watchers or not queue.empty():
                try:
                    event = await asyncio.wait_for(queue.get(), SILENT_S)
                except TimeoutError:
                    event = b": nothing new\n\n"
                if event == _END:
                    return
                yield event
        finally:
            self._watchers.discard(queue)

    async def close(self) -> None:
        """Let the watchers go."""
        self._drop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _repeat(self) -> None:
        while self._watchers:
            await asyncio.sleep(self._every_s)
            try:
                self._tell()
            except Exception as error:  # a page must not end a run; its watchers come back and are told everything
                self._on_failure(error)
                self._drop()
        self._task = None

    def _tell(self) -> None:
        """Send what has changed to all watchers, if anything has."""
        changes = self._view.changes()
        now = {key: value for key, value in changes["now"].items() if key != "uptime_s"}
        if now == self._told and not any(changes[key] for key in ("timeline", "evaluations", "events", "peers")):
            return
        self._told = now
        event = event_of("changes", changes)
        for queue in list(self._watchers):
            if queue.full():
                self._watchers.discard(queue)
            else:
                queue.put_nowait(event)

    def _drop(self) -> None:
        for queue in self._watchers:
            if not queue.full():
                queue.put_nowait(_END)
        self._watchers.clear()


def event_of(name: str, document: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(document, separators=(',', ':'), allow_nan=False)}\n\n".encode()
