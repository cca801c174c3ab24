"""Memory that runs out for real, in another process with a limit: halved forwards, or a clear error."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerturb.errors import ModelError
from peerturb.zo.shortage import is_out_of_memory, memory_for

MIB = 2**20

# Measures a round whole, then once more with so little address space left that it cannot be done in one forward.
PROGRAM = """
import resource, sys
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from peerturb.ids import RoundNumber, Slot
from peerturb.zo.batch import Runner
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.model import prepare
from tests.zo_models import byte_tokenizer, manifest_of, spec_of

torch.set_num_threads(1)
left_mib, tokens = int(sys.argv[1]), int(sys.argv[2])
spec = spec_of(objective={"tokens_max": tokens}, probes=64)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=tokens, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
)
model = prepare(LlamaForCausalLM(config), "float32")
runner = Runner(model, manifest_of(model), Objective(spec.objective, byte_tokenizer()))
numbers = np.random.default_rng(0).integers(2, 60, (80, tokens), dtype=np.int32)
items = [TokenSequence(tokens=row, start=1) for row in numbers]
whole = ProbeEngine(runner, spec, items, rows_max=4).measure(RoundNumber(0), slot=Slot(0))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + left_mib * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
counts = []
losses = runner.losses
def watched(items, perturbation):
    counts.append(len(items))
    return losses(items, perturbation)
runner.losses = watched
found = ProbeEngine(runner, spec, items, rows_max=128).measure(RoundNumber(0), slot=Slot(0))
np.testing.assert_allclose(found.plus, whole.plus, rtol=0, atol=1e-4)
assert counts[0] == 64, counts
print(min(counts))
"""

needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")


def run(left_mib: int, tokens: int) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-c", PROGRAM, str(left_mib), str(tokens)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


@needs_limits
def test_a_forward_that_does_not_fit_is_done_in_parts() -> None:
    ended = run(24, 512)
    assert ended.returncode == 0, ended.stderr
    assert 0 < int(ended.stdout) < 64


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(2, "No such file or directory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_errors_are_told_from_others(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_what_there_was_no_memory_for_is_told() -> None:
    said = r"not enough memory on cpu for a copy \(.*; [\d,]+ MiB free\)\. Close"
    with pytest.raises(ModelError, match=said), memory_for("a copy"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ValueError, match="something else"), memory_for("a copy"):
        raise ValueError("something else")
