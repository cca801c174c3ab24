"""What does the byte cost? Rounds to the same held-out loss, with bytes against the same run with f32 scalars.

Both arms of a seed see the same perturbations and the same sequences in every round, so they differ only by what the
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
Arm = Literal["f32", "byte"]
ARMS: tuple[Arm, ...] = ("f32", "byte")


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
class Pair:
    """The held-out losses of one seed's two runs: before round 0, and then every `Plan.every` rounds."""

    byte: Curve
    f32: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its two-sided 95 % interval."""

    mean: float
    low: float
    high: float


class TargetMissedError(PeerturbError):
    """A run with bytes did not reach in all its rounds what the run with f32 scalars reached earlier."""


def run(quick: bool = False) -> list[Row]:
    """Train all seeds with both exchanges, in as many as WORKERS processes.

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
    pairs = [Pair(byte=curves[seed, "byte"], f32=curves[seed, "f32"]) for seed in range(plan.seeds)]
    return rows(plan, pairs, name=name)


def train(plan: Plan, *, seed: int, arm: Arm) -> tuple[str, Curve]:
    """Do one run, on one thread; return the case's name and the losses."""
    torch.set_num_threads(1)
    case = load_case(slots=plan.slots, heldout=plan.heldout)
    return case.name, losses(case, plan, seed=seed, arm=arm)


def losses(case: Case, plan: Plan, *, seed: int, arm: Arm) -> Curve:
    """Return the held-out loss before round 0 and after every `plan.every` rounds of one run."""
    spec = case.run_spec(seed=seed, probes_max=plan.probes)
    exchange: Exchange = ByteExchange(spec) if arm == "byte" else FloatExchange()
    with Trainer(case, exchange, spec) as trainer:
        found = [trainer.heldout_loss()]
        for number in range(1, plan.rounds + 1):
            trainer.step()
            if number % plan.every == 0:
                found.append(trainer.heldout_loss())
    return np.array(found)


def rows(plan: Plan, pairs: Sequence[Pair], *, name: str) -> list[Row]:
    """Compare the arms seed by seed: the median ratio of rounds, its spread, and the losses at the end."""
    target = max(float(smoothed(pair.f32)[plan.target_round // plan.every]) for pair in pairs)
    reached = [(_rounds(pair.byte, target, plan), _rounds(pair.f32, target, plan)) for pair in pairs]
    ratios = [byte / f32 for byte, f32 in reached]
    spread = interval([math.log(ratio) for ratio in ratios])
    ends = interval([float(pair.byte[-1] / pair.f32[-1]) - 1 for pair in pairs])
    start = float(np.median([pair.f32[0] for pair in pairs]))
    each = [
        Row(name=f"seed {seed}", value=byte, unit="rounds", reference=f32, ratio=byte / f32)
        for seed, (byte, f32) in enumerate(reached)
    ]
    byte_median, f32_median = (float(np.median(column)) for column in zip(*reached, strict=True))
    return [
        _ratio("rounds to target, median of seeds", float(np.median(ratios))),
        _ratio("rounds to target, mean of seeds", math.exp(spread.mean)),
        _ratio("rounds to target, mean, 95 % low", math.exp(spread.low)),
        _ratio("rounds to target, mean, 95 % high", math.exp(spread.high)),
        Row(
            name="byte, median", value=byte_median, unit="rounds", reference=f32_median, ratio=byte_median / f32_median
        ),
        *each,
        Row(name=f"target loss, {name}", value=target, unit="nats", reference=start, ratio=target / start),
        Row(name=f"loss after {plan.rounds} rounds, byte above f32, mean", value=100 * ends.mean, unit="%"),
        Row(name=f"loss after {plan.rounds} rounds, mean, 95 % low", value=100 * ends.low, unit="%"),
        Row(name=f"loss after {plan.rounds} rounds, mean, 95 % high", value=100 * ends.high, unit="%"),
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
