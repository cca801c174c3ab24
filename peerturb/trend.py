"""Notice that a run diverges: the sealed losses rise further above their best than their own noise explains.

A fold of losses, for operators only; nothing in the log depends on it. It knows neither weights nor who contributed.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

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
    def rise(self) -> str:
        """What is seen while the loss rises; empty otherwise."""
        best, last = self.best, self.last
        if not self.is_rising or last is None:
            return ""
        if best is None or not math.isfinite(last.mean):
            return f"most losses of rounds {last.first}-{last.last} are not finite"
        return (
            f"the training loss rises: {last.mean:.4g} in rounds {last.first}-{last.last}, at best {best.mean:.4g} in "
            f"rounds {best.first}-{best.last}"
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
        return self.rising is not None

    @property
    def rising(self) -> Scale | None:
        """The shortest scale on which a rise is certain."""
        return next((scale for scale in self.scales if scale.is_rising), None)

    @property
    def warning(self) -> str:
        """What to tell the people of a network while the loss rises; empty otherwise."""
        scale = self.rising
        if scale is None:
            return ""
        # A run with another rate is another run: no checkpoint of this one fits it, a model that it has written does.
        until = "N" if scale.best is None else str(scale.best.last + 1)
        return (
            f"{scale.rise}; the learning rate is probably too large: stop, and begin a new run with a lower "
            "step.learning_rate (`peerturb tune` looks for one), on the base model or on an earlier round's, which "
            f"`peerturb log export --until {until} --out FOLDER` writes (with --merge if an adapter is trained) and "
            "`peerturb model FOLDER` describes"
        )

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
