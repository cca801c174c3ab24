"""When a node writes a checkpoint. The local log reaches the disk first, so it always holds the checkpoint's rounds."""

import asyncio
import contextlib
import time

from peerturb.errors import PeerturbError
from peerturb_node.compute.base import Compute
from peerturb_node.events import Events
from peerturb_node.local import LocalLog
from peerturb_node.settings import NodeSettings
from peerturb_node.worker import Worker


class Checkpoints:
    """Every so many rounds or seconds, and when leaving; at most one at a time."""

    def __init__(self, settings: NodeSettings, log: LocalLog, compute: Compute, worker: Worker, events: Events) -> None:
        self._rounds = settings.checkpoint_rounds
        self._seconds = settings.checkpoint_s
        self._log, self._compute, self._worker, self._events = log, compute, worker, events
        self._saved_rounds = compute.rounds
        self._saved_s = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def consider(self) -> None:
        """Start one if it is due and none is being written."""
        if self._task is not None:
            if not self._task.done():
                return
            self._task.result()
            self._task = None
        behind = self._compute.rounds - self._saved_rounds
        is_time = self._seconds > 0 and behind > 0 and time.monotonic() - self._saved_s >= self._seconds
        if (self._rounds and behind >= self._rounds) or is_time:
            self._saved_rounds, self._saved_s = self._compute.rounds, time.monotonic()
            self._task = asyncio.create_task(self._write(), name="checkpoint")

    async def last(self) -> None:
        """Write the state at the end, if it is not on disk yet."""
        if self._task is not None:
            await self._task
            self._task = None
        if self._compute.rounds != self._saved_rounds:
            await self._write()

    async def close(self) -> None:
        """Wait for one in progress, whatever becomes of it."""
        if self._task is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await self._task

    async def _write(self) -> None:
        path = self._log.path.with_name(self._compute.checkpoint_name)
        # Taken here, on the event loop: whatever the worker applies before it saves stands in the log by now.
        position, chain = self._log.position, self._log.chain

        def save() -> int:
            self._log.sync()
            self._compute.save(path, position=position, chain=chain)
            return self._compute.rounds

        try:
            self._saved_rounds = await self._worker.call(save)
        except (OSError, PeerturbError) as error:
            # Training can go on: without a checkpoint the next start replays more of the log.
            self._events.emit("notice", code="no_checkpoint", text=f"no checkpoint could be written: {error}")
            return
        self._events.emit("checkpoint", round=self._saved_rounds, file=str(path))
