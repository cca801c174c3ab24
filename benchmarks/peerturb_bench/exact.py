"""What an exact contribution costs: the backward pass it needs anyway, and its codes on top.

A Llama of 55 million parameters with random weights, 32 sequences of 64 tokens, 4 096 directions of `rank1`; times and
memory in a process each. Times: value is a whole contribution, reference its gradient alone, pairs in turn, ratio the
median of the pairs' (at most 1.3). Memory: value is the peak of a contribution above the loaded model, reference that
of the gradient alone; beside it plain inference of the same rows.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.exact import ExactEngine
from peerturb.zo.heap import keep_large_blocks
from peerturb.zo.objective import TokenSequence
from peerturb_bench.memory import NoMarkError, peak
from peerturb_bench.rows import Row
from peerturb_bench.shapes import LLAMA
from peerturb_bench.step import Case, build_engine

CODES, EXAMPLES, TOKENS = 4_096, 32, 64
PAIRS, QUICK_PAIRS = 5, 1
_MIB = 2**20


def run(quick: bool = False) -> list[Row]:
    """Measure on the CPU in f32 and bf16, and bf16 on a CUDA device where there is one."""
    rows: list[Row] = []
    kinds = [("cpu", "float32")] if quick else [("cpu", "float32"), ("cpu", "bfloat16")]
    if torch.cuda.is_available():
        kinds.append(("cuda", "bfloat16"))
    for device, dtype in kinds:
        rows += _rows(device, dtype, QUICK_PAIRS if quick else PAIRS)
    return rows


def _rows(device: str, dtype: str, pairs: int) -> list[Row]:
    times = _asked(device, dtype, pairs, os.environ)
    # Every large block given back at once, so that the high-water mark tells what was in use.
    mapped = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = _asked(device, dtype, 0, mapped)
    name = f"{device} {dtype}, {EXAMPLES} sequences x {TOKENS} tokens, {CODES:,} directions"
    whole, alone = times["whole_s"], times["alone_s"]
    ratio = statistics.median(one / other for one, other in zip(whole, alone, strict=True))
    value, reference = statistics.median(whole), statistics.median(alone)
    rows = [Row(name=f"{name}: time", value=value, unit="s", reference=reference, ratio=ratio)]
    for what in ("gradient", "inference"):
        value, reference = peaks["contribution"] / _MIB, peaks[what] / _MIB
        row = f"{name}: memory, beside the {what}"
        rows.append(Row(name=row, value=value, unit="MiB", reference=reference, ratio=value / reference))
    return rows


def _asked(device: str, dtype: str, pairs: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what a process of its own measures: seconds of pairs, or peaks where there are none."""
    command = [sys.executable, "-m", "peerturb_bench.exact", device, dtype, str(pairs)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise NoMarkError(f"the measuring process ended with code {ended.returncode}: {ended.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def engine_of(device: str, dtype: DType) -> ExactEngine[TokenSequence]:
    """Return an engine on the model with random weights, and as many random sequences as a contribution has."""
    probes = build_engine(Case(shape=LLAMA, dtype=dtype, probes=EXAMPLES, tokens=TOKENS), device)
    document = probes.spec.model_dump(mode="json")
    document["perturbation"] |= {"estimators": ["exact"], "exact": {"examples": EXAMPLES, "codes": CODES}}
    spec = RunSpec.from_document(document, source="the benchmark's run")
    return ExactEngine(probes.evaluator, spec, probes.items)


def _measure(device: str, dtype: DType, pairs: int) -> dict[str, object]:
    """Return seconds of pairs, or with none the peaks above the loaded model in bytes."""
    engine = engine_of(device, dtype)
    items = [engine.items[number] for number in engine.drawn(RoundNumber(0), Slot(0)).tolist()]
    runner = engine.evaluator
    assert isinstance(runner, Runner)

    def gradient() -> None:
        engine.backward.gradient(items)

    def contribution() -> None:
        engine.contribute(RoundNumber(0), slot=Slot(0), scale=0.05)

    def infer() -> None:
        for part in engine.backward.micro_batches(items):
            runner.losses(part)

    if not pairs:
        named = (("inference", infer), ("gradient", gradient), ("contribution", contribution))
        return {name: peak(work, device) for name, work in named}
    keep_large_blocks()  # as nodes do
    contribution()
    whole, alone = [], []
    for _ in range(pairs):
        alone.append(_seconds(gradient, device))
        whole.append(_seconds(contribution, device))
    return {"whole_s": whole, "alone_s": alone}


def _seconds(work: Callable[[], None], device: str) -> float:
    began_s = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    json.dump(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3])), sys.stdout)  # type: ignore[arg-type]
