"""How far learners get in equal time and in equal rounds: SPSA, exact projections, MeZO, AdamW on full gradients.

All in one process on the same threads, one run after the other; evaluation does not count. A round is a step of
whatever kind. value: held-out loss; reference: of the base model. Rows "share of AdamW's gain": value is what of the
loss a learner has taken off in the whole time, reference what AdamW has in a tenth of it, ratio at least 0.8 wanted.
Rows "bytes a round": value is what a peer sends, reference four bytes for each trained parameter, ratio at most 0.01.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from peerturb.errors import DataError
from peerturb.zo.batch import Runner
from peerturb.zo.evaluate import evaluate
from peerturb.zo.model import build_manifest
from peerturb_bench import plots
from peerturb_bench.exact_learner import Exact
from peerturb_bench.learners import AdamW, Learner, Mezo, Peerturb
from peerturb_bench.learning_tasks import TASKS, LearningTask
from peerturb_bench.rows import Row
from peerturb_bench.single import Case

BUDGET_S, QUICK_S = 60.0, 3.0
POINTS, QUICK_POINTS = 20, 4
"""Evaluations in a run, besides the one before it."""
TENTH = 10
"""AdamW's gain counts after this part of the time."""
PALETTE = (plots.BLUE, "#f2b134", "#d98e04", "#7a5195", "#2a9d8f", plots.RED, plots.GREEN)

Make = Callable[[], Learner]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where a run stands."""

    seconds: float
    rounds: int
    loss: float
    accuracy: float | None


@dataclass(slots=True, kw_only=True)
class Run:
    """One learner's run."""

    learner: str
    learning_rate: float
    bytes_each: int
    """Sent by a peer in a round."""
    stands: list[Stand] = field(default_factory=list)

    def at_seconds(self, seconds: float) -> Stand:
        """Return the first stand at that time or later."""
        return next((stand for stand in self.stands if stand.seconds >= seconds), self.stands[-1])

    def at_rounds(self, rounds: int) -> Stand:
        """Return the last stand of that many rounds."""
        return [stand for stand in self.stands if stand.rounds <= rounds][-1]


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure all tasks whose data are there; curves go to `learning.json` and `learning.png` in `out`."""
    rows: list[Row] = []
    found: dict[str, list[Run]] = {}
    budget_s, points = (QUICK_S, QUICK_POINTS) if quick else (BUDGET_S, POINTS)
    for task in TASKS:
        try:
            case = task.case()
        except DataError as error:
            rows.append(Row(name=task.name, value=None, unit="", note=f"left out: {error}"))
            continue
        found[task.name] = measure(task, case, budget_s=budget_s, points=points)
        rows += summary(task.name, found[task.name], parameters=_parameters(case), budget_s=budget_s)
    if out is not None and found:
        (out / "learning.json").write_text(json.dumps(document(found), indent=1, allow_nan=False) + "\n", "utf-8")
        plots.curves(out / "learning.png", [panels(name, runs) for name, runs in found.items()])
    return rows


def measure(task: LearningTask, case: Case, *, budget_s: float, points: int, seed: int = 0) -> list[Run]:
    """Return every learner's run, one after the other from the base weights."""
    full = 4 * _parameters(case)
    arms: list[tuple[Run, Make]] = [
        (
            Run(learner=f"SPSA, {task.probes} probes", learning_rate=task.spsa_rate, bytes_each=task.probes),
            partial(_spsa, task, case, seed),
        )
    ]
    for codes, rate in task.exact_rates.items():
        make: Make = partial(
            Exact, case, seed=seed, codes=codes, examples=task.examples, learning_rate=rate, compute=task.compute
        )
        arms.append((Run(learner=f"exact, {codes:,} codes", learning_rate=rate, bytes_each=codes), make))
    codes, rate, carry = task.carried
    carrying: Make = partial(
        Exact, case, seed=seed, codes=codes, examples=task.examples, learning_rate=rate, compute=task.compute,
        carry=carry,
    )  # fmt: skip
    arms.append((Run(learner=f"exact, {codes:,} codes, carried", learning_rate=rate, bytes_each=codes), carrying))
    mezo, adamw = task.mezo_rate, task.adamw_rate
    arms.append(
        (Run(learner="MeZO", learning_rate=mezo, bytes_each=4), partial(Mezo, case, seed=seed, learning_rate=mezo))
    )
    arms.append(
        (
            Run(learner="AdamW", learning_rate=adamw, bytes_each=full),
            partial(AdamW, case, seed=seed, learning_rate=adamw),
        )
    )
    for arm, make in arms:
        Console(stderr=True).print(f"  {task.name}: {arm.learner}, lr {arm.learning_rate:g}", highlight=False)
        _train(case, arm, make, budget_s, points)
    return [arm for arm, _ in arms]


