"""Virtual time: a heap of events ordered by (time, sequence), and the random streams that follow from one seed.

It knows nothing of peers. Every purpose of every peer has a stream of its own, so one more fault changes what that
fault touches and nothing else.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any

START_US = 1_000_000
"""Time at which worlds begin: not zero, which machines could mistake for never."""


def stream(seed: int, purpose: str, index: int = 0) -> random.Random:
    """Return the random stream of a purpose, say a peer's crashes; the same arguments give the same stream."""
    return random.Random(f"peerturb sim {seed} {purpose} {index}")


def exponential_us(draws: random.Random, mean_s: float) -> int:
    """Draw a waiting time."""
    return round(draws.expovariate(1.0) * mean_s * 1e6)


class Events:
    """What will happen, and when. Equal times happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_us = START_US
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0

    @property
    def now_ms(self) -> int:
        """The time in milliseconds, as machines count it."""
        return self.now_us // 1000

    @property
    def elapsed_s(self) -> float:
        """Seconds since the world began."""
        return (self.now_us - START_US) / 1e6

    def at(self, time_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Schedule an action; a time that has passed means now."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(time_us, self.now_us), self._sequence, action, arguments))

    def after(self, delay_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Schedule an action for later."""
        self.at(self.now_us + delay_us, action, *arguments)

    def run(self, *, until_us: int, done: Callable[[], bool] = lambda: False) -> bool:
        """Let events happen until `done` comes true or the time is over; return whether it did."""
        heap = self._heap
        while not done():
            if not heap or heap[0][0] > until_us:
                self.now_us = max(self.now_us, until_us)
                return done()
            self.now_us, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
        return True
