"""The benchmark of the update measures what it says; how fast is not a test's business."""

from pathlib import Path

import numpy as np
import pytest
import torch

from peerturb.manifest import DType
from peerturb.zo.update import Family
from peerturb_bench import plots, update
from peerturb_bench.rows import Row
from peerturb_bench.update import Case


@pytest.mark.parametrize(("family", "dtype"), [("rank1", "float32"), ("rank1", "bfloat16"), ("dense", "float32")])
def test_a_row_states_both_figures_and_their_ratio(family: Family, dtype: DType) -> None:
    row = update.measure(Case(family=family, dtype=dtype, rows=256, columns=256, probes=64), repeats=1)
    assert row.name == f"{family} {dtype} 256x256, 64 probes"
    assert row.unit == "G/s"
    assert row.reference is not None
    assert row.value is not None
    assert row.value > 0
    assert row.ratio == pytest.approx(row.value / row.reference, rel=0.01)


def test_both_families_are_measured_quick_or_not() -> None:
    for cases in (update.CASES, update.QUICK_CASES):
        assert {case.family for case in cases} == {"rank1", "dense"}


def test_rows_are_drawn_against_the_target_of_their_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[plots.Bar]] = {}
    monkeypatch.setattr(plots, "bars", lambda path, items, **_: drawn.update({path.name: items}))
    rows = [Row(name=f"{family} x", value=1.0, unit="G/s", ratio=2.0) for family in ("rank1", "dense")]
    update.draw(rows, [Row(name="cuda rank1 x", value=1.0, unit="ms", ratio=0.5)], tmp_path)
    assert [bar.target for bar in drawn["update.png"]] == [1_000, 40]
    assert [(bar.value, bar.target) for bar in drawn["update-cuda.png"]] == [(0.5, 1)]
    drawn.clear()
    update.draw(rows, [], tmp_path)
    assert list(drawn) == ["update.png"]


def test_the_loop_draws_and_adds() -> None:
    weight = torch.zeros(4, 4)
    update.draw_and_add(weight, np.array([3], np.int8), seed=1)
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(1_000_003))
    assert torch.equal(weight, torch.zeros(4, 4).add_(noise, alpha=-update.ALPHA * 3))


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_a_whole_models_update_is_measured_against_its_limit(family: Family) -> None:
    manifest = update.llama(1, width=32, inner=48, vocabulary=40)
    weights = [torch.zeros(parameter.shape, dtype=torch.bfloat16) for parameter in manifest]
    row = update.measure_model(family, manifest, weights, repeats=1)
    assert row.name.startswith(f"cpu {family} bfloat16")
    assert row.unit == "ms"
    assert row.value is not None
    assert row.value > 0
    assert all(bool(weight.any()) for weight in weights)


def test_the_model_of_the_gpu_rows_is_a_7_b_llama() -> None:
    assert sum(parameter.elements for parameter in update.llama(update.GPU_LAYERS)) == 6_738_415_616


@pytest.mark.gpu
def test_gpu_rows() -> None:
    rows = update.gpu_rows(torch.device("cuda", 0), repeats=1)
    assert [row.name.split()[1] for row in rows] == ["rank1", "dense"]
