"""The Triton kernels on a card: they are used, and give the reference's bits at any shape and value."""

from types import ModuleType

import numpy as np
import pytest
import torch

from peerturb.manifest import DType, Parameter
from peerturb.rng import GROUP_SIGNS, SIDE_DENSE, SIDE_ROUNDING, stream_of
from peerturb.zo import fast, rounding, update
from peerturb.zo.cuda import __name__ as package
from peerturb.zo.digest import tensor_digest
from peerturb.zo.directions import Probes, Span, SpanTable, dense_signs, left_signs, probe_table, right_signs

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@pytest.fixture
def launch() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = fast.kernels(CUDA)
    assert kernels is not None, "Triton is there, but its kernels failed their trial (a warning says why)"
    assert kernels.__name__ == f"{package}.launch"
    return kernels


def probes_of(count: int) -> Probes:
    return Probes.of(
        run_key=0xFEDC_BA98, round=2**32 - 1, slots=np.arange(count) // 3 + 2**31, samples=np.arange(count)
    )


def factors_of(count: int) -> np.typing.NDArray[np.int8]:
    return np.random.default_rng(count).integers(-127, 128, count).astype(np.int8)


def weights_of(parameter: Parameter) -> torch.Tensor:
    values = torch.randn(parameter.elements, generator=torch.Generator().manual_seed(7))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, float("inf"), -float("inf"), 3.38e38, -3.38e38])
    values[: len(special)] = special[: len(values)]
    return values.to(getattr(torch, parameter.dtype))


def dense_sums_of(parameter: Parameter, probes: Probes, factors: np.typing.NDArray[np.int8]) -> torch.Tensor:
    """Return U of the whole tensor by the CPU, which makes it stretch by stretch."""
    starts = range(0, parameter.elements, update.DENSE_ELEMENTS["cpu"])
    return torch.cat([update._dense_sums(parameter, first, probes, factors, CPU) for first in starts])


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("probes", [1, 33, 160, 1025])
@pytest.mark.parametrize("columns", [0, 384])
def test_signs(launch: ModuleType, probes: int, columns: int) -> None:
    table = SpanTable([Span(stream=1, start=5, stop=300), Span(stream=0xFFFF_FFF1, start=128, stop=9000)])
    given, factors = probes_of(probes), factors_of(probes)
    expected = table.scaled_signs(given, CPU, rows=probes + 3, factors=factors, columns=columns)
    assert torch.equal(
        table.scaled_signs(given, CUDA, rows=probes + 3, factors=factors, columns=columns).cpu(), expected
    )
    across = torch.empty((table.width, probes + 3), dtype=torch.int8, device=CUDA).t()
    table.fill(launch, across, probe_table(launch, given, factors, CUDA), columns)
    assert torch.equal(across.cpu(), expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 300_000), (4096, 4097), (4095, 8193), (77, 300)])
def test_dense_signs(launch: ModuleType, start: int, stop: int) -> None:
    parameter = Parameter(index=7, name="w", shape=(600, 500), dtype="float32")
    found = dense_signs(parameter, probes_of(5), start=start, stop=stop, device=CUDA)
    assert torch.equal(found.cpu(), dense_signs(parameter, probes_of(5), start=start, stop=stop))


