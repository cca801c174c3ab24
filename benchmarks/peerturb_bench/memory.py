"""What probes need beyond inference of the same rows: peak memory of one process, reset before each.

A Llama of 60 million parameters with random weights is read by plain inference and by probes, in a process whose
allocator gives every large block back at once, so that the kernel's high-water mark tells them apart. value: bytes
above inference; reference: one percent of the weights plus one activation tile (the widest activation of a
micro-batch); ratio: value / reference (at most 1).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from peerturb.errors import PeerturbError
from peerturb_bench.rows import Row

PROBES, TOKENS = 32, 32
_SHAPE = {"width": 512, "layers": 12, "heads": 8, "key_value_heads": 8, "inner": 1376, "vocabulary": 16384}
_MIB = 2**20


class NoMarkError(PeerturbError):
    """The kernel does not tell or reset a process's high-water mark."""


def run(quick: bool = False) -> list[Row]:
    """Measure in a process of its own, for f32 and bf16."""
    return [_row(dtype) for dtype in (("float32",) if quick else ("float32", "bfloat16"))]


def _row(dtype: str) -> Row:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-m", "peerturb_bench.memory", dtype],
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
        name=f"cpu {dtype}, {PROBES} probes x {TOKENS} tokens, weights {weights:.0f} MiB",
        value=extra / _MIB,
        unit="MiB",
        reference=limit / _MIB,
        ratio=extra / limit,
    )


def _measure(dtype: str) -> dict[str, float]:
    """Return peaks above the loaded model and the sizes of weights and widest activation, in bytes."""
    from peerturb.ids import RoundNumber, Slot
    from peerturb_bench.step import Case, build_engine

    case = Case(name="llama-60m", dtype=dtype, probes=PROBES, tokens=TOKENS, **_SHAPE)  # type: ignore[arg-type]
    engine = build_engine(case)
    slot = Slot(0)
    drawn = engine.drawn(RoundNumber(0), slot, case.probes)
    groups = list(engine.micro_batches(drawn))
    batches = [[engine.items[drawn[sample, 0]] for sample in samples for _ in range(2)] for samples in groups]

    def infer() -> None:
        for batch in batches:
            engine.evaluator.losses(batch)

    peaks = {
        "inference": _peak(infer),
        "probe": _peak(lambda: engine.measure(RoundNumber(0), slot=slot)),
    }
    itemsize = 4 if dtype == "float32" else 2
    rows = max(len(batch) for batch in batches)
    weights = sum(tensor.numel() * itemsize for _, tensor in engine.evaluator.parameters)
    return {**peaks, "weights": weights, "tile": rows * TOKENS * _SHAPE["inner"] * itemsize}


def _peak(work: Callable[[], object]) -> float:
    """Return by how many bytes `work` raises the process's memory, the third time."""
    work()
    work()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise NoMarkError(f"this kernel does not tell {field}")


if __name__ == "__main__":
    json.dump(_measure(sys.argv[1]), sys.stdout)
