"""What an exact contribution costs: the backward pass it needs anyway, and its codes on top.

A Llama of 55 million parameters with random weights, 32 sequences of 64 tokens, 4 096 directions of `rank1`; in a
process of its own, whose allocator gives every large block back at once. Times: value is a whole contribution,
reference its gradient alone, pairs in turn, ratio the median of the pairs' (at most 1.3). Memory: value is the peak of
a contribution above the loaded model, reference that of the gradient alone; beside it plain inference of the same rows.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.exact import ExactEngine
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
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-m", "peerturb_bench.exact", device, dtype, str(pairs)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise NoMarkError(f"the measuring process ended with code {ended.returncode}: {ended.stderr.strip()[-500:]}")
    found = json.loads(ended.stdout)
    name = f"{device} {dtype}, {EXAMPLES} sequences x {TOKENS} tokens, {CODES:,} directions"
    whole, alone = found["whole_s"], found["alone_s"]
    ratio = statistics.median(one / other for one, other in zip(whole, alone, strict=True))
    rows = [
        Row(
            name=f"{name}: time", value=statistics.median(whole), unit="s", reference=statistics.median(alone),
            ratio=ratio,
        )
    ]  # fmt: skip
    for what, reference in (
        ("memory, beside the gradient alone", "gradient"),
        ("memory, beside inference", "inference"),
    ):
        value, other = found["contribution"] / _MIB, found[reference] / _MIB
        rows.append(Row(name=f"{name}: {what}", value=value, unit="MiB", reference=other, ratio=value / other))
    return rows


def engine_of(device: str, dtype: DType) -> ExactEngine[TokenSequence]:
    """Return an engine on the model with random weights, and as many random sequences as a contribution has."""
    probes = build_engine(Case(shape=LLAMA, dtype=dtype, probes=EXAMPLES, tokens=TOKENS), device)
    document = probes.spec.model_dump(mode="json")
    document["perturbation"] |= {"estimators": ["exact"], "exact": {"examples": EXAMPLES, "codes": CODES}}
    spec = RunSpec.from_document(document, source="the benchmark's run")
    return ExactEngine(probes.evaluator, spec, probes.items)


def _measure(device: str, dtype: DType, pairs: int) -> dict[str, object]:
    """Return seconds of pairs, and peaks above the loaded model in bytes."""
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

    peaks = {name: peak(work, device) for name, work in (("inference", infer), ("gradient", gradient))}
    peaks["contribution"] = peak(contribution, device)
    whole, alone = [], []
    for _ in range(pairs):
        alone.append(_seconds(gradient, device))
        whole.append(_seconds(contribution, device))
    return {**peaks, "whole_s": whole, "alone_s": alone}


def _seconds(work: Callable[[], None], device: str) -> float:
    began_s = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    json.dump(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3])), sys.stdout)  # type: ignore[arg-type]
