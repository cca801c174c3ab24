"""Who else hears what happens to a run: pages and metrics. A monitor that fails is told so once, and heard no more.

Watchers change nothing. They are called on the event loop, after a record is durable and before the machine folds it.
"""

from collections.abc import Callable
from typing import Protocol

from peerturb.ids import Slot
from peerturb.protocol.records import Record
from peerturb_coordinator.events import Events


class Watcher(Protocol):
    """Hears of records."""

    def hear(self, record: Record, *, now_ms: int | None, at_s: float | None, reason: str) -> None:
        """Take in the next record.

        Args:
            record: as it stands in the log.
            now_ms: the machine's clock; None for a record that an earlier process wrote.
            at_s: seconds since 1970, None likewise.
            reason: why a round is sealed, the seal rule's label; empty for other records.
        """

    def stand(self, slot: Slot, *, is_there: bool, at_s: float) -> None:
        """Hear that a member's session is lost, or stands again: of both the log has nothing.

        Args:
            slot: the member's.
            is_there: whether a session stands.
            at_s: seconds since 1970.
        """


class Watchers:
    """All watchers of one coordinator."""

    def __init__(self, events: Events) -> None:
        """Begin with none; `events` hears of those that fail."""
        self._events = events
        self._watchers: list[Watcher] = []

    def add(self, watcher: Watcher) -> None:
        """Let one more hear."""
        self._watchers.append(watcher)

    def hear(self, record: Record, *, now_ms: int | None, at_s: float | None, reason: str) -> None:
        """Tell all of them; see `Watcher`."""
        self._tell(lambda watcher: watcher.hear(record, now_ms=now_ms, at_s=at_s, reason=reason))

    def stand(self, slot: Slot, *, is_there: bool, at_s: float) -> None:
        """Tell all of them; see `Watcher`."""
        self._tell(lambda watcher: watcher.stand(slot, is_there=is_there, at_s=at_s))

    def _tell(self, say: Callable[[Watcher], None]) -> None:
        for watcher in tuple(self._watchers):
            try:
                say(watcher)
            except Exception as error:
                self._watchers.remove(watcher)
                self._events.error(
                    "monitor_failed", monitor=type(watcher).__name__, why=repr(error),
                    text="it shows nothing new until the coordinator is started again; training goes on", exc_info=True,
                )  # fmt: skip
