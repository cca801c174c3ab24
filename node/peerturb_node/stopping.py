"""What SIGINT and SIGTERM mean to a node: leave in order, end at once, or wait until something is whole on the disk.

It knows signals; how a node leaves is the node's affair.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

from peerturb_node.events import Events


class Leaving(Protocol):
    """The part of a node that signals need."""

    is_leaving: bool

    def leave(self, why: str) -> None:
        """Say goodbye and end."""


class StopSignals:
    """First signal: leave in order. Second: end at once. While `held_off`: neither, except for an impatient person."""

    def __init__(self, node: Leaving, events: Events, *, end: Callable[[int], NoReturn] = os._exit) -> None:
        """Do nothing before `install`. `end` takes the exit code."""
        self._node = node
        self._events = events
        self._end = end
        self._held_for = ""
        self._is_told = False

    def install(self) -> None:
        """Take the signals of this process, in place of whoever took them before. On the event loop's thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.on_signal, number)

    def hand_on(self, node: Leaving) -> None:
        """Serve another node from now on; a wish to stop that came too late for the last one is handed on."""
        was_leaving, self._node = self._node.is_leaving, node
        if was_leaving:
            node.leave("asked to stop while the last session was cleared away")

    @contextmanager
    def held_off(self, work: str) -> Iterator[None]:
        """Let `work` be finished whatever comes: a supervisor that asks twice shall not leave half of it behind.

        A second Ctrl-C does end it, for disks that take minutes.
        """
        # Somebody who pressed Ctrl-C before has been told to wait: the next one counts.
        self._held_for = work
        try:
            yield
        finally:
            self._held_for = ""

    def on_signal(self, number: signal.Signals) -> None:
        """Do what the signal means now."""
        if self._held_for and not (number is signal.SIGINT and self._is_told):
            self._is_told |= number is signal.SIGINT
            again = "; a second one ends it at once" if number is signal.SIGINT else ""
            text = f"{number.name}: the node ends once {self._held_for}{again}"
            self._events.emit("notice", code="stop_held_off", text=text)
        elif self._held_for or self._node.is_leaving:
            self._events.close()  # a terminal is given back even so
            self._end(128 + number)
        else:
            self._is_told = number is signal.SIGINT
            self._node.leave(f"asked to stop ({number.name})")
