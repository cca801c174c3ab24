"""The benchmarks of step and memory compare the same work, on models of the sizes that they claim."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb_bench import step
from peerturb_bench.shapes import GIANT, LLAMA, MINILM, STORIES3M, Shape, build
from peerturb_bench.step import Case
from tests.zo_models import one_thread

__all__ = ["one_thread"]


def _tiny(shape: Shape) -> Shape:
    return replace(shape, layers=1, width=32, inner=48, heads=2, key_value_heads=2, vocabulary=50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [LLAMA, MINILM], ids=["llama", "bert"])
def test_a_row_states_both_times_their_ratio_and_its_spread(shape: Shape, dtype: DType) -> None:
    row = step.measure(Case(shape=_tiny(shape), dtype=dtype, probes=4, tokens=6), pairs=3)
    assert row.name.startswith(f"cpu {step.SHORT[dtype]} {shape.name}, 0.0")
    assert row.name.endswith("4 probes x 6 tokens")
    assert row.value is not None
    assert row.reference is not None
    assert row.low is not None
    assert row.ratio is not None
    assert row.high is not None
    assert min(row.value, row.reference) > 0
    assert row.low <= row.ratio <= row.high


def test_pairs_change_their_order_and_every_pair_is_another_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def timed_ms(work: Callable[[], None]) -> float:
        order.append(work.__name__)
        return 2.0 if work.__name__ == "probe" else 1.0

    monkeypatch.setattr(step, "timed_ms", timed_ms)
    row = step.measure(Case(shape=_tiny(LLAMA), dtype="float32", probes=2, tokens=4), pairs=3)
    assert step.WARM_UP == 3
    assert order == ["probe", "infer", "infer", "probe"] * 3
    assert (row.value, row.reference, row.ratio) == (2.0, 1.0, 2.0)


def test_inference_reads_what_the_probes_read() -> None:
    case = Case(shape=_tiny(LLAMA), dtype="float32", probes=5, tokens=6)
    engine = step.build_engine(case)
    seen = []
    for number in (0, 1):
        batches = step.plain_batches(engine, engine.drawn(RoundNumber(number), Slot(0), case.probes))
        read = [tuple(item.tokens.tolist()) for batch in batches for item in batch]
        assert sorted(read) == sorted(tuple(item.tokens.tolist()) for item in engine.items for _ in range(2))
        assert (
            sum(len(item.tokens) for batch in batches for item in batch)
            == engine.measure(RoundNumber(number), slot=Slot(0)).tokens
        )
        seen.append(read)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("shape", "millions"), [(STORIES3M, 3.15), (MINILM, 22.7), (LLAMA, 54.7)])
def test_shapes_have_the_sizes_that_are_claimed(shape: Shape, millions: float) -> None:
    model = build(shape, "bfloat16", positions=512)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_the_issues_sizes_are_among_the_cases() -> None:
    assert {(case.shape.name, case.dtype) for case in step.CASES if 2 * case.probes * case.tokens >= 64 * 32} == {
        (shape.name, dtype) for shape in (STORIES3M, MINILM, LLAMA) for dtype in step.DTYPES
    }
    assert {case.shape for case in step.GPU_CASES} == {MINILM, LLAMA, GIANT}
