"""What each setting does to the curve of the held-out loss: rate, epsilon, probes, examples, rule, schedule.

Every arm is one run of `LocalRun`, production numerics in one process, from the same base weights; the arms of a group
differ in one thing, and send as many sequences through the model. Where that thing changes which rate is best, three
rates are tried and the best by the mean of the seeds is drawn. value: held-out loss at the end, mean of the seeds;
reference: before training; ratio: value / reference. A note says when the run itself was found to diverge.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.local import LocalRun
from peerturb.zo.model import build_manifest, trainable_weights
from peerturb_bench import plots
from peerturb_bench.byte import WORKERS
from peerturb_bench.rows import Row
from peerturb_bench.single import Case, load_case

RATE, PROBES = 1.5e-2, 64
"""The preset's rate for the model's size, and probes that it suits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """One choice of settings."""

    group: str
    label: str
    """Of what is varied; arms of one label differ in their rates only."""
    rate: float = RATE
    probes: int = PROBES
    examples: int = 1
    settings: tuple[tuple[str, str, Any], ...] = ()
    """(section, key, value) of the RunSpec beside these."""

    @property
    def sequences(self) -> int:
        """Sequences through the model in a round: two sides of every probe."""
        return 2 * self.probes * self.examples


def _rates(rule: str, rates: Sequence[float], group: str) -> list[Arm]:
    return [Arm(group=group, label=f"{rate:g}", rate=rate, settings=(("step", "rule", rule),)) for rate in rates]


def _schedule(schedule: str, rate: float) -> Arm:
    settings: tuple[tuple[str, str, Any], ...] = (("step", "schedule", schedule),)
    if schedule == "plateau":
        settings += (("step", "plateau", {"window": 10, "patience": 2}),)
    return Arm(group="schedule", label=f"{schedule}, {rate:g}", rate=rate, settings=settings)


def _sizes(group: str, probes: int, examples: int, power: float) -> list[Arm]:
    """Return arms at a rate that goes with a power of the probes, at a half, and at twice it."""
    rates = [factor * RATE * (probes / PROBES) ** power for factor in (0.5, 1, 2)]
    label = f"{probes} × {examples}"
    return [Arm(group=group, label=label, rate=rate, probes=probes, examples=examples) for rate in rates]


GROUPS = {
    "rate": "learning rate, normalized steps",
    "sgd": "learning rate, plain steps (sgd)",
    "epsilon": "epsilon",
    "probes": "probes a round × examples a probe",
    "examples": "the same, as many sequences a round",
    "schedule": "schedule and rate",
}
"""Group -> title of its panel."""

