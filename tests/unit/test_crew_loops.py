"""Loops on torch's threads make the bits that they make on one."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from peerturb.zo import fast
from peerturb.zo.directions import Probes, Span, SpanTable

pytestmark = pytest.mark.skipif(
    fast.rowwise(torch.device("cpu")) is None, reason="Numba is missing, or torch has another OpenMP"
)
CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def signs(table: SpanTable, probes: Probes, threads: int, *, columns: int) -> torch.Tensor:
    torch.set_num_threads(threads)
    assert (fast.crew_loops() is None) == (threads == 1)
    factors = (np.arange(len(probes)) * 37 % 255 - 127).astype(np.int8)
    return table.scaled_signs(probes, CPU, rows=len(probes) + 3, factors=factors, columns=columns)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("probes", [1, 2, 3, 64])
@pytest.mark.parametrize("columns", [0, 300])
def test_signs_do_not_depend_on_who_makes_them(probes: int, columns: int) -> None:
    table = SpanTable([Span(stream=5, start=3, stop=400), Span(stream=9, start=128, stop=2_000)])
    of = Probes.of(run_key=7, round=3, slots=np.arange(probes) % 3, samples=np.arange(probes))
    alone = signs(table, of, 1, columns=columns)
    assert int(alone[:probes].abs().sum()) > 0
    for count in (2, 3, 5):
        assert torch.equal(signs(table, of, count, columns=columns), alone)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("elements", [1, 2**17 - 1, 2**17, 2**18 + 5])
def test_a_subtraction_does_not_depend_on_how_it_is_shared(elements: int) -> None:
    torch.set_num_threads(3)
    loops, shared = fast.compiled(), fast.crew_loops()
    assert loops is not None
    assert shared is not None
    generator = np.random.default_rng(0)
    weights = generator.normal(size=elements).astype(np.float32)
    total = generator.integers(-(2**23), 2**23, elements, dtype=np.int32)
    alone, together = weights.copy(), weights.copy()
    loops.subtract_float32(alone, total, float(np.float32(1e-6)))
    shared.subtract_float32(together, total, float(np.float32(1e-6)))
    assert alone.tobytes() == together.tobytes() != weights.tobytes()
