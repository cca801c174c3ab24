"""The benchmark of the update measures what it says; how fast is not a test's business."""

import numpy as np
import pytest
import torch

from peerturb.manifest import DType
from peerturb.zo.update import Family
from peerturb_bench import update
from peerturb_bench.update import Case


@pytest.mark.parametrize(("family", "dtype"), [("rank1", "float32"), ("rank1", "bfloat16"), ("dense", "float32")])
def test_a_row_states_both_figures_and_their_ratio(family: Family, dtype: DType) -> None:
    row = update.measure(Case(family=family, dtype=dtype, rows=256, columns=256, probes=64), repeats=1)
    assert row.name == f"{family} {dtype} 256x256, 64 probes"
    assert row.unit == "G/s"
    assert row.reference is not None
    assert row.value > 0
    assert row.ratio == pytest.approx(row.value / row.reference, rel=0.01)


def test_both_families_are_measured_quick_or_not() -> None:
    for cases in (update.CASES, update.QUICK_CASES):
        assert {case.family for case in cases} == {"rank1", "dense"}


def test_the_loop_draws_and_adds() -> None:
    weight = torch.zeros(4, 4)
    update.draw_and_add(weight, np.array([3], np.int8), seed=1)
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(1_000_003))
    assert torch.equal(weight, torch.zeros(4, 4).add_(noise, alpha=-update.ALPHA * 3))