ARMS = (
    *_rates("normalized", (1.5e-3, 5e-3, 1.5e-2, 4.5e-2, 1.5e-1), "rate"),
    *_rates("sgd", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd"),
    *(
        Arm(group="epsilon", label=f"{epsilon:g}", settings=(("perturbation", "epsilon", epsilon),))
        for epsilon in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
    ),
    *(arm for probes in (16, 64, 256) for arm in _sizes("probes", probes, 1, 1.0)),
    *(arm for probes in (64, 16, 4) for arm in _sizes("examples", probes, PROBES // probes, 0.5)),
    *(_schedule(*arm) for arm in (("constant", 1.5e-2), ("linear", 1.5e-2), ("linear", 4.5e-2), ("plateau", 4.5e-2))),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Size of the experiment."""

    seeds: int
    sequences: int
    """Through the model in a run."""
    points: int
    """Evaluations in a run, but the first."""
    heldout: int
    """Sequences."""
    arms: Sequence[Arm] = ARMS


FULL = Plan(seeds=2, sequences=9_600, points=15, heldout=96)
QUICK = Plan(seeds=1, sequences=1_024, points=2, heldout=16)


@dataclass(slots=True, kw_only=True)
class Curve:
    """One run."""

    sequences: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Held-out, nats; infinite or NaN where training has broken the model."""
    alarm: int | None = None
    """First round in which the loss was said to rise."""


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Train all arms; `out` gets `tuning.json` and `tuning.png`."""
    plan = QUICK if quick else FULL
    curves = measure(plan)
    if out is not None:
        (out / "tuning.json").write_text(json.dumps(document(curves), indent=1, allow_nan=False) + "\n", "utf-8")
        draw(out / "tuning.png", curves)
    return rows(curves)


def measure(plan: Plan) -> dict[Arm, list[Curve]]:
    """Return the curves of every arm, a seed each, from as many as `WORKERS` processes."""
    curves: dict[Arm, list[Curve]] = {arm: [Curve()] * plan.seeds for arm in plan.arms}
    jobs = [(arm, seed) for arm in plan.arms for seed in range(plan.seeds)]
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task(f"training {len(jobs)} runs", total=len(jobs))
        futures = {pool.submit(train, plan, arm, seed): (arm, seed) for arm, seed in jobs}
        for future in as_completed(futures):
            arm, seed = futures[future]
            curves[arm][seed] = future.result()
            progress.advance(task)
    return curves


def train(plan: Plan, arm: Arm, seed: int) -> Curve:
    """Do one run of an arm."""
    case = _case(plan.heldout)
    rounds = max(plan.points, plan.sequences // arm.sequences)
    spec = spec_of(case, arm, rounds=rounds, seed=seed)
    manifest = build_manifest(case.model, spec.model)
    base = [weight.clone() for weight in trainable_weights(case.model, manifest).values()]
    local = LocalRun(Runner(case.model, manifest, case.objective), spec, case.parts)
    curve = Curve()
    due = [rounds * point // plan.points for point in range(plan.points + 1)]
    try:
        for number in range(rounds + 1):
            if number in due:
                curve.sequences.append(number * arm.sequences)
                curve.losses.append(local.loss(case.heldout))
            if number < rounds and local.step().warning and curve.alarm is None:
                curve.alarm = number
    finally:
        for weight, saved in zip(local.weights, base, strict=True):
            weight.copy_(saved)
    return curve


def spec_of(case: Case, arm: Arm, *, rounds: int, seed: int) -> RunSpec:
    """Return the case's spec with an arm's settings."""
    made = case.spec.model_dump(mode="json")
    made["round"].update(count=rounds, probes_max=arm.probes, budget_ms=0)
    made["objective"]["examples_per_probe"] = arm.examples
    made["step"].update(rule="normalized", learning_rate=arm.rate, schedule="constant", final_fraction=0.0)
    for section, key, value in arm.settings:
        made[section][key] = value
    return RunSpec.from_document({**made, "seed": seed}, source="the benchmark's run")


def rows(curves: Mapping[Arm, Sequence[Curve]]) -> list[Row]:
    """Return a row for each arm."""
    made = []
    for arm, runs in curves.items():
        ends, start, mean = [curve.losses[-1] for curve in runs], runs[0].losses[0], _end(runs)
        value = mean if math.isfinite(mean) else None
        alarms = [curve.alarm for curve in runs if curve.alarm is not None]
        notes = [f"seeds {', '.join(f'{end:.3f}' for end in ends)}"]
        notes += [f"said to diverge from round {', '.join(map(str, alarms))} on"] if alarms else []
        made.append(
            Row(
                name=f"{GROUPS[arm.group]}: {_label(arm)}",
                value=value,
                unit="nats",
                reference=start,
                ratio=None if value is None else value / start,
                note="; ".join(notes),
            )
        )
    return made


def draw(path: Path, curves: Mapping[Arm, Sequence[Curve]]) -> None:
    """Draw a panel for each group, an arm a colour, a seed a line."""
    panels = []
    for group, title in GROUPS.items():
        arms = best_of(curves, group)
        if not arms:
            continue
        lines = [
            plots.Line(label=_label(arm), xs=curve.sequences, ys=curve.losses, colour=plots.SHADES[index])
            for index, arm in enumerate(arms)
            for curve in curves[arm]
        ]
        # What breaks a model leaves the picture at the top; the rest is to be told apart.
        start = max(curve.losses[0] for arm in arms for curve in curves[arm])
        low = min(loss for arm in arms for curve in curves[arm] for loss in curve.losses if math.isfinite(loss))
        span = (low - 0.1, start + 0.25)
        panels.append(
            plots.Panel(title=title, x="sequences", y="held-out loss", lines=lines, has_legend=True, span=span)
        )
    plots.curves(path, [panels[:3], panels[3:]])


def best_of(curves: Mapping[Arm, Sequence[Curve]], group: str) -> list[Arm]:
    """Return a group's arms, of those with one label the one whose runs end lowest."""
    best: dict[str, Arm] = {}
    for arm in (arm for arm in curves if arm.group == group):
        rival = best.get(arm.label)
        if rival is None or _end(curves[arm]) < _end(curves[rival]):
            best[arm.label] = arm
    return list(best.values())


def _end(runs: Sequence[Curve]) -> float:
    """Return the mean loss at the end; infinite if one run broke the model."""
    ends = [curve.losses[-1] for curve in runs]
    return statistics.mean(ends) if all(map(math.isfinite, ends)) else math.inf


def _label(arm: Arm) -> str:
    return arm.label if _has_own_rate(arm) else f"{arm.label}, rate {arm.rate:.2g}"


def _has_own_rate(arm: Arm) -> bool:
    """Say whether an arm's label names its rate, or the rate is everybody's."""
    return arm.group not in ("probes", "examples")


def document(curves: Mapping[Arm, Sequence[Curve]]) -> list[dict[str, Any]]:
    """Return everything as JSON can carry it: None for what is not finite."""
    return [
        {
            "group": arm.group,
            "arm": _label(arm),
            "runs": [
                {
                    "sequences": curve.sequences,
                    "losses": [loss if math.isfinite(loss) else None for loss in curve.losses],
                    "alarm": curve.alarm,
                }
                for curve in runs
            ],
        }
        for arm, runs in curves.items()
    ]


@cache
def _case(heldout: int) -> Case:
    """Load the case once in a worker, which computes on one thread."""
    torch.set_num_threads(1)
    return load_case(slots=1, heldout=heldout)
