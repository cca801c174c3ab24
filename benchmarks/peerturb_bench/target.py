"""Time and forward passes to a target held-out loss: peerturb against MeZO, with backprop as the honest ceiling.

All in one process on the same threads, in turns of a second, so that a noisy machine slows all alike; evaluation does
not count. MeZO gets the learning rate that serves it best (tried on seed 0), peerturb its settings of every case. The
target is the loss that MeZO ends with, the median of its seeds. value: seconds (sequences) until peerturb is there,
median of the seeds; reference: until MeZO is; ratio: reference / value, at least 10 for the time.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from peerturb.zo.batch import Runner
from peerturb.zo.evaluate import evaluate
from peerturb.zo.model import build_manifest
from peerturb_bench.cases import SHAKESPEARE, SST2, Task, load
from peerturb_bench.learners import AdamW, Learner, Mezo, Peerturb
from peerturb_bench.rows import Row
from peerturb_bench.single import Case

SEEDS = (0, 1, 2)
BUDGET_S, TUNING_S, QUICK_S = 60.0, 20.0, 6.0
POINTS = 30
"""Evaluations in a run."""


LABELS = ("seconds of training", "sequences through the model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a run stands."""

    seconds: float
    forwards: int
    loss: float
    accuracy: float | None


@dataclass(slots=True, kw_only=True)
class Curve:
    """One run of one learner."""

    learner: str
    seed: int
    learning_rate: float
    points: list[Point] = field(default_factory=list)

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]

    def reached(self, loss: float, of: Callable[[Point], float]) -> float:
        """Return the abscissa (by `of`) at which the loss falls below `loss`, between points linearly; inf if never."""
        for before, after in pairwise(self.points):
            if after.loss <= loss < before.loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                return of(before) + part * (of(after) - of(before))
        return of(self.points[0]) if self.points[0].loss <= loss else float("inf")


Make = Callable[[], Learner]
AXES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("seconds", "s", lambda point: point.seconds),
    ("forward passes", "sequences", lambda point: point.forwards),
)


def run(quick: bool = False) -> list[Row]:
    """Measure both tasks; the curves go to `target.json` and `target.png` in the working folder."""
    rows: list[Row] = []
    curves: dict[str, list[Curve]] = {}
    for task in (SHAKESPEARE, SST2):
        found = measure(task, budget_s=QUICK_S if quick else BUDGET_S, seeds=SEEDS[:1] if quick else SEEDS)
        rows += summary(task, found)
        curves[task.name] = found
    document = {name: [asdict(curve) for curve in found] for name, found in curves.items()}
    Path("target.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _plot(curves, Path("target.png"))
    return rows


def measure(task: Task, *, budget_s: float, seeds: Sequence[int]) -> list[Curve]:
    """Return every learner's curve for every seed; MeZO's rate is tuned before."""
    case = load(task)
    tuning_s = min(TUNING_S, budget_s / 3)
    tried = [
        _train(case, "MeZO", 0, rate, lambda rate=rate: Mezo(case, seed=0, learning_rate=rate), tuning_s)  # type: ignore[misc]
        for rate in task.mezo_rates
    ]
    best = min(tried, key=lambda curve: curve.end.loss if curve.end.loss == curve.end.loss else float("inf"))
    rate = best.learning_rate
    curves = []
    for seed in seeds:
        makes: list[tuple[str, float, Make]] = [
            ("peerturb", task.learning_rate, lambda seed=seed: Peerturb(case, seed=seed, probes=task.probes)),  # type: ignore[misc]
            ("MeZO", rate, lambda seed=seed: Mezo(case, seed=seed, learning_rate=rate)),  # type: ignore[misc]
            ("AdamW", task.adamw_rate, lambda seed=seed: AdamW(case, seed=seed, learning_rate=task.adamw_rate)),  # type: ignore[misc]
        ]
        curves += [_train(case, name, seed, lr, make, budget_s) for name, lr, make in makes]
    return curves


def _train(case: Case, name: str, seed: int, rate: float, make: Make, budget_s: float) -> Curve:
    """Train for `budget_s` seconds of steps, evaluating `POINTS` times."""
    curve = Curve(learner=name, seed=seed, learning_rate=rate)
    spent_s, next_s = 0.0, 0.0
    with make() as learner:
        while True:
            if spent_s >= next_s:
                curve.points.append(_point(case, spent_s, learner.forwards))
                if spent_s >= budget_s:
                    return curve
                next_s = min(budget_s, spent_s + budget_s / POINTS)
            started_s = time.perf_counter()
            learner.step()
            spent_s += time.perf_counter() - started_s


def _point(case: Case, seconds: float, forwards: int) -> Point:
    runner = Runner(case.model, build_manifest(case.model, case.spec.model), case.objective)
    with torch.no_grad():
        found = evaluate(runner, case.heldout)
    assert found is not None  # nothing stops it
    return Point(seconds=seconds, forwards=forwards, loss=found.loss, accuracy=found.accuracy)


def summary(task: Task, curves: Sequence[Curve]) -> list[Row]:
    """Return the rows of one task."""
    of = {name: [curve for curve in curves if curve.learner == name] for name in ("peerturb", "MeZO", "AdamW")}
    target = statistics.median(curve.end.loss for curve in of["MeZO"])
    rows = []
    for what, unit, axis in AXES:
        reached = {
            name: statistics.median(curve.reached(target, axis) for curve in found) for name, found in of.items()
        }
        ours, theirs = reached["peerturb"], reached["MeZO"]
        name = f"{task.name}: {what} to MeZO's loss {target:.4f}"
        rows.append(Row(name=name, value=ours, unit=unit, reference=theirs, ratio=theirs / ours if ours else None))
        name = f"{task.name}: {what} of AdamW"
        rows.append(Row(name=name, value=reached["AdamW"], unit=unit, reference=theirs, ratio=None))
    for learner, found in of.items():
        before, ends = found[0].points[0], [curve.end for curve in found]
        name = f"{task.name}: loss at the end, {learner} (lr {found[0].learning_rate:g})"
        end = statistics.median(point.loss for point in ends)
        rows.append(Row(name=name, value=end, unit="nats", reference=before.loss, ratio=end / before.loss))
        accuracies = [point.accuracy for point in ends if point.accuracy is not None]
        if accuracies:
            name, right = f"{task.name}: accuracy at the end, {learner}", statistics.median(accuracies)
            rows.append(Row(name=name, value=right, unit="", reference=before.accuracy, ratio=None))
    return rows


def _plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw held-out loss over seconds and over forward passes, a row for each task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"peerturb": "#1b6ca8", "MeZO": "#c1432e", "AdamW": "#6b8e23"}
    figure, axes = plt.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), squeeze=False)
    for row, (task, found) in zip(axes, curves.items(), strict=True):
        for axis, of, label in (
            (row[0], "seconds", "seconds of training"),
            (row[1], "forwards", "sequences through the model"),
        ):
            for curve in found:
                axis.plot(
                    [getattr(p, of) for p in curve.points], [p.loss for p in curve.points],
                    color=colours[curve.learner], alpha=0.8, label=curve.learner if curve.seed == 0 else None,
                )  # fmt: skip
            axis.set_xlabel(label)
            axis.set_ylabel("held-out loss, nats")
            axis.set_title(task)
            axis.grid(alpha=0.25)
        row[1].set_xscale("log")
        row[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
