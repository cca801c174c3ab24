"""Notice that a run diverges: the sealed losses rise further above their best than their own noise explains.

A fold of losses, for operators only; nothing in the log depends on it. It knows neither weights nor who contributed.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from peerturb.protocol.outputs import Notice

DIVERGING = "diverging"
"""Code of the notice that says so."""

SCALES = ((8, 6.0, 2), (32, 4.0, 2))
"""(rounds in a window, standard errors, windows in a row): what is averaged, how far it must lie above the best window,
and how often in a row. The best is the lowest of very many, so ordinary noise reaches three errors and more; one window
alone may be an outlier, or a dip that the run leaves by itself. Long windows find a rise under much noise, later."""

RELATIVE_RISE = 0.05
"""Smallest part of the best mean that is worth a sentence, whatever the noise: less than that, a run with a slightly
large learning rate wanders all the time."""

NEWS = 0.125
"""Weight of a new window in the estimate of the noise; one window has only seven differences to tell it from."""

LOST_GAIN = 0.2
"""Smallest part of what the run had gained (first window to best) that is worth a sentence: near the end, where a loss
is almost zero, a large relative rise is still a small one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive rounds."""

    first: int
    """Number of its first round."""
    last: int
    mean: float
    """Of its finite losses; infinite if fewer than half are finite."""
    variance: float
    """Of `mean`, from the differences of neighbouring rounds, so that a steady slope does not count as noise."""


@dataclass(slots=True, kw_only=True)
class Scale:
    """Windows of one length."""

    rounds: int
    """In a window; at least 2."""
    errors: float
    streak: int
    start: Window | None = None
    best: Window | None = None
    """The window with the lowest mean."""
    last: Window | None = None
    above: int = 0
    """Windows in a row, up to the last, that lie so far above the best one."""
    variance: float = 0.0
    """Of a window's mean: smoothed over the windows so far."""
    is_rising: bool = False
    """True from the moment the rise is certain until a window lies no longer above the best."""
    _losses: list[float] = field(default_factory=list)
    _first: int = 0

    def take(self, round: int, loss: float) -> None:
        """Take in the loss of the next sealed round, which may be NaN."""
        if not self._losses:
            self._first = round
        self._losses.append(loss)
        if len(self._losses) < self.rounds:
            return
        window = _window(self._first, round, self._losses)
        self._losses = []
        self.last = window
        if math.isfinite(window.mean):
            self.variance += (NEWS if self.start else 1.0) * (window.variance - self.variance)
        self.above = self.above + 1 if self._is_above(window) else 0
        self.is_rising = self.above >= self.streak or (self.is_rising and self.above > 0)
        if math.isfinite(window.mean):
            self.start = self.start or window
            if self.best is None or window.mean < self.best.mean:
                self.best = window

    @property
    def warning(self) -> str:
        """What to tell people while the loss rises; empty otherwise."""
        best, last = self.best, self.last
        if not self.is_rising or last is None:
            return ""
        advice = (
            "the learning rate is probably too large: stop, lower step.learning_rate (`peerturb tune` looks for one), "
            "and start anew or from an earlier checkpoint"
        )
        if best is None or not math.isfinite(last.mean):
            return f"most losses of rounds {last.first}-{last.last} are not finite: {advice}"
        return (
            f"the training loss rises: {last.mean:.4g} in rounds {last.first}-{last.last}, at best {best.mean:.4g} in "
            f"rounds {best.first}-{best.last}; {advice}"
        )

    def _is_above(self, window: Window) -> bool:
        if not math.isfinite(window.mean):
            return True
        if self.best is None or self.start is None:
            return False
        # A window that is noisier than the others, for instance by an outlier, is judged by its own noise.
        variances = (max(self.variance, one.variance) for one in (self.best, window))
        noise = self.errors * math.sqrt(sum(variances))
        matters = max(RELATIVE_RISE * abs(self.best.mean), LOST_GAIN * (self.start.mean - self.best.mean))
        return window.mean - self.best.mean > max(noise, matters)


@dataclass(slots=True, kw_only=True)
class Trend:
    """State after some sealed rounds, on every scale."""

    scales: tuple[Scale, ...] = field(
        default_factory=lambda: tuple(
            Scale(rounds=rounds, errors=errors, streak=streak) for rounds, errors, streak in SCALES
        )
    )

    def take(self, round: int, loss: float) -> None:
        """Take in the loss of the next sealed round, which may be NaN."""
        for scale in self.scales:
            scale.take(round, loss)

    @property
    def is_rising(self) -> bool:
        """Whether a rise is certain on some scale."""
        return any(scale.is_rising for scale in self.scales)

    @property
    def warning(self) -> str:
        """What to tell people while the loss rises; empty otherwise."""
        return next((scale.warning for scale in self.scales if scale.is_rising), "")

    @property
    def last(self) -> Window | None:
        """The newest of the shortest windows."""
        return self.scales[0].last


def _window(first: int, last: int, losses: list[float]) -> Window:
    finite = [loss for loss in losses if math.isfinite(loss)]
    if 2 * len(finite) < len(losses) or len(finite) < 2:
        return Window(first=first, last=last, mean=math.inf, variance=0.0)
    mean = math.fsum(finite) / len(finite)
    steps = [(after - before) ** 2 for before, after in pairwise(finite)]
    variance = math.fsum(steps) / (2 * len(steps)) / len(finite)
    return Window(first=first, last=last, mean=mean, variance=variance)


class TrendNews:
    """Turns the trend into sentences for operators, each said once: when the loss begins to rise, and when it is over.

    What has passed unseen, in a log that is folded or caught up on, is not told.
    """

    def __init__(self) -> None:
        self._is_told = False

    def next(self, trend: Trend) -> Notice | None:
        """Return what has not been said yet, if there is anything."""
        if trend.is_rising == self._is_told:
            return None
        self._is_told = trend.is_rising
        if self._is_told:
            return Notice(code=DIVERGING, text=trend.warning)
        assert trend.last is not None
        where = f"{trend.last.mean:.4g} in rounds {trend.last.first}-{trend.last.last}"
        return Notice(code="recovered", text=f"the training loss no longer rises: {where}")
