"""Says that a run diverges, and that it no longer does: `peerturb.trend` as news for operators."""

from peerturb.protocol.outputs import Notice
from peerturb.trend import Trend

DIVERGING = "diverging"
"""Code of the notice that says so."""


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
