"""Time and forward passes to a target held-out loss: peerturb against MeZO, with backprop as the honest ceiling.

All in one process on the same threads, one run after the other, seed by seed; evaluation does not count. MeZO gets the
learning rate that serves it best over the whole time (tried on seed 0), and computes losses in the task's type or in
float32, whichever serves it best; peerturb (in the task's type) and AdamW (in float32) have one fixed rate for a task.
The target is the loss that MeZO ends with, the median of its seeds. value: seconds (sequences) until peerturb is there,
median of the seeds; reference: until MeZO is; ratio: reference / value, at least 10 for the time. Further rows state
loss and accuracy of peerturb (value) and MeZO (reference) after equally many sequences, the most that every run of both
has seen, then what each learner ends with (reference: the base model) and its best accuracy at any evaluation.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from peerturb.manifest import DType
from peerturb.zo.batch import Runner
from peerturb.zo.evaluate import evaluate
from peerturb.zo.model import build_manifest
from peerturb_bench import plots
from peerturb_bench.cases import MINILM, SHAKESPEARE, SST2, PackageMissingError, Task, load
from peerturb_bench.curves import AXES, LEARNERS, Curve, Point, Trials, summary
from peerturb_bench.learners import AdamW, Learner, Mezo, Peerturb
from peerturb_bench.rows import Row
from peerturb_bench.single import Case

TASKS = (SHAKESPEARE, SST2, MINILM)
SEEDS = (0, 1, 2)
BUDGET_S, QUICK_S = 60.0, 4.0
POINTS, QUICK_POINTS = 30, 4
"""Evaluations in a run, besides the one before it."""
COLOURS = dict(zip(LEARNERS, (plots.BLUE, plots.RED, plots.GREEN), strict=True))
LABELS = ("seconds of training", "sequences through the model")
"""Of `AXES`."""

Make = Callable[[], Learner]


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure all tasks whose models are there; the curves go to `target.json` and `target.png` in `out`."""
    rows: list[Row] = []
    found: dict[str, Trials] = {}
    budget_s, points = (QUICK_S, QUICK_POINTS) if quick else (BUDGET_S, POINTS)
    for task in TASKS:
        try:
            case = load(task)
        except PackageMissingError as error:
            rows.append(Row(name=task.name, value=None, unit="", note=f"left out: {error}"))
            continue
        found[task.name] = measure(
            task, case, budget_s=budget_s, points=points, seeds=SEEDS[:1] if quick else SEEDS, say=_say
        )
        rows += summary(task.name, found[task.name])
    if out is not None and found:
        text = json.dumps({name: trials.document() for name, trials in found.items()}, indent=1, allow_nan=False)
        (out / "target.json").write_text(text + "\n", encoding="utf-8")
        plots.curves(out / "target.png", [panels(name, trials) for name, trials in found.items()])
    return rows


def measure(
    task: Task,
    case: Case,
    *,
    budget_s: float,
    points: int,
    seeds: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> Trials:
    """Return every learner's curve for every seed; MeZO's rate and type are those with which its first ends lowest.

    Args:
        budget_s: seconds of steps of each run.
        points: evaluations in a run.
        say: is told what begins.
    """

    def train(learner: str, seed: int, rate: float, compute: DType, make: Make) -> Curve:
        say(f"{task.name}: {learner}, lr {rate:g}, {compute}, seed {seed}")
        return _train(
            case, Curve(learner=learner, seed=seed, learning_rate=rate, compute=compute), make, budget_s, points
        )

    def mezo(seed: int, rate: float, compute: DType) -> Curve:
        make = partial(Mezo, case, seed=seed, learning_rate=rate, compute=compute)
        return train("MeZO", seed, rate, compute, make)

    def peerturb(seed: int) -> Curve:
        make = partial(Peerturb, case, seed=seed, probes=task.probes, compute=task.compute)
        return train("peerturb", seed, task.learning_rate, task.compute, make)

    def adamw(seed: int) -> Curve:
        rate = task.adamw_rate
        return train("AdamW", seed, rate, "float32", partial(AdamW, case, seed=seed, learning_rate=rate))

    tried = [mezo(seeds[0], rate, task.compute) for rate in task.mezo_rates]
    best = _best(tried)
    if task.compute != "float32":
        tried.append(mezo(seeds[0], best.learning_rate, "float32"))
        best = _best(tried)
    curves: list[Curve] = []
    for seed in seeds:
        theirs = best if seed == seeds[0] else mezo(seed, best.learning_rate, best.compute)
        curves += [peerturb(seed), theirs, adamw(seed)]
    return Trials(tried=tried, curves=curves)


def _best(curves: Sequence[Curve]) -> Curve:
    return min(curves, key=lambda curve: curve.end.loss)


def panels(name: str, trials: Trials) -> list[plots.Panel]:
    """Return the panels of one task: loss over time and sequences, and accuracy where there is one."""

    def lines(x: Callable[[Point], float], y: Callable[[Point], float]) -> list[plots.Line]:
        return [
            plots.Line(
                label=curve.learner,
                xs=[x(point) for point in curve.points],
                ys=[y(point) for point in curve.points],
                colour=COLOURS[curve.learner],
            )
            for curve in trials.curves
        ]

    (_, _, seconds), (_, _, forwards) = AXES
    losses = lines(seconds, lambda point: point.loss), lines(forwards, lambda point: point.loss)
    drawn = [
        plots.Panel(title=name, x=LABELS[0], y="held-out loss, nats", lines=losses[0]),
        plots.Panel(title=name, x=LABELS[1], y="held-out loss, nats", lines=losses[1], is_log=True),
    ]
    if trials.curves[0].best_accuracy is not None:
        found = lines(forwards, lambda point: math.nan if point.accuracy is None else point.accuracy)
        drawn.append(plots.Panel(title=name, x=LABELS[1], y="held-out accuracy", lines=found, is_log=True))
    return drawn


def _train(case: Case, curve: Curve, make: Make, budget_s: float, points: int) -> Curve:
    """Train for `budget_s` seconds of steps or to the schedule's end, evaluating before, on the way, and at the end.

    Args:
        points: evaluations on the way in the whole budget.
    """
    with make() as learner:
        learner.step()  # not timed: the first one loads compiled loops, and compiles them in a new checkout
    spent_s, next_s = 0.0, 0.0
    with make() as learner:
        while True:
            if spent_s >= next_s or learner.is_finished:
                curve.points.append(_point(case, spent_s, learner.forwards))
                if spent_s >= budget_s or learner.is_finished:
                    return curve
                next_s = min(budget_s, spent_s + budget_s / points)
            started_s = time.perf_counter()
            learner.step()
            spent_s += time.perf_counter() - started_s


def _point(case: Case, seconds: float, forwards: int) -> Point:
    runner = Runner(case.model, build_manifest(case.model, case.spec.model), case.objective)
    found = evaluate(runner, case.heldout)
    assert found is not None  # nothing stops it
    loss = found.loss if math.isfinite(found.loss) else math.inf
    return Point(seconds=seconds, forwards=forwards, loss=loss, accuracy=found.accuracy)


def _say(line: str) -> None:
    Console(stderr=True).print(f"  {line}", markup=False, highlight=False)
