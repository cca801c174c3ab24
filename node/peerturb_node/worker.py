"""Runs a node's work one job at a time, in order, and never on the event loop if it takes long.

A blocking compute gets one thread of its own; results come back to the event loop's thread. It knows nothing of the
protocol beyond the work's types.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.outputs import Apply, Evaluate, Measure, Rebuild, Work
from peerturb_node.compute.base import Compute, HeldOut, Measured

T = TypeVar("T")

Result = Measured | HeldOut | bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished job."""

    work: Work
    result: Result
    """`Measured`; `HeldOut`, or None without held-out data; the 32-byte digest after `Rebuild` and `Apply`, None where
    another `Apply` follows at once (the digest of weights nobody will look at is not computed)."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A job raised; the node cannot go on."""

    work: Work
    error: Exception


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work
    slot: Slot | None


class Worker:
    """One queue of jobs for one `Compute`.

    `report` is called on the event loop's thread, in the order of submission. `replay` is what `Rebuild` does after the
    weights are reset: apply the local log.
    """

    def __init__(
        self, compute: Compute, *, report: Callable[[Done | Failed], None], replay: Callable[[Compute], None]
    ) -> None:
        self._compute = compute
        self._report = report
        self._replay = replay
        self._jobs: deque[_Job] = deque()
        self._cancelled_below = 0
        self._is_closing = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute") if compute.is_blocking else None

    @property
    def backlog(self) -> int:
        """Jobs not yet begun."""
        return len(self._jobs)

    def submit(self, work: Work, *, slot: Slot | None) -> None:
        """Queue a job; `slot` is ours, needed to measure. A compute that does not block does it here and now."""
        self._jobs.append(_Job(work, slot))
        if self._thread is None:
            self._report(self._next())
        else:
            self._thread.submit(self._next_on_thread)

    def cancel(self, round: RoundNumber) -> None:
        """Stop measuring `round` and earlier ones as soon as possible; their jobs end with the codes there are."""
        self._cancelled_below = max(self._cancelled_below, round + 1)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function between two jobs and return what it returns."""
        if self._thread is None:
            return function()
        return await self._loop.run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Cancel what can be, wait for the job in progress, end the thread."""
        self._is_closing.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _next_on_thread(self) -> None:
        done = self._next()
        if not self._is_closing.is_set():
            self._loop.call_soon_threadsafe(self._report, done)

    def _next(self) -> Done | Failed:
        job = self._jobs.popleft()
        started_s = time.perf_counter()
        try:
            result = self._do(job)
        except Exception as error:
            # Whatever it is, it must reach the event loop: a silent thread is the one thing nobody could explain.
            return Failed(work=job.work, error=error)
        return Done(work=job.work, result=result, seconds=time.perf_counter() - started_s)

    def _do(self, job: _Job) -> Result:
        match job.work:
            case Apply(sealed=sealed):
                self._compute.apply(sealed)
                return None if self._is_more_to_apply() else self._compute.digest()
            case Measure(round=round_):
                assert job.slot is not None, "only members measure"
                return self._compute.measure(job.work, job.slot, lambda: self._is_cancelled(round_))
            case Evaluate():
                return self._compute.evaluate(self._is_closing.is_set)
            case Rebuild():
                self._compute.reset()
                self._replay(self._compute)
                return self._compute.digest()

    def _is_more_to_apply(self) -> bool:
        return bool(self._jobs) and isinstance(self._jobs[0].work, Apply)

    def _is_cancelled(self, round: RoundNumber) -> bool:
        return round < self._cancelled_below or self._is_closing.is_set()
