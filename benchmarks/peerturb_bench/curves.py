"""Curves of training runs, and what they say about each other. It knows nothing of models or clocks."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from peerturb.manifest import DType
from peerturb_bench.rows import Row

LEARNERS = ("peerturb", "MeZO", "AdamW")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a run stands."""

    seconds: float
    """Of training, evaluation not counted."""
    forwards: int
    """Sequences through the model; a backward pass counts as two."""
    loss: float
    """Held-out, nats; infinite where training has broken the model."""
    accuracy: float | None


@dataclass(slots=True, kw_only=True)
class Curve:
    """One run of one learner, from the base weights on."""

    learner: str
    seed: int
    learning_rate: float
    compute: DType = "float32"
    """Type in which losses are computed, but for those of the points."""
    points: list[Point] = field(default_factory=list)

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]

    @property
    def best_accuracy(self) -> float | None:
        """The highest of all points."""
        return max((point.accuracy for point in self.points if point.accuracy is not None), default=None)

    def reached(self, loss: float, of: Callable[[Point], float]) -> float:
        """Return the abscissa (by `of`) at which the loss falls below `loss`, between points linearly; inf if never."""
        for before, after in pairwise(self.points):
            if after.loss <= loss < before.loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                return of(before) + part * (of(after) - of(before))
        return of(self.points[0]) if self.points[0].loss <= loss else math.inf

    def at(self, forwards: int) -> Point:
        """Return where the run stood after so many sequences, between points linearly; at most its end."""
        for before, after in pairwise(self.points):
            if before.forwards <= forwards < after.forwards:
                part = (forwards - before.forwards) / (after.forwards - before.forwards)
                return Point(
                    seconds=_between(before.seconds, after.seconds, part),
                    forwards=forwards,
                    loss=_between(before.loss, after.loss, part),
                    accuracy=None
                    if before.accuracy is None or after.accuracy is None
                    else _between(before.accuracy, after.accuracy, part),
                )
        return self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """All runs of one task."""

    tried: Sequence[Curve]
    """MeZO's runs on the first seed, with several rates, from which one was chosen."""
    curves: Sequence[Curve]

    def of(self, learner: str) -> list[Curve]:
        """Return one learner's runs."""
        return [curve for curve in self.curves if curve.learner == learner]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can carry it: None for what is not finite."""
        curves = [asdict(curve) for curve in self.curves]
        for point in (point for curve in curves for point in curve["points"]):
            point["loss"] = _finite(point["loss"])
        tried = [
            {"learning_rate": curve.learning_rate, "compute": curve.compute, "loss": _finite(curve.end.loss)}
            for curve in self.tried
        ]
        return {"tried": tried, "curves": curves}


AXES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("seconds", "s", lambda point: point.seconds),
    ("forward passes", "sequences", lambda point: point.forwards),
)


def summary(task: str, trials: Trials) -> list[Row]:
    """Return the rows of one task: to the loss that MeZO ends with, at equal forward passes, at the end, at best."""
    return [*_to_target(task, trials), *_at_equal_passes(task, trials), *_ends(task, trials)]


def _to_target(task: str, trials: Trials) -> list[Row]:
    target = statistics.median(curve.end.loss for curve in trials.of("MeZO"))
    rows = []
    for what, unit, axis in AXES:
        ours, theirs, ceiling = (
            _finite(statistics.median(curve.reached(target, axis) for curve in trials.of(learner)))
            for learner in LEARNERS
        )
        rows += [
            Row(
                name=f"{task}: {what} to MeZO's loss {target:.4f}",
                value=ours,
                unit=unit,
                reference=theirs,
                ratio=theirs / ours if ours and theirs else None,
                note="" if ours is not None else "not reached",
            ),
            Row(
                name=f"{task}: {what} of AdamW",
                value=ceiling,
                unit=unit,
                reference=theirs,
                note="" if ceiling is not None else "not reached",
            ),
        ]
    return rows


def _at_equal_passes(task: str, trials: Trials) -> list[Row]:
    """Compare peerturb with MeZO at the largest number of passes that all runs of both have behind them."""
    ours, theirs = trials.of("peerturb"), trials.of("MeZO")
    passes = min(curve.end.forwards for curve in (*ours, *theirs))
    here, there = ([curve.at(passes) for curve in curves] for curves in (ours, theirs))
    rows = [_row(f"{task}: loss after {passes:,} sequences, peerturb and MeZO", "nats", _loss(here), _loss(there))]
    accuracy = _accuracy(here)
    if accuracy is not None:
        name = f"{task}: accuracy after {passes:,} sequences, peerturb and MeZO"
        rows.append(_row(name, "", accuracy, _accuracy(there)))
    return rows


def _ends(task: str, trials: Trials) -> list[Row]:
    rows = []
    for learner in LEARNERS:
        curves = trials.of(learner)
        before, ends = curves[0].points[0], [curve.end for curve in curves]
        name = f"{task}: loss at the end, {learner} (lr {curves[0].learning_rate:g}, {curves[0].compute})"
        note = "; ".join(f"{one.learning_rate:g} {one.compute}: {one.end.loss:.4f}" for one in trials.tried)
        rows.append(_row(name, "nats", _loss(ends), before.loss, note=f"tried {note}" if learner == "MeZO" else ""))
        best = [curve.best_accuracy for curve in curves if curve.best_accuracy is not None]
        if best:
            rows.append(_row(f"{task}: accuracy at the end, {learner}", "", _accuracy(ends), before.accuracy))
            rows.append(_row(f"{task}: best accuracy, {learner}", "", statistics.median(best), before.accuracy))
    return rows


def _row(name: str, unit: str, value: float | None, reference: float | None, *, note: str = "") -> Row:
    return Row(name=name, value=value, unit=unit, reference=reference, note=note if value is not None else "not finite")


def _loss(points: Sequence[Point]) -> float | None:
    return _finite(statistics.median(point.loss for point in points))


def _accuracy(points: Sequence[Point]) -> float | None:
    known = [point.accuracy for point in points if point.accuracy is not None]
    return statistics.median(known) if known else None


def _between(before: float, after: float, part: float) -> float:
    return before + part * (after - before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
