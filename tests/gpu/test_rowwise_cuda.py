"""Corrections of activations on a card: right on odd shapes and long rows, and what a perturbed forward takes."""

from types import ModuleType

import pytest
import torch

from peerturb.zo import fast
from tests.rowwise_checks import DTYPES, NORMS, SHAPES, check_affine, check_linear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
WIDE = [*SHAPES, (2, 14, 4096, 11_008), (64, 64, 384, 1536)]


@pytest.fixture
def rowwise() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = fast.rowwise(CUDA)
    assert found is not None, "Triton is there, but its kernels failed their trial (a warning says why)"
    assert found.__name__ == "peerturb.zo.cuda.rowwise"
    return found


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_is_corrected(
    rowwise: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int, int], has_bias: bool
) -> None:
    check_linear(rowwise, dtype, shape, has_bias=has_bias, device="cuda")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [*WIDE, (1, 2, 40_000, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_scale_and_shift(
    rowwise: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    norm: tuple[float | None, bool, float],
) -> None:
    check_affine(rowwise, dtype, shape, norm, device="cuda")
