"""Turns finished work into events with running figures: speeds, bytes and codes. It decides nothing."""

import time
from collections.abc import Callable

from peerturb.ids import Slot, short_hex
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb_node.compute.base import HeldOut, Measured
from peerturb_node.events import Events
from peerturb_node.link import Traffic

_VOID_BYTE = 0x80
_FEW_RECORDS = 8
"""So many are a young run's joins, or what a short outage missed: nothing to catch up with."""
_NEWS = 0.25
"""Share of the newest round in the shown speeds."""


class Progress:
    """Running figures of one process."""

    def __init__(self, events: Events, traffic: Traffic, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._traffic = traffic
        self._now_s = now_s
        self._probes_per_s = 0.0
        self._tokens_per_s = 0.0
        self._joined_s: float | None = None
        self._paused_s: float | None = None
        self._down_why: str | None = None
        self.codes_up = 0
        self.codes_down = 0

    def joined(self, *, slot: Slot, position: int, head: int, behind: int) -> None:
        """The coordinator let us in."""
        self._joined_s, self._down_why = self._now_s(), None
        self._events.bind(slot=slot)
        self._events.emit("joined", slot=slot, position=position, head=head)
        if behind:
            self._events.emit("behind", rounds=behind)

    def disconnected(self, why: str, retry_ms: int | None) -> None:
        """A session ended, or an attempt to begin one failed; the same reason twice is no news."""
        self._events.emit("disconnected", why=why, retry_ms=retry_ms, again=why == self._down_why)
        self._down_why = why

    def training(self, work: Measure) -> None:
        """Work on a round begins; the first time after joining it is news."""
        if self._joined_s is not None:
            seconds, self._joined_s = self._now_s() - self._joined_s, None
            self._events.emit("training", round=work.round, seconds=round(seconds, 3))

    def measured(self, work: Measure, result: Measured, seconds: float) -> None:
        """Probes are done."""
        if seconds > 0:
            self._probes_per_s = _smooth(self._probes_per_s, len(result.codes) / seconds)
            self._tokens_per_s = _smooth(self._tokens_per_s, result.tokens / seconds)
        self._events.emit(
            "measured",
            round=work.round,
            codes=len(result.codes),
            void=result.codes.count(_VOID_BYTE),
            loss=result.loss,
            ms=_ms(seconds),
            tokens=result.tokens,
        )

    def contributed(self, codes: int) -> None:
        """A contribution goes out."""
        self.codes_up += codes

    def received(self, sealed: RoundSealed) -> None:
        """A sealed round came in."""
        self.codes_down += len(sealed.codes)

    def applied(self, sealed: RoundSealed, digest: int | None, slot: Slot | None, seconds: float) -> None:
        """The weights have a round more."""
        self._events.bind(round=sealed.round + 1)
        self._events.emit(
            "round",
            round=sealed.round + 1,
            loss=sealed.loss,
            digest=None if digest is None else short_hex(digest),
            codes=len(sealed.codes),
            peers=len(sealed.slots),
            own=slot in sealed.slots,
            ms=_ms(seconds),
            alpha=sealed.alpha,
            probes_per_s=round(self._probes_per_s, 1),
            tokens_per_s=round(self._tokens_per_s, 1),
            bytes_up=self._traffic.up,
            bytes_down=self._traffic.down,
        )

    def paused(self, reason: str, why: str) -> None:
        """Other work has the machine."""
        self._paused_s = self._now_s()
        self._events.emit("paused", reason=reason, why=why)

    def resumed(self, why: str) -> None:
        """The machine is free again; no news to a node that does not rest."""
        if self._paused_s is not None:
            seconds, self._paused_s = self._now_s() - self._paused_s, None
            self._events.emit("resumed", why=why, seconds=round(seconds, 3))

    def evaluated(self, rounds: int, result: HeldOut, seconds: float) -> None:
        """Held-out data were looked at."""
        self._events.emit(
            "eval",
            round=rounds,
            loss=result.loss,
            accuracy=result.accuracy,
            examples=result.examples,
            ms=_ms(seconds),
        )

    def stopped(self, why: str, rounds: int, digest: bytes) -> None:
        """The end."""
        self._events.emit(
            "stop",
            why=why,
            round=rounds,
            digest=digest[:4].hex(),
            bytes_up=self._traffic.up,
            bytes_down=self._traffic.down,
            codes_up=self.codes_up,
            codes_down=self.codes_down,
        )


def coming(records: int) -> int:
    """Estimate the rounds in the part of the log that is still to come: each is an opening and a sealing."""
    return records // 2 if records > _FEW_RECORDS else 0


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + _NEWS * (new - old)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
