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
    from peerturb.zo.cuda import launch

    monkeypatch.setattr(launch, "kernels", _interpreted_kernels())
    monkeypatch.setattr(fast, "kernels", lambda device: launch)
    return launch


@lru_cache(maxsize=1)
def _interpreted_kernels() -> ModuleType:
    """Return a second copy of the kernels' module: whether one is interpreted is settled when it is decorated."""
    found = importlib.util.find_spec("peerturb.zo.cuda.kernels")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location("interpreted_kernels", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module
