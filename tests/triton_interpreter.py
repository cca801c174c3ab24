"""The CUDA kernels on a CPU, by Triton's interpreter: their logic, bit for bit, but nothing of a compiler or a card."""

import importlib.util
from functools import lru_cache
from types import ModuleType

import pytest

from peerturb.zo import fast


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let CPU tensors take the way of CUDA tensors, through interpreted kernels; returns `peerturb.zo.cuda.launch`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from peerturb.zo.cuda import launch, rowwise

    monkeypatch.setattr(launch, "kernels", _interpreted("kernels"))
    monkeypatch.setattr(rowwise, "kernels", _interpreted("rowwise_kernels"))
    monkeypatch.setattr(fast, "kernels", lambda device: launch)
    return launch


@lru_cache(maxsize=2)
def _interpreted(name: str) -> ModuleType:
    """Return a second copy of a module of kernels: whether one is interpreted is settled when it is decorated."""
    found = importlib.util.find_spec(f"peerturb.zo.cuda.{name}")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module
