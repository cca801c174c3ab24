"""What probes need beyond inference of the same rows: peak memory of one process, reset before each.

A Llama of 55 million parameters with random weights is read by plain inference and by probes, in a process whose
allocator gives every large block back at once, so that the kernel's high-water mark tells them apart; on a GPU torch
keeps that mark. value: bytes above inference; reference: one percent of the weights plus one activation tile (the
widest activation of a micro-batch); ratio: value / reference (at most 1).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from peerturb.errors import PeerturbError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.zo.batch import Runner
from peerturb_bench import plots
from peerturb_bench.rows import Row
from peerturb_bench.shapes import LLAMA
from peerturb_bench.step import Case, build_engine, plain_batches

PROBES, TOKENS = 32, 32
_MIB = 2**20


class NoMarkError(PeerturbError):
    """The kernel does not tell or reset a process's high-water mark."""


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure in a process of its own, for f32 and bf16, and bf16 on a CUDA device where there is one."""
    rows = [_row("cpu", dtype) for dtype in (("float32",) if quick else ("float32", "bfloat16"))]
    if torch.cuda.is_available():
        rows.append(_row("cuda", "bfloat16"))
    if out is not None:
        draw(rows, out / "memory.png")
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ratios."""
    found = [plots.Bar(label=row.name, value=row.ratio, target=1.0) for row in rows if row.ratio is not None]
    title = "Memory of probes above that of inference"
    plots.bars(path, found, title=title, axis="times 1 % of the weights + one activation tile")


def _row(device: str, dtype: str) -> Row:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-m", "peerturb_bench.memory", device, dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise NoMarkError(f"the measuring process ended with code {ended.returncode}: {ended.stderr.strip()[-500:]}")
    found = json.loads(ended.stdout)
    extra, limit = found["probe"] - found["inference"], found["weights"] / 100 + found["tile"]
    weights = found["weights"] / _MIB
    return Row(
        name=f"{device} {dtype}, {PROBES} probes x {TOKENS} tokens, weights {weights:.0f} MiB",
        value=extra / _MIB,
        unit="MiB",
        reference=limit / _MIB,
        ratio=extra / limit,
    )


def _measure(device: str, dtype: DType) -> dict[str, float]:
    """Return peaks above the loaded model and the sizes of weights and widest activation, in bytes."""
    case = Case(shape=LLAMA, dtype=dtype, probes=PROBES, tokens=TOKENS)
    engine = build_engine(case, device)
    assert isinstance(engine.evaluator, Runner)
    engine.evaluator.recorder = None  # torch counts no memory of a recording that plays
    slot = Slot(0)
    batches = plain_batches(engine, engine.drawn(RoundNumber(0), slot, case.probes))

    def infer() -> None:
        for batch in batches:
            engine.evaluator.losses(batch)

    peaks = {
        "inference": peak(infer, device),
        "probe": peak(lambda: engine.measure(RoundNumber(0), slot=slot), device),
    }
    itemsize = 4 if dtype == "float32" else 2
    rows = max(len(batch) for batch in batches)
    weights = sum(tensor.numel() * itemsize for _, tensor in engine.evaluator.parameters)
    return {**peaks, "weights": weights, "tile": rows * TOKENS * LLAMA.inner * itemsize}


def peak(work: Callable[[], object], device: str) -> float:
    """Return by how many bytes `work` raises what is in use on a device, the third time."""
    return _peak_on_gpu(work) if device == "cuda" else _peak(work)


def _peak(work: Callable[[], object]) -> float:
    """Return by how many bytes `work` raises the process's memory, the third time."""
    work()
    work()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    return _status("VmHWM") - before


def _peak_on_gpu(work: Callable[[], object]) -> float:
    """Return the same of the tensors on the current CUDA device."""
    work()
    work()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return float(torch.cuda.max_memory_allocated() - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise NoMarkError(f"this kernel does not tell {field}")


if __name__ == "__main__":
    json.dump(_measure(sys.argv[1], sys.argv[2]), sys.stdout)  # type: ignore[arg-type]
