"""A benchmark's result: one row per figure. It knows nothing of how a figure was measured or will be shown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure, and what it is measured against."""

    name: str
    """What was measured, for instance `rank1 4096x4096 int8`."""
    value: float | None
    """The figure in `unit`; None: there is none, and `note` says why."""
    unit: str
    """Unit of `value` and `reference`, for instance `ms` or `bytes/code`."""
    reference: float | None = None
    """The same figure for the reference (a slower method, a plain loop, a limit); None: there is none."""
    ratio: float | None = None
    """How `value` stands to `reference`, in the direction that the benchmark's description names."""
    low: float | None = None
    """Lower quartile of `ratio` over the repetitions, where there are enough of them."""
    high: float | None = None
    """Upper quartile of it."""
    note: str = ""
    """What the figures cannot say."""


def to_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list of objects, one field for each of `Row`'s.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot carry and no benchmark should report.
    """
    return json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False)
