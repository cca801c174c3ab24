"""The CUDA kernels go through Triton's whole compiler, no card needed: machine code without fused multiply-adds.

It is compiled with the very options the launches give. What the code does on a card only tests/gpu can tell.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow
POINTERS = {
    torch.float32: "*fp32",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
FUSED = re.compile(r"\bfma\.\w+\.f32|\b(mul|add|sub)\.f32")
"""Fused already, or left to the assembler's liking by the lack of the suffix .rn."""
OPTIONS = ("num_warps", "enable_fp_fusion")


@dataclass(slots=True)
class Launch:
    """What a launch gave."""

    kernel: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(slots=True)
class Recorder:
    """In the place of the kernels' module: notes launches instead of doing them."""

    launches: list[Launch] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: tuple[int, ...]) -> Callable[..., None]:
                assert all(0 < extent < 2**31 for extent in grid)
                return lambda *arguments, **options: self.launches.append(Launch(name, arguments, options))

        return Kernel()


def launches_of(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Return one launch of every form of every kernel for weights of this type."""
    from peerturb.zo.cuda import launch

    recorder = Recorder()
    monkeypatch.setattr(launch, "kernels", recorder)
    flat = torch.zeros(128 * 136, dtype=dtype)
    words = np.arange(3, dtype=np.uint64)

    def table(probes: int) -> launch.ProbeTable:
        numbers = np.arange(probes, dtype=np.uint64)
        codes = np.ones(probes, np.int8)
        return launch.ProbeTable.of(numbers, numbers, codes, round=2**32 - 1, run_key=5, device=torch.device("cpu"))

    few = table(64)
    launch.dense_update(flat, few, 0.5, 6, 7, 0)
    launch.dense_update(flat, table(300), 0.5, 6, 7, 0)
    left, right = torch.zeros(128, 64, dtype=torch.int8), torch.zeros(136, 64, dtype=torch.int8)
    launch.rank1_update(flat, 0, left, right, few, 0.5, 7, 0)
    launch.rank1_update(flat, 0, left, right[:135], few, 0.5, 7, 0)
    launch.vector_update(flat, 3, left, few, 0.5, 7, 0)
    launch.subtract(flat, 3, torch.zeros(9, dtype=torch.int32), 0.5, 7, 0, 1, 2)
    bits = torch.uint16 if dtype == torch.bfloat16 else torch.uint32
    launch.digest_sum(flat.view(bits), torch.zeros(1, dtype=torch.int64))
    if dtype == torch.float32:
        counters = launch.words_on(words, torch.device("cpu"))
        launch.fill_signs(torch.zeros(64, 384, dtype=torch.int8), counters, counters, few, 1)
        launch.fill_signs(torch.zeros(384, 64, dtype=torch.int8).t(), counters, counters, few, 1)
        launch.dense_signs(0, 2, few, 6)
    return recorder.launches


def compiled(launch: Launch, capability: int, **changes: Any) -> dict[str, Any]:
    """Compile a launch as Triton would for a card of this capability; returns the stages' code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peerturb.zo.cuda import kernels

    function = getattr(kernels, launch.kernel)
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    general = function.do_not_specialize or ()
    for place, (name, value) in enumerate(zip(function.arg_names, launch.arguments, strict=False)):
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = POINTERS[value.dtype], name not in general
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in general:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name], aligned = "i32", value % 16 == 0 and name not in general
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    for name, value in launch.options.items():
        if name not in OPTIONS:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {key: value for key, value in launch.options.items() if key in OPTIONS} | changes
    code: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return code


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_compiles_without_fused_multiply_adds(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for launch in launches_of(dtype, monkeypatch):
        assert launch.options["enable_fp_fusion"] is False, launch.kernel
        code = compiled(launch, capability)
        assert len(code["cubin"]) > 0
        assert not FUSED.search(code["ptx"]), launch.kernel
        assert ".ftz" not in code["ptx"], f"{launch.kernel} loses subnormals"


def test_with_fusion_the_code_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    for launch in launches_of(torch.float32, monkeypatch):
        if launch.kernel in ("dense_update", "rank1_update", "vector_update", "subtract"):
            assert FUSED.search(compiled(launch, 90, enable_fp_fusion=True)["ptx"]), launch.kernel
