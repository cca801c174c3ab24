"""What does the byte cost? Rounds to the same held-out loss, with bytes against the same run with f32 scalars.

All arms of a seed see the same perturbations and the same sequences in every round, so they differ only by what the
codec does: rounding, clipping, and the scale finding its way from its initial value. It knows nothing of the network.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from peerturb.errors import PeerturbError
from peerturb_bench.rows import Row
from peerturb_bench.single import ByteExchange, Case, Exchange, FloatExchange, Trainer, load_case

LIMIT = 1.01
"""Rounds with bytes over rounds with f32 scalars: at most one per cent more."""

WORKERS = 2
"""Processes of one thread each: for a model this small faster than one process of two threads, above all on a busy
machine, and a run's figures do not depend on the number of cores."""

SMOOTHING = 3
"""Evaluations in the moving average of a loss curve."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided 95 % interval with 1, 2, ... degrees of freedom."""

Curve = NDArray[np.float64]
Arm = Literal["f32", "byte", "settled"]
"""f32 scalars; bytes as the product sends them; bytes whose scale is right from round 0 on."""
ARMS: tuple[Arm, ...] = ("f32", "byte", "settled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Size of the experiment."""

    seeds: int
    rounds: int
    """Rounds of every run."""
    target_round: int
    """The target is the loss that every f32 run has reached by this round."""
    every: int
    """Rounds between held-out evaluations."""
    slots: int = 4
    probes: int = 32
    """Probes of each slot in a round."""
    heldout: int = 256
    """Held-out sequences."""


FULL = Plan(seeds=5, rounds=80, target_round=64, every=4)
QUICK = Plan(seeds=2, rounds=16, target_round=12, every=2, probes=16, heldout=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The held-out losses of one seed's runs: before round 0, and then every `Plan.every` rounds."""

    f32: Curve
    byte: Curve
    settled: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its two-sided 95 % interval."""

    mean: float
    low: float
    high: float


class TargetMissedError(PeerturbError):
    """A run with bytes did not reach in all its rounds what the run with f32 scalars reached earlier."""


def run(quick: bool = False) -> list[Row]:
    """Train every seed in every arm, in as many as WORKERS processes.

    Raises:
        TargetMissedError: see there.
    """
    plan = QUICK if quick else FULL
    keys = [(seed, arm) for seed in range(plan.seeds) for arm in ARMS]
    curves: dict[tuple[int, Arm], Curve] = {}
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task(f"training {len(keys)} runs of {plan.rounds} rounds", total=len(keys))
        futures = {pool.submit(train, plan, seed=seed, arm=arm): (seed, arm) for seed, arm in keys}
        for future in as_completed(futures):
            name, curves[futures[future]] = future.result()
            progress.advance(task)
    runs = [
        Runs(f32=curves[seed, "f32"], byte=curves[seed, "byte"], settled=curves[seed, "settled"])
        for seed in range(plan.seeds)
    ]
    return rows(plan, runs, name=name)


def train(plan: Plan, *, seed: int, arm: Arm) -> tuple[str, Curve]:
    """Do one run, on one thread; return the case's name and the losses."""
    torch.set_num_threads(1)
    case = load_case(slots=plan.slots, heldout=plan.heldout)
    return case.name, losses(case, plan, seed=seed, arm=arm)


def losses(case: Case, plan: Plan, *, seed: int, arm: Arm) -> Curve:
    """Return the held-out loss before round 0 and after every `plan.every` rounds of one run."""
    spec = case.run_spec(seed=seed, probes_max=plan.probes)
    exchange: Exchange = FloatExchange() if arm == "f32" else ByteExchange(spec, is_settled=arm == "settled")
    with Trainer(case, exchange, spec) as trainer:
        found = [trainer.heldout_loss()]
        for number in range(1, plan.rounds + 1):
            trainer.step()
            if number % plan.every == 0:
                found.append(trainer.heldout_loss())
    return np.array(found)


def rows(plan: Plan, runs: Sequence[Runs], *, name: str) -> list[Row]:
    """Compare the arms seed by seed: the median ratio of rounds, its spread, and the losses at the end."""
    target = max(float(smoothed(run.f32)[plan.target_round // plan.every]) for run in runs)
    f32 = [_rounds(run.f32, target, plan) for run in runs]
    byte = [_rounds(run.byte, target, plan) for run in runs]
    settled = [_rounds(run.settled, target, plan) for run in runs]
    ratios = [ours / theirs for ours, theirs in zip(byte, f32, strict=True)]
    spread = interval([math.log(ratio) for ratio in ratios])
    from_settled = interval([math.log(ours / theirs) for ours, theirs in zip(settled, f32, strict=True)])
    ends = interval([100 * (float(run.byte[-1] / run.f32[-1]) - 1) for run in runs])
    start = float(np.median([run.f32[0] for run in runs]))
    return [
        _ratio("rounds to target", float(np.median(ratios))),
        _ratio("rounds to target, mean", math.exp(spread.mean)),
        _ratio("rounds to target, 95 % low", math.exp(spread.low)),
        _ratio("rounds to target, 95 % high", math.exp(spread.high)),
        _ratio("settled scale, mean", math.exp(from_settled.mean)),
        _ratio("settled scale, 95 % low", math.exp(from_settled.low)),
        _ratio("settled scale, 95 % high", math.exp(from_settled.high)),
        # Without a ratio: the medians of two arms may be different seeds.
        *(
            Row(name=f"{arm}, median", value=float(np.median(found)), unit="rounds")
            for arm, found in (("f32", f32), ("byte", byte), ("settled", settled))
        ),
        *(
            Row(name=f"seed {seed}", value=ours, unit="rounds", reference=theirs, ratio=ours / theirs)
            for seed, (ours, theirs) in enumerate(zip(byte, f32, strict=True))
        ),
        Row(name="byte's last loss above f32's", value=ends.mean, unit="%"),
        Row(name="last loss, 95 % low", value=ends.low, unit="%"),
        Row(name="last loss, 95 % high", value=ends.high, unit="%"),
        Row(name=f"target, {name}", value=target, unit="nats", reference=start, ratio=target / start),
    ]


def smoothed(curve: Curve) -> Curve:
    """Return the centred moving average over SMOOTHING evaluations, the ends as they are."""
    kernel = np.full(SMOOTHING, 1 / SMOOTHING)
    edge = SMOOTHING // 2
    smooth = curve.copy()
    smooth[edge : len(curve) - edge] = np.convolve(curve, kernel, mode="valid")
    return smooth


def rounds_to(curve: Curve, target: float, every: int) -> float | None:
    """Return the round at which the smoothed curve first comes down to the target, linear between evaluations.

    None if it never does.
    """
    smooth = smoothed(curve)
    below = np.flatnonzero(smooth <= target)
    if not below.size:
        return None
    after = int(below[0])
    if after == 0:
        return 0.0
    above, reached = float(smooth[after - 1]), float(smooth[after])
    return every * (after - 1 + (above - target) / (above - reached))


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95 % interval of a few independent values (Student's t)."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    half = float(array.std(ddof=1)) / math.sqrt(len(array)) * T_975[len(array) - 2]
    return Interval(mean=mean, low=mean - half, high=mean + half)


def _rounds(curve: Curve, target: float, plan: Plan) -> float:
    found = rounds_to(curve, target, plan.every)
    if found is None:
        raise TargetMissedError(
            f"a run with bytes ended at loss {curve[-1]:.4f} after {plan.rounds} rounds; "
            f"every run with f32 scalars was at {target:.4f} by round {plan.target_round}"
        )
    return found


def _ratio(name: str, value: float) -> Row:
    return Row(name=name, value=value, unit="x f32", reference=LIMIT, ratio=value / LIMIT)
