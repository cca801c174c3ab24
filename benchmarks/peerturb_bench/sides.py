"""One-sided probes against two-sided ones, at the same number of forward passes.

Every arm sends as many examples through the model in a round, hence in a run: two-sided n probes, each on an example of
its own, 2n; one-sided 2n / m - 1 probes and the clean loss, all on the same m examples. An arm's rates are some lengths
times the root of its probes: by the `normalized` rule the weights of all arms then move as far in a round. Each arm
takes the best of its rates by the mean over the seeds. value: held-out loss at the end, that mean; reference: that of
two-sided probes; ratio: value / reference, below 1 where one side is better. What all one-sided g have in common
(docs/numerics.md) stands below: value: mean of g at the base weights; reference: standard deviation; ratio: their size.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from peerturb.ids import RoundNumber, Slot
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.model import build_manifest
from peerturb.zo.probe import ProbeEngine
from peerturb_bench.byte import WORKERS
from peerturb_bench.rows import Row
from peerturb_bench.single import ByteExchange, Case, Trainer, load_case

EPSILONS = (1e-3, 1e-2)
"""At which the common part is measured; every run trains with the first one."""

COMMON_PROBES = 128
"""In a round, where the common part is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to spend a round's forward passes."""

    sides: Literal["two", "one"]
    probes: int
    examples: int
    """Of each probe; one-sided the same ones for all."""

    @property
    def name(self) -> str:
        """For people."""
        return (
            f"{self.sides}-sided, {self.probes} probes x {self.examples} {'own' if self.sides == 'two' else 'shared'}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Size of the experiment."""

    seeds: int
    rounds: int
    forwards: int
    """Examples through the model in a round."""
    shared: tuple[int, ...]
    """Examples that one-sided probes share, an arm for each."""
    lengths: tuple[float, ...]
    """What the root of a round's mean squared step is, in every element; each gives every arm a rate."""
    heldout: int
    """Held-out sequences."""
    common_rounds: int
    """Over which the common part is measured, each on another batch."""

    @property
    def arms(self) -> list[Arm]:
        """The two-sided arm, then the others."""
        one = [Arm(sides="one", probes=self.forwards // count - 1, examples=count) for count in self.shared]
        return [Arm(sides="two", probes=self.forwards // 2, examples=1), *one]


LENGTHS = (7.5e-4, 1.5e-3, 3e-3)
FULL = Plan(seeds=3, rounds=60, forwards=128, shared=(1, 4, 16), lengths=LENGTHS, heldout=128, common_rounds=4)
QUICK = Plan(seeds=1, rounds=8, forwards=32, shared=(1, 4), lengths=LENGTHS[2:], heldout=32, common_rounds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    arm: Arm
    length: float
    seed: int

    @property
    def rate(self) -> float:
        """Learning rate of the `normalized` rule, which moves an element by rate / root of probes."""
        return self.length * float(np.sqrt(self.arm.probes))


def run(quick: bool = False) -> list[Row]:
    """Train every arm at every rate from every seed, in as many as `WORKERS` processes."""
    plan = QUICK if quick else FULL
    jobs = [
        Job(arm=arm, length=length, seed=s) for arm in plan.arms for length in plan.lengths for s in range(plan.seeds)
    ]
    losses: dict[Job, float] = {}
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task(f"training {len(jobs)} runs of {plan.rounds} rounds", total=len(jobs))
        common = [pool.submit(common_part, plan, epsilon) for epsilon in EPSILONS]
        futures = {pool.submit(train, plan, job): job for job in jobs}
        for future in as_completed(futures):
            start, losses[futures[future]] = future.result()
            progress.advance(task)
        return [*rows(plan, losses, start=start), *(future.result() for future in common)]


def train(plan: Plan, job: Job) -> tuple[float, float]:
    """Do one run; return the held-out loss before and after it."""
    case = _case(plan.heldout)
    spec = spec_of(case, job.arm, seed=job.seed, rate=job.rate)
    with Trainer(case, ByteExchange(spec), spec) as trainer:
        before = trainer.heldout_loss()
        for _ in range(plan.rounds):
            trainer.step()
        return before, trainer.heldout_loss()


def spec_of(case: Case, arm: Arm, *, seed: int = 0, rate: float = 1e-2, epsilon: float = EPSILONS[0]) -> RunSpec:
    """Return the case's spec with an arm's probes."""
    document = case.spec.model_dump(mode="json")
    document["perturbation"].update(sides=arm.sides, epsilon=epsilon)
    document["round"]["probes_max"] = arm.probes
    document["objective"]["examples_per_probe"] = arm.examples
    document["step"]["learning_rate"] = rate
    return RunSpec.from_document({**document, "seed": seed}, source="the benchmark's run")


def common_part(plan: Plan, epsilon: float) -> Row:
    """Measure one-sided probes on batches as large as the middle arm's, at the base weights: mean and spread of g."""
    case = _case(plan.heldout)
    arm = Arm(sides="one", probes=COMMON_PROBES, examples=plan.shared[len(plan.shared) // 2])
    spec = spec_of(case, arm, epsilon=epsilon)
    runner = Runner(case.model, build_manifest(case.model, spec.model), case.objective)
    engine = ProbeEngine(runner, spec, case.parts[0])
    rounds = [engine.measure(RoundNumber(number), slot=Slot(0)) for number in range(plan.common_rounds)]
    gradients = np.concatenate([engine.projected_gradients(measured) for measured in rounds])
    mean, spread = float(gradients.mean()), float(gradients.std())
    return Row(
        name=f"common part of g, x {arm.examples} shared, epsilon {epsilon:g}",
        value=mean,
        unit="nats",
        reference=spread,
        ratio=abs(mean) / spread,
    )


def rows(plan: Plan, losses: Mapping[Job, float], *, start: float) -> list[Row]:
    """Compare the arms at their best rates, then list all that was tried.

    Args:
        losses: held-out loss at the end of every run.
        start: held-out loss before training.
    """
    best = {arm: min(plan.lengths, key=lambda length: _mean(plan, losses, arm, length)) for arm in plan.arms}
    reference = _mean(plan, losses, plan.arms[0], best[plan.arms[0]])
    compared = [_row(plan, losses, arm, length, reference) for arm, length in best.items()]
    spreads = []
    for arm, length in best.items():
        ends = _ends(plan, losses, arm, length)
        name = f"{arm.name}: largest - smallest of the seeds"
        spreads.append(Row(name=name, value=max(ends) - min(ends), unit="nats"))
    tried = [_row(plan, losses, arm, length, start, "tried: ") for arm in plan.arms for length in plan.lengths]
    return [*compared, *spreads, *tried]


def _row(plan: Plan, losses: Mapping[Job, float], arm: Arm, length: float, reference: float, prefix: str = "") -> Row:
    rate = Job(arm=arm, length=length, seed=0).rate
    value = _mean(plan, losses, arm, length)
    name = f"{prefix}{arm.name}, rate {rate:.2g}"
    return Row(name=name, value=value, unit="nats", reference=reference, ratio=value / reference)


def _ends(plan: Plan, losses: Mapping[Job, float], arm: Arm, length: float) -> Sequence[float]:
    return [losses[Job(arm=arm, length=length, seed=seed)] for seed in range(plan.seeds)]


def _mean(plan: Plan, losses: Mapping[Job, float], arm: Arm, length: float) -> float:
    return float(np.mean(_ends(plan, losses, arm, length)))


@cache
def _case(heldout: int) -> Case:
    """Load the case once in a worker, which computes on one thread."""
    torch.set_num_threads(1)
    return load_case(slots=1, heldout=heldout)
