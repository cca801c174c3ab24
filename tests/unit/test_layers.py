"""Layers corrected without looking at their operations: what is recognised, what is not, and that both agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerturb.zo import fast, layers
from peerturb.zo.families import RankOne
from peerturb.zo.layers import Norm, norm_of
from peerturb.zo.perturbed import PerturbedForward, owners_of
from tests.zo_models import RandomSigns, manifest_of, small_model

needs_rowwise = pytest.mark.skipif(
    fast.rowwise(torch.device("cpu")) is None, reason="Numba is missing, or torch has another OpenMP"
)


class PlainRMSNorm(nn.Module):
    """As Llama's, in every type."""

    def __init__(self, width: int, *, offset: float = 0.0, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon = epsilon
        self.offset = offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (self.offset + self.weight.float())).to(hidden_states.dtype)


class CentredRMSNorm(PlainRMSNorm):
    """Named like one, and it subtracts the mean."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OutsideRMSNorm(PlainRMSNorm):
    """Adds its epsilon outside the root."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        root = hidden_states.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return hidden_states / root * self.weight


def found_in(module: nn.Module) -> tuple[float, float, bool] | None:
    norm = norm_of(module)
    return None if norm is None else (norm.epsilon, norm.offset, norm.is_centred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_told_by_what_they_compute(dtype: torch.dtype) -> None:
    assert found_in(PlainRMSNorm(48).to(dtype)) == (1e-6, 0.0, False)
    assert found_in(PlainRMSNorm(48, offset=1.0, epsilon=1e-5).to(dtype)) == (1e-5, 1.0, False)
    assert found_in(nn.LayerNorm(48, eps=1e-3).to(dtype)) == (1e-3, 0.0, True)
    assert found_in(CentredRMSNorm(48).to(dtype)) is None
    assert found_in(OutsideRMSNorm(48).to(dtype)) is None


def test_what_is_no_such_norm_is_looked_at() -> None:
    assert norm_of(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert norm_of(nn.LayerNorm((4, 8))) is None
    assert norm_of(nn.GroupNorm(2, 8)) is None
    with_child = PlainRMSNorm(8)
    with_child.inner = nn.Linear(8, 8)
    assert norm_of(with_child) is None


def test_weights_that_change_are_seen() -> None:
    module = PlainRMSNorm(8)
    first = norm_of(module)
    module.weight = nn.Parameter(torch.zeros(8))
    second = norm_of(module)
    assert isinstance(first, Norm)
    assert isinstance(second, Norm)
    assert second.weight is module.weight


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3", "opt", "neox", "phi3"])
def test_real_norms_and_layers_are_known(name: str) -> None:
    """All norms and linear layers of these families; what is missing would be slow, not wrong."""
    for module in small_model(name).modules():
        if "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None:
            assert norm_of(module) is not None, module


def outputs(model: Any, *, sees_all: bool, dtype: torch.dtype) -> Tensor:
    manifest = manifest_of(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(entry, named[entry.name]) for entry in manifest]
    perturbation = RankOne(RandomSigns(manifest, 3), probes=3, epsilon=0.125, dtype=dtype, device=torch.device("cpu"))
    owners = None if sees_all else owners_of(model, [tensor for _, tensor in pairs])
    ids = (torch.arange(6 * 7).view(6, 7) * 5 + 3) % 60
    with torch.inference_mode(), PerturbedForward(pairs, perturbation, rows=6, owners=owners) as mode:
        result: Tensor = model(input_ids=ids).logits
    assert mode.used == {entry.name for entry in manifest}
    return result.double()


@needs_rowwise
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3", "opt", "neox", "phi3"])
def test_known_layers_give_what_their_operations_give(name: str) -> None:
    model = small_model(name)
    seen, known = (outputs(model, sees_all=way, dtype=torch.float32) for way in (True, False))
    assert torch.allclose(known, seen, rtol=1e-4, atol=1e-5 * float(seen.abs().max()))


@needs_rowwise
def test_a_bias_is_added_once_whoever_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("opt")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    here = outputs(model, sees_all=False, dtype=torch.float32)
    monkeypatch.setattr(RankOne, "takes_shift", lambda self, x, shift: False)
    there = outputs(model, sees_all=False, dtype=torch.float32)
    assert torch.allclose(here, there, rtol=1e-4, atol=1e-5 * float(there.abs().max()))


def test_a_layer_that_fails_leaves_no_forward_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama-tied")

    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(layers, "norm_of", fails)
    with pytest.raises(RuntimeError, match="no"):
        outputs(model, sees_all=False, dtype=torch.float32)
    assert not any("forward" in module.__dict__ for module in model.modules())
