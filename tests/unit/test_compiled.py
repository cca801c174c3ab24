"""Numba's loops against numpy's and torch's: the same bits, for any place, size and value."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerturb import rng
from peerturb.manifest import DType, Parameter
from peerturb.zo import fast, rounding, update
from peerturb.zo.directions import Probes, Span, SpanTable

pytest.importorskip("numba", reason="Numba is not installed")
CPU = torch.device("cpu")
WORD = st.integers(0, 2**32 - 1)


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "compiled", lambda: None)


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.tuples(WORD, st.integers(0, 10**9), st.integers(1, 700)), min_size=1, max_size=4),
    probes=st.lists(st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 65_535)), min_size=1, max_size=40),
    run_key=WORD,
    round_=WORD,
    columns=st.integers(0, 3),
    data=st.data(),
)
def test_signs_and_codes(
    spans: list[tuple[int, int, int]], probes: list[tuple[int, int]], run_key: int, round_: int, columns: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    table = SpanTable([Span(stream=stream, start=start, stop=start + size) for stream, start, size in spans])
    slots, samples = zip(*probes, strict=True)
    asked = Probes.of(run_key=run_key, round=round_, slots=slots, samples=samples)
    factors = np.array(data.draw(st.lists(st.integers(-127, 127), min_size=len(asked), max_size=len(asked))), np.int8)
    limit = min(columns * 128, table.width)
    found = table.scaled_signs(asked, CPU, rows=len(asked) + 3, factors=factors, columns=limit)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_numba(monkeypatch)
        expected = table.scaled_signs(asked, CPU, rows=len(asked) + 3, factors=factors, columns=limit)
    assert torch.equal(found, expected)


def test_a_strided_slice_of_probes_is_read_right() -> None:
    table = SpanTable([Span(stream=4, start=0, stop=300)])
    every = Probes.of(run_key=1, round=2, slots=[1, 2, 3, 4, 5, 6], samples=range(6))
    second = Probes(run_key=1, round=2, slots=every.slots[::2], samples=every.samples[::2])
    assert torch.equal(table.signs(second, CPU), table.signs(every, CPU)[::2])


def values(dtype: DType, elements: int, seed: int) -> Tensor:
    """Ordinary weights with zeros, subnormals, infinities, a NaN and the largest values among them."""
    weights = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, float("inf"), -float("inf"), 3.4e38, -3.4e38, float("nan")])
    weights[: len(special)] = special[:elements]
    return weights.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("first", "elements"), [(0, 1), (0, 9), (7, 1), (3, 512), (8, 513), (505, 5_000), (1, 8)])
@pytest.mark.parametrize("alpha", [1e-6, 0.37, 1e-44, 1e30, 2.0**64])
def test_steps_and_roundings(
    dtype: DType, first: int, elements: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha = float(np.float32(alpha))
    parameter = Parameter(index=5, name="w", shape=(first + elements + 2,), dtype=dtype, exponent=-3)
    probes = Probes.of(run_key=17, round=4, slots=[3], samples=[0])
    total = torch.from_numpy(np.random.default_rng(1).integers(-(2**24) + 1, 2**24, elements).astype(np.int32))
    found = values(dtype, first + elements + 2, elements)
    expected = found.clone()
    rounding.subtract(found, first, total, parameter, probes, alpha, 2)
    without_numba(monkeypatch)
    rounding.subtract(expected, first, total, parameter, probes, alpha, 2)
    assert bytes_of(found) == bytes_of(expected)


def bytes_of(weights: Tensor) -> bytes:
    return weights.view(torch.uint8).numpy().tobytes()


def test_no_multiplication_is_fused_into_the_subtraction() -> None:
    """Where one rounding instead of two would show: a fused result differs in about a third of such elements."""
    generator = np.random.default_rng(3)
    weights = generator.standard_normal(100_000).astype(np.float32)
    total = generator.integers(-(2**20), 2**20, len(weights)).astype(np.int32)
    scale = np.float32(1.7e-6)
    once = (weights.astype(np.float64) - total * float(scale)).astype(np.float32)
    twice = weights - total.astype(np.float32) * scale
    assert np.count_nonzero(once != twice) > 10_000
    loops = fast.compiled()
    assert loops is not None
    loops.subtract_float32(weights, total, float(scale))
    assert weights.tobytes() == twice.tobytes()


def test_rows_beyond_the_last_lane_are_left_alone() -> None:
    loops = fast.compiled()
    assert loops is not None
    eights = np.full((3, 2 * 16), 7, np.uint64)
    ones, numbers = np.ones(3, np.int8), np.arange(3, dtype=np.uint64)
    loops.fill_signs(eights, 1, 2, 1, 2, numbers[:2], numbers[:2], numbers, numbers, ones, 0, 0, 0)
    is_written = eights != 7
    assert is_written[1, 16:].all()
    assert is_written.sum() == rng.SIGNS_PER_BLOCK // 8


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize(("shape", "extreme"), [((5, 1), False), ((64, 64), True), ((90, 91), False)])
def test_dense_sums(count: int, shape: tuple[int, int], extreme: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More probes than 16 bits hold at once, an odd one left over, a group not full, the largest codes."""
    parameter = Parameter(index=2, name="w", shape=shape, dtype="float32")
    generator = np.random.default_rng(count)
    factors = (np.full(count, -127) if extreme else generator.integers(-127, 128, count)).astype(np.int8)
    probes = Probes.of(run_key=2**32 - 1, round=9, slots=np.arange(count) // 7, samples=np.arange(count) % 7)
    found = update._dense_sums(parameter, 0, probes, factors, CPU)
    without_numba(monkeypatch)
    expected = update._dense_sums(parameter, 0, probes, factors, CPU)
    assert found.dtype == expected.dtype == torch.int32
    assert torch.equal(found, expected)
