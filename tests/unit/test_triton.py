"""The CUDA kernels' logic against the reference, interpreted on a CPU: the same bits. What a card does: tests/gpu."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from peerturb.manifest import DType, Parameter
from peerturb.rng import I8
from peerturb.zo import directions, fast, plan, rounding, update
from peerturb.zo.digest import run_digest, tensor_digest
from peerturb.zo.directions import Probes, Span, SpanTable
from peerturb.zo.update import Family, apply_update
from tests.rowwise_checks import NORMS, check_affine, check_linear
from tests.triton_interpreter import interpreted as interpreted  # a fixture
from tests.zo_models import one_thread as one_thread  # the same

pytest.importorskip("triton", reason="Triton is not installed")
from peerturb.zo.cuda import rowwise

CPU = torch.device("cpu")
DTYPES_OF_ROWS = [torch.float32, torch.float16]
"""The interpreter cuts bf16 off instead of rounding it: tests/gpu has that."""
SHAPES_OF_ROWS = [(1, 2, 1, 1), (3, 10, 77, 45), (1, 18, 600, 520)]
SHAPES: list[tuple[tuple[int, ...], bool]] = [
    ((), False),
    ((0, 5), False),
    ((4097,), False),
    ((1, 1), False),
    ((1, 300), False),
    ((300, 1), False),
    ((130, 77), False),
    ((3, 65, 5), True),
    ((2, 9, 16), True),
    ((4, 3, 2, 2), False),
    ((72, 136), False),
]


def manifest_of(dtype: DType) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(index=i, name=f"t{i}", shape=shape, dtype=dtype, exponent=i % 3 - 1, is_stack=is_stack)
        for i, (shape, is_stack) in enumerate(SHAPES)
    )


def weights_of(manifest: tuple[Parameter, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(p.shape, generator=generator).sub_(0.5).to(getattr(torch, p.dtype)) for p in manifest]


def codes_of(probes: int) -> I8:
    return np.random.default_rng(probes).integers(-128, 128, probes).astype(np.int8)


def apply(weights: list[Tensor], dtype: DType, family: Family, codes: I8, alpha: float = 1e-4) -> None:
    half = len(codes) // 2
    slots, counts = ([3, 2**32 - 2], [len(codes) - half, half]) if half else ([3], [len(codes)])
    apply_update(
        weights, manifest_of(dtype), family=family, run_key=0xFEDC_BA98, round=2**32 - 1, slots=slots, counts=counts,
        codes=codes, alpha=float(np.float32(alpha)),
    )  # fmt: skip


@pytest.mark.parametrize("probes", [1, 37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_updates_and_digests(family: Family, dtype: DType, probes: int, request: pytest.FixtureRequest) -> None:
    expected, found = (weights_of(manifest_of(dtype)) for _ in range(2))
    apply(expected, dtype, family, codes_of(probes))
    digest = run_digest(manifest_of(dtype), expected)
    request.getfixturevalue("interpreted")
    apply(found, dtype, family, codes_of(probes))
    for parameter, one, other in zip(manifest_of(dtype), expected, found, strict=True):
        assert torch.equal(one, other), parameter.name
    assert run_digest(manifest_of(dtype), found) == digest


def test_sums_with_gaps(interpreted: ModuleType) -> None:
    """A product padded on a card leaves a single column eight numbers apart."""
    parameter = Parameter(index=2, name="w", shape=(300, 1), dtype="float32")
    wide = torch.arange(2400, dtype=torch.int32).view(300, 8)
    probes = Probes.of(run_key=1, round=2, slots=[0], samples=[0])
    expected, found = torch.ones(300), torch.ones(300)
    rounding.subtract(expected, 0, wide[:, :1].clone(), parameter, probes, 0.5, 0)
    rounding.subtract(found, 0, wide[:, :1], parameter, probes, 0.5, 0)
    assert torch.equal(found, expected)
    assert torch.equal(found, 1 - 4.0 * torch.arange(300))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("dtype", DTYPES_OF_ROWS)
def test_a_linear_layer_is_corrected(
    dtype: torch.dtype, shape: tuple[int, int, int, int], has_bias: bool, interpreted: ModuleType
) -> None:
    check_linear(rowwise, dtype, shape, has_bias=has_bias)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("dtype", DTYPES_OF_ROWS)
def test_vectors_scale_and_shift(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    norm: tuple[float | None, bool, float],
    interpreted: ModuleType,
) -> None:
    check_affine(rowwise, dtype, shape, norm)


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_several_passes_and_chunks(
    family: Family, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Limits so small that a round needs passes, which add sums, and chunks, each with noise of its own."""
    monkeypatch.setattr(update, "PROBES_PER_PASS", 4)
    monkeypatch.setattr(update, "PROBES_PER_UPDATE_MAX", 6)
    plan.plan_groups.cache_clear()
    expected, found = (weights_of(manifest_of("bfloat16")) for _ in range(2))
    apply(expected, "bfloat16", family, codes_of(15))
    request.getfixturevalue("interpreted")
    apply(found, "bfloat16", family, codes_of(15))
    plan.plan_groups.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_groups_smaller_than_a_matrix(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setitem(plan.SIGN_BYTES, "fused", 37 * 100)
    expected, found = (weights_of(manifest_of("bfloat16")) for _ in range(2))
    apply(expected, "bfloat16", "rank1", codes_of(37))
    request.getfixturevalue("interpreted")
    plan.plan_groups.cache_clear()
    apply(found, "bfloat16", "rank1", codes_of(37))
    plan.plan_groups.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("probes", [256, 257])
def test_dense_sums_of_many_probes(probes: int, extreme: bool, request: pytest.FixtureRequest) -> None:
    """More than 16 bits hold at once, and the largest codes."""
    codes = np.full(probes, -127, np.int8) if extreme else codes_of(probes)
    parameter = Parameter(index=2, name="w", shape=(70, 61), dtype="float32")
    given = Probes.of(run_key=2**32 - 1, round=9, slots=np.arange(probes) // 7, samples=np.arange(probes) % 7)
    factors = np.where(codes == -128, 0, codes).astype(np.int8)
    total = update._dense_sums(parameter, 0, given, factors, CPU)
    launch: ModuleType = request.getfixturevalue("interpreted")
    found = torch.zeros(parameter.elements)
    launch.dense_update(found, directions.probe_table(launch, given, factors, CPU), 1.0, 4 * 2 + 2, 4 * 2 + 3, 0)
    assert torch.equal(found, -total.to(torch.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [1e-44, 1e10, 2.0**64])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_steps_at_the_edges_of_the_range(
    family: Family, alpha: float, dtype: DType, request: pytest.FixtureRequest
) -> None:
    """Subnormal scales, some of which are no f32, huge steps, infinite weights, which noise must not make NaN."""
    expected, found = (weights_of(manifest_of(dtype)) for _ in range(2))
    for weights in (expected, found):
        weights[6].view(-1)[:5] = torch.tensor([3.3e38, float("inf"), -float("inf"), 1e-40, -0.0]).to(weights[6].dtype)
    apply(expected, dtype, family, codes_of(9), alpha)
    request.getfixturevalue("interpreted")
    apply(found, dtype, family, codes_of(9), alpha)
    assert all(
        torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("first", "elements"), [(0, 1), (7, 1), (3, 512), (8, 513), (505, 5000), (1, 8), (5, 0)])
def test_given_sums_are_subtracted(first: int, elements: int, dtype: DType, request: pytest.FixtureRequest) -> None:
    parameter = Parameter(index=5, name="w", shape=(first + elements + 2,), dtype=dtype, exponent=-3)
    probes = Probes.of(run_key=17, round=4, slots=[3], samples=[0])
    total = torch.from_numpy(np.random.default_rng(1).integers(-(2**24) + 1, 2**24, elements).astype(np.int32))
    expected = torch.randn(first + elements + 2).to(getattr(torch, dtype))
    found = [expected.clone() for _ in range(2)]
    if elements:
        rounding.subtract(expected, first, total, parameter, probes, 0.5, 2)
    request.getfixturevalue("interpreted")
    rounding.subtract(found[0], first, total, parameter, probes, 0.5, 2)
    rounding.subtract(found[1], first, total.to(torch.float32), parameter, probes, 0.5, 2)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("columns", [0, 128, 256])
@pytest.mark.parametrize("probes", [1, 33, 64])
def test_signs_in_either_order(probes: int, columns: int, request: pytest.FixtureRequest) -> None:
    table = SpanTable([Span(stream=1, start=5, stop=300), Span(stream=0xFFFF_FFF1, start=128, stop=140)])
    given = Probes.of(run_key=2**32 - 1, round=1, slots=np.arange(probes) + 2**31, samples=np.arange(probes))
    factors = np.where(codes_of(probes) == -128, 0, codes_of(probes)).astype(np.int8)
    expected = table.scaled_signs(given, CPU, rows=probes + 3, factors=factors, columns=columns)
    launch: ModuleType = request.getfixturevalue("interpreted")
    assert torch.equal(table.scaled_signs(given, CPU, rows=probes + 3, factors=factors, columns=columns), expected)
    across = torch.full((table.width, probes + 3), 9, dtype=torch.int8).t()
    table.fill(launch, across, directions.probe_table(launch, given, factors, CPU), columns)
    assert torch.equal(across, expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 9000), (4096, 4097), (4095, 8193), (77, 300)])
def test_dense_signs_of_any_stretch(start: int, stop: int, request: pytest.FixtureRequest) -> None:
    parameter = Parameter(index=7, name="w", shape=(90, 100), dtype="float32")
    probes = Probes.of(run_key=3, round=1, slots=[5, 2**32 - 2], samples=[0, 65_535])
    expected = directions.dense_signs(parameter, probes, start=start, stop=stop)
    request.getfixturevalue("interpreted")
    assert torch.equal(directions.dense_signs(parameter, probes, start=start, stop=stop), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("elements", [0, 1, 1023, 16_385, 40_000])
def test_digests(elements: int, dtype: DType, request: pytest.FixtureRequest) -> None:
    weight = torch.randn(elements).to(getattr(torch, dtype))
    expected = tensor_digest(weight)
    request.getfixturevalue("interpreted")
    assert tensor_digest(weight) == expected


def test_the_trial_finds_nothing_wrong_and_something_when_there_is(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerturb.zo.cuda import check

    monkeypatch.setattr(fast, "kernels", lambda device: None)
    assert check.wrong_kernel(CPU) is None
    subtract = interpreted.subtract
    monkeypatch.setattr(
        interpreted, "subtract", lambda flat, first, total, scale, *rest: subtract(flat, first, -total, scale, *rest)
    )
    assert check.wrong_kernel(CPU) == "subtract"
