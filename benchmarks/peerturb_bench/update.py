"""Applying a round to one matrix, against the loop it replaces: seed a generator, draw a normal tensor, add it.

Both work in the same process, one right after the other, repeatedly, so that a noisy machine slows both alike. The
unit is 10^9 (parameter x perturbation) a second. value: peerturb, the median. reference: the generator loop, the
median; its `add_` carries the code as a factor, as the real loop must. ratio: value / reference, for `rank1` in float32
on a CPU at least 300.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from peerturb.manifest import DType, Parameter
from peerturb.zo.update import Family, apply_update
from peerturb_bench.rows import Row

ALPHA = float(np.float32(1e-6))
LOOP_DRAWS = 4
"""Perturbations one timing of the loop draws; each costs the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One matrix and how many probes a round brings."""

    family: Family
    dtype: DType
    rows: int
    columns: int
    probes: int

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.family} {self.dtype} {self.rows}x{self.columns}, {self.probes} probes"


CASES = (
    Case(family="rank1", dtype="float32", rows=1024, columns=1024, probes=512),
    Case(family="rank1", dtype="float32", rows=4096, columns=4096, probes=512),
    Case(family="rank1", dtype="float32", rows=4096, columns=4096, probes=4096),
    Case(family="rank1", dtype="bfloat16", rows=4096, columns=4096, probes=512),
    Case(family="dense", dtype="float32", rows=1024, columns=1024, probes=128),
)
QUICK_CASES = (
    Case(family="rank1", dtype="float32", rows=1024, columns=1024, probes=512),
    Case(family="dense", dtype="float32", rows=512, columns=512, probes=64),
)


def run(quick: bool = False) -> list[Row]:
    """Measure and return one row a case, `rank1 ...` and `dense ...`."""
    return [measure(case, repeats=3 if quick else 7) for case in (QUICK_CASES if quick else CASES)]


def measure(case: Case, *, repeats: int) -> Row:
    """Time both ways `repeats` times, alternating."""
    generator = np.random.default_rng(0)
    codes = np.clip(np.rint(generator.normal(0, 32, case.probes)), -127, 127).astype(np.int8)
    parameter = Parameter(index=0, name="weight", shape=(case.rows, case.columns), dtype=case.dtype)
    weight = torch.randn(parameter.shape).mul_(0.02).to(getattr(torch, case.dtype))

    def apply(round: int) -> None:
        apply_update(
            [weight], (parameter,), family=case.family, run_key=1, round=round, slots=[0], counts=[case.probes],
            codes=codes, alpha=ALPHA,
        )  # fmt: skip

    apply(0)
    draw_and_add(weight, codes[:1], 0)
    drawn = codes[:LOOP_DRAWS]
    ours, theirs = [], []
    for repeat in range(1, repeats + 1):
        ours.append(parameter.elements * case.probes / _seconds(apply, repeat))
        theirs.append(parameter.elements * len(drawn) / _seconds(partial(draw_and_add, weight, drawn), repeat))
    value, reference = statistics.median(ours) / 1e9, statistics.median(theirs) / 1e9
    figures = {"value": value, "reference": reference, "ratio": value / reference}
    return Row(name=case.name, unit="G/s", **{key: float(f"{figure:.4g}") for key, figure in figures.items()})


def draw_and_add(weight: Tensor, codes: np.typing.NDArray[np.int8], seed: int) -> None:
    """Do for each code what the generator loop does: seed, draw a normal tensor of the weight's shape, add."""
    generator = torch.Generator()
    for number, code in enumerate(codes.tolist()):
        generator.manual_seed(seed * 1_000_003 + number)
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.add_(noise, alpha=-ALPHA * code)


def _seconds(work: Callable[[int], None], argument: int) -> float:
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start
