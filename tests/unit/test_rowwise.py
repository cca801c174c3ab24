"""Corrections of activations in machine code: right on odd shapes, rounded once, the same on any number of threads."""

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerturb.errors import ModelError
from peerturb.zo import crew, fast
from peerturb.zo.coverage import check_owners
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.families import RankOne
from tests.rowwise_checks import DTYPES, NORMS, SHAPES, check_affine, check_linear
from tests.zo_models import RandomSigns, manifest_of, small_model

rowwise: Any = fast.rowwise(torch.device("cpu"))
pytestmark = pytest.mark.skipif(rowwise is None, reason="Numba is missing, or torch has another OpenMP")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_is_corrected(
    dtype: torch.dtype, shape: tuple[int, int, int, int], has_bias: bool, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_linear(rowwise, dtype, shape, has_bias=has_bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_scale_and_shift(
    dtype: torch.dtype, shape: tuple[int, int, int, int], norm: tuple[float | None, bool, float]
) -> None:
    check_affine(rowwise, dtype, shape, norm)


def test_not_a_number_stays_one() -> None:
    x, y = torch.full((1, 2, 8), float("nan"), dtype=torch.bfloat16), torch.ones(1, 2, 8, dtype=torch.bfloat16)
    ones = torch.ones(1, 8, dtype=torch.int8)
    rowwise.add_linear(x, y, (ones, 0), (ones, 0), step=1.0, sides=2, bias=None, bias_step=0.0)
    assert bool(y.isnan().all())
    y = torch.full((1, 2, 8), 3e38, dtype=torch.bfloat16)
    rowwise.add_linear(y.clone(), y, (ones, 0), (ones, 0), step=1.0, sides=2, bias=None, bias_step=0.0)
    assert not bool(y.isfinite().any())


def test_bfloat16_is_rounded_alike_without_the_instruction_for_it() -> None:
    """In a process of its own: what a machine can do is asked when the module is imported."""
    code = """
import sys
from llvmlite import binding
features = binding.get_host_cpu_features()
if sys.argv[1] == "without":
    features["avx512bf16"] = False
binding.get_host_cpu_features = lambda: features
import torch
from peerturb.zo import fast
x = torch.randn(2, 6, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
y = torch.randn(2, 6, 99, generator=torch.Generator().manual_seed(2)).bfloat16()
ones = torch.ones(2, 99, dtype=torch.int8)
fast.rowwise(torch.device("cpu")).add_linear(x, y, (ones, 0), (ones, 3), step=0.3, sides=2, bias=None, bias_step=0.0)
print(y.view(torch.int16).long().flatten().mul(torch.arange(1, y.numel() + 1)).sum().item())
"""
    said = [
        subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True).stdout
        for way in ("with", "without")
    ]
    assert said[0] == said[1]


def test_scratch_memory_lasts_as_long_as_it_is_used() -> None:
    """In a process whose allocator unmaps what is freed: a late use would end it."""
    code = """
import torch
from peerturb.zo import fast
rowwise, ones = fast.rowwise(torch.device("cpu")), torch.ones(4, 40_000, dtype=torch.int8)
x, y = torch.ones(4, 6, 40_000), torch.ones(4, 6, 30_000)
rowwise.add_linear(x, y, (ones, 0), (ones, 0), step=1e-4, sides=2, bias=None, bias_step=0.0)
assert torch.allclose(y[:, 0], torch.full_like(y[:, 0], 5.0)), y
scale = torch.full((40_000,), 2.0)
z = rowwise.affine(x, scale, scale, sides=2, scale_signs=(ones, 0), scale_step=1.0, shift_signs=None, shift_step=0.0)
assert torch.equal(z[:, 0], torch.full_like(z[:, 0], 5.0)) and torch.equal(z[:, 5], torch.full_like(z[:, 5], 3.0))
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096"},
    )


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3"])
def test_torch_alone_gives_nearly_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peerturb.zo.perturbed import PerturbedForward

    model = small_model(name)
    manifest = manifest_of(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    signs = RandomSigns(manifest, 3)
    ids = torch.randint(1, 30, (6, 9), generator=torch.Generator().manual_seed(1))

    def logits() -> Tensor:
        perturbation = RankOne(signs, probes=3, epsilon=0.05, dtype=torch.float32, device=torch.device("cpu"))
        parameters = [(entry, named[entry.name]) for entry in manifest]
        with torch.inference_mode(), PerturbedForward(parameters, perturbation, rows=6):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    fused = logits()
    monkeypatch.setattr(fast, "rowwise", lambda device: None)
    plain = logits()
    assert (fused - plain).abs().max() < 2e-5
    assert not torch.equal(fused, plain)  # or one of the two was not what it was taken for


class Borrower(nn.Module):
    """Uses a layer's weight outside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = nn.functional.linear(self.first(x), self.second.weight, self.second.bias) + self.second(x)
        return outputs


def call(module: Any, batch: Tensor) -> Tensor:
    outputs: Tensor = module(batch)
    return outputs


def test_a_parameter_used_elsewhere_makes_all_operations_seen() -> None:
    module = Borrower().requires_grad_(False)
    evaluator = CustomEvaluator(
        module,
        base_spec(module, name="x"),
        list(torch.randn(16, 6, generator=torch.Generator().manual_seed(0))),
        loss=lambda outputs, batch: outputs.square().mean(1),
        forward=call,
    )
    owners = [module.first, module.second]
    assert check_owners(evaluator.trial, evaluator.parameters, "rank1", owners=owners) is None
    alone = [entry for entry in evaluator.parameters if entry[0].name.startswith("first")]
    assert check_owners(evaluator.trial, alone, "rank1", owners=[module.first]) == [module.first]
    assert "forward" not in module.first.__dict__
    with pytest.raises(ModelError):
        check_owners(lambda numbers: torch.zeros(len(numbers), 1), evaluator.parameters, "rank1", owners=owners)


def test_a_crew_takes_shares_once() -> None:
    """Every share is done once, on as many threads as torch uses."""
    numbers: list[tuple[int, int]] = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: numbers.append((crew.thread_number()(), crew.thread_count()()))
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            numbers.clear()
            address = ctypes.cast(body, ctypes.c_void_p).value
            assert address is not None
            crew.run(address, b"\0" * 8)
            assert sorted(numbers) == [(number, threads) for number in range(threads)]
    finally:
        torch.set_num_threads(before)


def test_activations_of_two_types_are_left_to_torch() -> None:
    """Under autocast a layer's product has another type than its input; read as the input's, it would end too soon."""
    x, y = torch.randn(2, 4, 8), torch.randn(2, 4, 8).bfloat16()
    assert rowwise.takes(x)
    assert rowwise.takes(x, x.clone())
    assert not rowwise.takes(x, y)
    assert not rowwise.takes(x, x.transpose(1, 2))
    assert not rowwise.takes(x.double())


def test_a_module_under_autocast_is_refused() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).requires_grad_(False)

    def forward(module: Any, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(module, batch).float()

    items = list(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    spec = base_spec(module, name="x")
    evaluator = CustomEvaluator(module, spec, items, loss=lambda found, batch: found.square().mean(1), forward=forward)
    for owners in (None, [module[0], module[2]]):
        with pytest.raises(ModelError, match=r"0\.weight cannot be perturbed.* as under autocast; leave out autocast"):
            check_owners(evaluator.trial, evaluator.parameters, "rank1", owners=owners)
