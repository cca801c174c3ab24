"""CPU and CUDA agree bit for bit: signs, updates, digests."""

import numpy as np
import pytest
import torch

from peerturb.manifest import DType, Parameter
from peerturb.zo import gemm
from peerturb.zo.digest import run_digest, tensor_digest
from peerturb.zo.directions import Probes, dense_signs, left_signs, right_signs
from peerturb.zo.update import Family, apply_update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROBES = Probes.of(run_key=0xFEDCBA98, round=2**32 - 1, slots=np.arange(9) * 7000, samples=np.arange(9))
SHAPES: list[tuple[tuple[int, ...], bool]] = [
    ((), False),
    ((4097,), False),
    ((1, 1), False),
    ((1, 300), False),
    ((300, 1), False),
    ((130, 77), False),
    ((3, 129, 5), True),
    ((4, 3, 2, 2), False),
    ((1024, 768), False),
]


def parameter(index: int, dtype: DType = "float32") -> Parameter:
    shape, is_stack = SHAPES[index]
    return Parameter(index=index, name=f"t{index}", shape=shape, dtype=dtype, exponent=index % 3 - 1, is_stack=is_stack)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_signs_are_the_same(index: int) -> None:
    tensor = parameter(index)
    assert torch.equal(left_signs(tensor, PROBES, device="cuda").cpu(), left_signs(tensor, PROBES))
    assert torch.equal(dense_signs(tensor, PROBES, device="cuda").cpu(), dense_signs(tensor, PROBES))
    if tensor.kind != "vector":
        assert torch.equal(right_signs(tensor, PROBES, device="cuda").cpu(), right_signs(tensor, PROBES))


@pytest.mark.parametrize("probes", [1, 37, 512, 5000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_updates_are_the_same(family: Family, dtype: DType, probes: int) -> None:
    if family == "dense" and probes > 512:
        pytest.skip("the CPU's part of this comparison would take minutes")
    manifest = tuple(parameter(index, dtype) for index in range(len(SHAPES)))
    generator = torch.Generator().manual_seed(1)
    host = [torch.rand(p.shape, generator=generator).sub_(0.5).to(getattr(torch, dtype)) for p in manifest]
    device = [weight.cuda() for weight in host]
    codes = np.random.default_rng(probes).integers(-128, 128, probes).astype(np.int8)
    for weights in (host, device):
        for round_ in range(2):
            apply_update(
                weights, manifest, family=family, run_key=5, round=round_, slots=[3], counts=[probes], codes=codes,
                alpha=float(np.float32(1e-4)),
            )  # fmt: skip
    for on_host, on_device in zip(host, device, strict=True):
        assert torch.equal(on_host, on_device.cpu())
    assert run_digest(manifest, host) == run_digest(manifest, device)


def test_the_device_offers_exact_int8_products() -> None:
    assert gemm.has_int8(torch.device("cuda"))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 8), (127, 129)])
def test_products_are_exact(shape: tuple[int, int]) -> None:
    codes = torch.randint(-127, 128, (77, shape[0]), dtype=torch.int8, device="cuda")
    signs = torch.randint(-1, 2, (77, shape[1]), dtype=torch.int8, device="cuda")
    expected = codes.to(torch.float64).t() @ signs.to(torch.float64)
    assert torch.equal(gemm.int8_product(codes, signs).to(torch.float64), expected)
    assert torch.equal(gemm.float_product(codes, signs).to(torch.float64), expected)


def test_digests_of_large_tensors_are_the_same() -> None:
    values = torch.randn((1 << 22) + 12_345)
    assert tensor_digest(values) == tensor_digest(values.cuda())
