"""What has happened in a run, in bounded memory: a fold of its records, beside times that only this process knows.

The log has no clock. Records of an earlier process have no times; the curves begin at round 0 all the same.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peerturb.ids import Slot
from peerturb.protocol.records import Evaluated, PeerJoined, PeerLeft, Record, RoundOpened, RoundSealed, RunFinished

POINTS_MAX = 600
"""Of a curve. When it is full, neighbours are joined two by two, and from then on every point is of more rounds."""
TIMELINE_MAX = 60
"""Newest rounds that are shown one by one."""
EVENTS_MAX = 60
"""Newest events of membership."""

Row = list[Any]
"""JSON values; a place without a value is None."""


@dataclass(slots=True, kw_only=True)
class Sealed:
    """One sealed round, or several in a row as one."""

    round: int
    """The last of them."""
    loss: float | None
    """Mean of those that have one."""
    codes: float
    """Mean for a round."""
    peers: float
    """Mean for a round."""
    duration_ms: float | None
    """From opening to sealing, mean of those that this process timed."""
    reason: str = ""
    """Why it was sealed; empty for joined rounds and for those of an earlier process."""

    def row(self) -> Row:
        """Return round, loss, codes, peers, duration and reason."""
        rounded = None if self.duration_ms is None else round(self.duration_ms, 1)
        loss = None if self.loss is None else float(f"{self.loss:.6g}")
        return [self.round, loss, round(self.codes, 1), round(self.peers, 1), rounded, self.reason]


class Curve:
    """Sealed rounds from the first to the newest, at most `POINTS_MAX` points, evenly joined."""

    def __init__(self) -> None:
        self._points: list[Sealed] = []
        self._stride = 1
        self._open: list[Sealed] = []
        """Rounds of the point that is not full yet."""

    def add(self, one: Sealed) -> None:
        """Take in the next round."""
        self._open.append(one)
        if len(self._open) < self._stride:
            return
        self._points.append(_joined(self._open))
        self._open = []
        if len(self._points) >= POINTS_MAX:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_joined(pair) for pair in pairs]
            self._stride *= 2

    def rows(self) -> list[Row]:
        """Return the points, oldest first; the last may stand for fewer rounds than the others."""
        newest = [_joined(self._open)] if self._open else []
        return [point.row() for point in (*self._points, *newest)]


class History:
    """Hears of every record in the order of the log."""

    def __init__(self) -> None:
        self.curve = Curve()
        self.timeline: deque[Sealed] = deque(maxlen=TIMELINE_MAX)
        self.evaluations: list[Row] = []
        """Round, loss, accuracy, examples, slot; thinned to every other one when there are too many."""
        self.events: deque[Row] = deque(maxlen=EVENTS_MAX)
        """Seconds since 1970 or None, rounds sealed until then, what, slot, name."""
        self.rounds = 0
        """Sealed so far."""
        self.events_seen = 0
        """Events since round 0, those that are forgotten too."""
        self.evaluations_seen = 0
        """Evaluations since round 0."""
        self.codes = 0
        """In rounds that this process has sealed."""
        self.codes_sent = 0
        """The same, each counted once for every peer of its round: all of them get the round."""
        self._names: dict[Slot, str] = {}
        self._opened_ms: int | None = None

    def hear(self, record: Record, *, now_ms: int | None = None, at_s: float | None = None, reason: str = "") -> None:
        """Take in the next record.

        Args:
            record: from the log.
            now_ms: a steady clock, None for a record of an earlier process.
            at_s: seconds since 1970, None likewise.
            reason: why the round is sealed, if it is a sealed one and this is known.
        """
        match record:
            case RoundOpened():
                self._opened_ms = now_ms
            case RoundSealed():
                self._sealed(record, now_ms, reason)
            case Evaluated():
                self._evaluated(record)
            case PeerJoined(slot=slot, name=name):
                what = "came back" if slot in self._names else "joined"
                self._names[slot] = name
                self._event(at_s, what, slot, name)
            case PeerLeft(slot=slot, reason=why):
                self._event(at_s, why.name.lower().replace("_", " "), slot, self._names.get(slot, ""))
            case RunFinished():
                self._event(at_s, "the run is finished", None, "")
            case _:
                pass

    def stand(self, slot: Slot, *, is_there: bool, at_s: float) -> None:
        """Take in that a member's session is lost or stands again; see `Watcher`."""
        self._event(at_s, "is back" if is_there else "is away", slot, self._names.get(slot, ""))

    def _sealed(self, record: RoundSealed, now_ms: int | None, reason: str) -> None:
        one = Sealed(
            round=record.round,
            loss=record.loss if math.isfinite(record.loss) else None,
            codes=len(record.codes),
            peers=len(record.slots),
            duration_ms=None if now_ms is None or self._opened_ms is None else now_ms - self._opened_ms,
            reason=reason,
        )
        if now_ms is not None:
            self.codes += len(record.codes)
            self.codes_sent += len(record.codes) * len(record.slots)
        self.rounds = record.round + 1
        self.curve.add(one)
        self.timeline.append(one)

    def _evaluated(self, record: Evaluated) -> None:
        loss = float(f"{record.loss:.6g}") if math.isfinite(record.loss) else None
        self.evaluations.append([record.round, loss, record.accuracy, record.examples, record.slot])
        self.evaluations_seen += 1
        if len(self.evaluations) >= POINTS_MAX:
            del self.evaluations[1:-1:2]  # the first and the newest stay

    def _event(self, at_s: float | None, what: str, slot: Slot | None, name: str) -> None:
        self.events.append([at_s, self.rounds, what, slot, name])
        self.events_seen += 1


def _joined(points: Sequence[Sealed]) -> Sealed:
    if len(points) == 1:
        return points[0]
    return Sealed(
        round=points[-1].round,
        loss=_mean([point.loss for point in points]),
        codes=sum(point.codes for point in points) / len(points),
        peers=sum(point.peers for point in points) / len(points),
        duration_ms=_mean([point.duration_ms for point in points]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
