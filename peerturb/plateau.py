"""The plateau cut: a learning rate that follows from the losses of sealed rounds, and from nothing else.

Additions, one division and comparisons in f64 in the written order, so that coordinator, peers and `verify` get the
same bits from the same log (docs/numerics.md, section 6). It knows nothing of codes, weights or the network.
"""

import math
from dataclasses import dataclass

from peerturb.spec import StepSpec


@dataclass(slots=True, kw_only=True)
class Plateau:
    """Fold of the sealed losses.

    Consecutive windows of W rounds, the first beginning at round `warmup_rounds`. A window's mean is that of its finite
    losses; a window without any is passed over. A mean below best - threshold |best| is the new best; the
    `patience`-th one in a row that is not multiplies the rate by `factor`, not below `final_fraction`.
    """

    fraction: float = 1.0
    """What the learning rate is multiplied by in the round after the last one taken."""
    best: float | None = None
    """Mean of the best window so far."""
    worse: int = 0
    """Windows in a row, since the last cut, that were no better."""
    total: float = 0.0
    """Sum of the open window's finite losses, in the order of rounds."""
    count: int = 0
    """Number of them."""

    def take(self, step: StepSpec, round: int, loss: float) -> None:
        """Take in a sealed round; rounds come in order. Without a plateau schedule nothing happens.

        Args:
            step: the run's rules.
            round: number of the sealed round.
            loss: its loss, an f32 value; it counts if it is finite.
        """
        rule = step.plateau
        if rule is None or round < step.warmup_rounds:
            return
        if math.isfinite(loss):
            self.total += loss
            self.count += 1
        if (round - step.warmup_rounds + 1) % rule.window:
            return
        if self.count:
            mean = self.total / self.count
            if self.best is None or mean < self.best - rule.threshold * abs(self.best):
                self.best, self.worse = mean, 0
            else:
                self.worse += 1
        if self.worse == rule.patience:
            self.fraction = max(self.fraction * rule.factor, step.final_fraction)
            self.worse = 0
        self.total, self.count = 0.0, 0