@pytest.mark.parametrize("alpha", [1.7e-6, 3e-3, 1e-38, 2.0**64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("shape", [(1, 1), (1, GROUP_SIGNS + 1), (63, 65), (128, 1096)])
def test_dense_updates(launch: ModuleType, shape: tuple[int, int], probes: int, dtype: DType, alpha: float) -> None:
    parameter = Parameter(index=3, name="w", shape=shape, dtype=dtype)
    given, scale = probes_of(probes), float(np.float32(alpha))
    factors = np.full(probes, -127, np.int8) if probes == 256 else factors_of(probes)
    expected, found = weights_of(parameter), weights_of(parameter).to(CUDA)
    total = dense_sums_of(parameter, given, factors)
    rounding.subtract(expected, 0, total, parameter, given, scale, 1)
    table = probe_table(launch, given, factors, CUDA)
    streams = [stream_of(3, side) for side in (SIDE_DENSE, SIDE_ROUNDING)]
    launch.dense_update(found, table, scale, *streams, 1)
    assert is_same(found, expected)


@pytest.mark.parametrize("alpha", [1.7e-6, 1e-38, 2.0**64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [1, 31, 32, 33, 160, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (63, 65), (65, 136), (257, 1096)])
def test_rank1_updates(launch: ModuleType, shape: tuple[int, int], probes: int, dtype: DType, alpha: float) -> None:
    parameter = Parameter(index=3, name="w", shape=shape, dtype=dtype)
    given, factors, scale = probes_of(probes), factors_of(probes), float(np.float32(alpha))
    left, right = left_signs(parameter, given), right_signs(parameter, given)
    left = left * torch.from_numpy(factors)[:, None]
    expected, found = weights_of(parameter), weights_of(parameter).to(CUDA)
    total = (left.t().double() @ right.double()).to(torch.int32)
    rounding.subtract(expected, 0, total, parameter, given, scale, 1)
    table = probe_table(launch, given, factors, CUDA)
    padding = (0, 0, 0, table.height - probes)
    left, right = (torch.nn.functional.pad(side, padding).t().contiguous().to(CUDA) for side in (left, right))
    launch.rank1_update(found, 0, left, right, table, scale, stream_of(3, SIDE_ROUNDING), 1)
    assert is_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "elements"), [(0, 1), (7, 1), (3, 512), (8, 513), (505, 50_000), (1, 8)])
def test_given_sums(launch: ModuleType, first: int, elements: int, dtype: DType) -> None:
    parameter = Parameter(index=5, name="w", shape=(first + elements + 2,), dtype=dtype, exponent=-3)
    total = torch.from_numpy(np.random.default_rng(1).integers(-(2**24) + 1, 2**24, elements).astype(np.int32))
    for number in (torch.int32, torch.float32):
        expected, found = weights_of(parameter), weights_of(parameter).to(CUDA)
        rounding.subtract(expected, first, total, parameter, probes_of(1), 0.37, 2)
        rounding.subtract(found, first, total.to(number).to(CUDA), parameter, probes_of(1), 0.37, 2)
        assert is_same(found, expected)


def test_no_multiplication_is_fused_into_a_subtraction(launch: ModuleType) -> None:
    """Where one rounding instead of two would show: a fused result differs in about a third of such elements."""
    parameter = Parameter(index=0, name="w", shape=(400, 250), dtype="float32")
    given, factors, scale = probes_of(200), factors_of(200), float(np.float32(1.7e-4))
    weights = torch.randn(parameter.elements, generator=torch.Generator().manual_seed(3))
    dense = dense_sums_of(parameter, given, factors)
    left = left_signs(parameter, given) * torch.from_numpy(factors)[:, None]
    right = right_signs(parameter, given)
    rank1 = (left.t().double() @ right.double()).to(torch.int32).reshape(-1)
    table = probe_table(launch, given, factors, CUDA)
    for total in (dense, rank1):
        once = (weights.double() - total.double() * scale).float()
        twice = weights - total.float() * scale
        assert int((once != twice).sum()) > 10_000
        found = weights.clone().to(CUDA)
        rounding.subtract(found, 0, total.to(CUDA), parameter, given, scale, 0)
        assert is_same(found, twice)
        found = weights.clone().to(CUDA)
        if total is dense:
            launch.dense_update(found, table, scale, stream_of(0, SIDE_DENSE), stream_of(0, SIDE_ROUNDING), 0)
        else:
            padding = (0, 0, 0, table.height - 200)
            sides = [torch.nn.functional.pad(side, padding).t().contiguous().to(CUDA) for side in (left, right)]
            launch.rank1_update(found, 0, *sides, table, scale, stream_of(0, SIDE_ROUNDING), 0)
        assert is_same(found, twice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [0, 1, 1023, 16_385, 5_000_003])
def test_digests(launch: ModuleType, elements: int, dtype: DType) -> None:
    weight = torch.randn(elements).to(getattr(torch, dtype))
    assert tensor_digest(weight.to(CUDA)) == tensor_digest(weight)


def test_places_beyond_32_bits(launch: ModuleType) -> None:
    """The last group of a tensor of more than 2**32 elements takes its own signs and noise."""
    elements = 2**32 + 3 * GROUP_SIGNS + 1021  # a multiple of 5
    if torch.cuda.mem_get_info(CUDA)[0] < 3 * elements:
        pytest.skip("the card has less than 13 GB free")
    flat = torch.zeros(elements, dtype=torch.bfloat16, device=CUDA)
    given, factors = probes_of(3), factors_of(3)
    matrix = Parameter(index=1, name="w", shape=(elements // 5, 5), dtype="bfloat16")
    start = elements // GROUP_SIGNS * GROUP_SIGNS
    signs = dense_signs(matrix, given, start=start, stop=elements // 5 * 5)
    sums = (torch.from_numpy(factors).to(torch.int32)[:, None] * signs).sum(0, dtype=torch.int32)
    tail = flat[start : start + len(sums)].cpu()
    noise = rounding.rounding_noise(1, start, start + len(sums), 0xFEDC_BA98, 2**32 - 1, 0, CPU)
    tail = rounding.stochastic_bfloat16(tail.to(torch.float32) - rounding.difference(sums, 0.5), noise).contiguous()
    table = probe_table(launch, given, factors, CUDA)
    launch.dense_update(flat, table, 0.5, stream_of(1, SIDE_DENSE), stream_of(1, SIDE_ROUNDING), 0)
    assert is_same(flat[start : start + len(sums)].contiguous(), tail)