def summary(name: str, runs: list[Run], *, parameters: int, budget_s: float) -> list[Row]:
    """Return the rows of a task."""
    base, adamw = runs[0].stands[0], runs[-1]
    rounds = min(one.stands[-1].rounds for one in runs[:-2])
    ceiling = base.loss - adamw.at_seconds(budget_s / TENTH).loss
    rows = []
    for one in runs:
        end, equal = one.stands[-1], one.at_rounds(rounds)
        note = f"lr {one.learning_rate:g}, {end.rounds} rounds"
        rows.append(_row(f"{name}: loss at the end, {one.learner}", "nats", end.loss, base.loss, note))
        if end.accuracy is not None:
            rows.append(_row(f"{name}: accuracy at the end, {one.learner}", "", end.accuracy, base.accuracy, ""))
        rows.append(_row(f"{name}: loss after {rounds} rounds, {one.learner}", "nats", equal.loss, base.loss, ""))
        if one is not adamw:
            gain = base.loss - end.loss
            rows.append(_row(f"{name}: share of AdamW's gain, {one.learner}", "nats", gain, ceiling, "", is_part=True))
            full = 4.0 * parameters
            sent = float(one.bytes_each)
            rows.append(_row(f"{name}: bytes a round, {one.learner}", "B", sent, full, "", is_part=True))
    return rows


def document(found: dict[str, list[Run]]) -> dict[str, Any]:
    """Return everything as JSON can carry it: None for what is not finite."""
    return {
        name: [
            {
                "learner": one.learner, "learning_rate": one.learning_rate, "bytes_each": one.bytes_each,
                "stands": [
                    {
                        "seconds": stand.seconds, "rounds": stand.rounds, "accuracy": stand.accuracy,
                        "loss": stand.loss if math.isfinite(stand.loss) else None,
                    }
                    for stand in one.stands
                ],
            }
            for one in runs
        ]
        for name, runs in found.items()
    }  # fmt: skip


def panels(name: str, runs: list[Run]) -> list[plots.Panel]:
    """Return a task's panels: loss over time, over rounds, over bytes."""

    def lines(x: Callable[[Run, Stand], float]) -> list[plots.Line]:
        return [
            plots.Line(
                label=one.learner, colour=colour,
                xs=[x(one, stand) for stand in one.stands], ys=[stand.loss for stand in one.stands],
            )
            for one, colour in zip(runs, PALETTE, strict=False)
        ]  # fmt: skip

    axes: tuple[tuple[str, Callable[[Run, Stand], float], bool], ...] = (
        ("seconds of training", lambda one, stand: stand.seconds, False),
        ("rounds", lambda one, stand: float(stand.rounds), True),
        ("bytes sent by a peer", lambda one, stand: float(stand.rounds * one.bytes_each), True),
    )
    return [
        plots.Panel(title=name, x=label, y="held-out loss, nats", lines=lines(x), is_log=is_log)
        for label, x, is_log in axes
    ]


def _spsa(task: LearningTask, case: Case, seed: int) -> Peerturb:
    document = case.spec.model_dump(mode="json")
    document["step"] = {"rule": "normalized", "learning_rate": task.spsa_rate}
    chosen = Case(
        name=case.name, model=case.model, spec=type(case.spec).from_document(document, source="the benchmark's run"),
        objective=case.objective, parts=case.parts, heldout=case.heldout,
    )  # fmt: skip
    return Peerturb(chosen, seed=seed, probes=task.probes, compute=task.compute)


def _train(case: Case, arm: Run, make: Make, budget_s: float, points: int) -> None:
    """Train for `budget_s` seconds of steps, evaluating before, on the way, and at the end."""
    with make() as learner:
        learner.step()  # not timed: the first one loads compiled loops, and compiles them in a new checkout
    marks = sorted({budget_s / TENTH, *(budget_s * number / points for number in range(points + 1))})
    spent_s, rounds = 0.0, 0
    with make() as learner:
        while True:
            if spent_s >= marks[0]:
                arm.stands.append(_stand(case, spent_s, rounds))
                marks = [mark for mark in marks if mark > spent_s]
                if not marks:
                    return
            started_s = time.perf_counter()
            learner.step()
            spent_s += time.perf_counter() - started_s
            rounds += 1


def _stand(case: Case, seconds: float, rounds: int) -> Stand:
    runner = Runner(case.model, build_manifest(case.model, case.spec.model), case.objective)
    found = evaluate(runner, case.heldout)
    assert found is not None  # nothing stops it
    loss = found.loss if math.isfinite(found.loss) else math.inf
    return Stand(seconds=seconds, rounds=rounds, loss=loss, accuracy=found.accuracy)


def _parameters(case: Case) -> int:
    return sum(entry.elements for entry in build_manifest(case.model, case.spec.model))


def _row(name: str, unit: str, value: float, reference: float | None, note: str, *, is_part: bool = False) -> Row:
    if not math.isfinite(value):
        return Row(name=name, value=None, unit=unit, reference=reference, note="not finite")
    ratio = value / reference if is_part and reference else None
    return Row(name=name, value=value, unit=unit, reference=reference, ratio=ratio, note=note)
