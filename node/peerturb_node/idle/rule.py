"""When a node gives way to other work: a pure rule from samples of the machine to a pause and back.

It reads no clock and no machine. Two thresholds and two times keep it from flapping: it pauses when others have been
busy for a while, and goes on only when they have been much less busy for a longer while.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["battery", "cpu", "card"]
"""Why a node pauses; a metric label."""

REASONS: tuple[Reason, ...] = ("battery", "card", "cpu")

_WHOLE = 0.999
"""Part of a time that samples must cover: sums of floating point seconds fall short of it by a hair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """How patient the rule is."""

    pause_percent: float = 20.0
    resume_percent: float = 10.0
    pause_s: float = 10.0
    resume_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the machine did in the last `seconds`."""

    seconds: float
    load: float
    """Percent of the card, or of all cores, that other processes used: 0 to 100."""
    where: Literal["cpu", "card"]
    on_battery: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a node should not compute now."""

    reason: Reason
    text: str
    """A sentence's part for people."""


def cause_to_rest(samples: Sequence[Sample], thresholds: Thresholds, *, is_paused: bool) -> Cause | None:
    """Return why the node should rest, None if it should compute.

    Args:
        samples: the last ones, the oldest first, without gaps.
        thresholds: how patient to be.
        is_paused: whether it rests already: then the stricter threshold holds, over the longer time.
    """
    span_s = thresholds.resume_s if is_paused else thresholds.pause_s
    recent = _last(samples, span_s)
    if not recent:
        return None
    if recent[-1].on_battery:
        return Cause(reason="battery", text="the computer runs on battery")
    if is_paused and any(sample.on_battery for sample in recent):
        return Cause(reason="battery", text=f"the computer has mains power for less than {span_s:g} s")
    covered_s = sum(sample.seconds for sample in recent)
    load = sum(sample.load * sample.seconds for sample in recent) / covered_s if covered_s else 0.0
    limit = thresholds.resume_percent if is_paused else thresholds.pause_percent
    is_busy = load > limit if is_paused else load >= limit
    if covered_s < span_s * _WHOLE:
        is_busy = is_paused  # too little is known to change anything
    where = recent[-1].where
    place = "the card" if where == "card" else "the CPU"
    return Cause(reason=where, text=f"other processes use {load:.0f} % of {place}") if is_busy else None


class Rule:
    """The rule over time.

    Attributes:
        cause: why the node rests; None while it computes.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.cause: Cause | None = None
        self._thresholds = thresholds
        self._samples: deque[Sample] = deque()

    def take(self, sample: Sample) -> bool:
        """Take in the next sample; return whether the node's state changes with it."""
        self._samples.append(sample)
        longest_s = max(self._thresholds.pause_s, self._thresholds.resume_s)
        kept = len(_last(list(self._samples), longest_s))
        while len(self._samples) > kept:
            self._samples.popleft()
        cause = cause_to_rest(list(self._samples), self._thresholds, is_paused=self.cause is not None)
        is_change = (cause is None) != (self.cause is None)
        if is_change:
            self.cause = cause
        return is_change


def _last(samples: Sequence[Sample], span_s: float) -> Sequence[Sample]:
    """Return the newest samples that cover a time, or all if they do not."""
    covered_s = 0.0
    for number in range(len(samples) - 1, -1, -1):
        covered_s += samples[number].seconds
        if covered_s >= span_s * _WHOLE:
            return samples[number:]
    return samples
