"""Applying a round to one matrix, against the loop it replaces: seed a generator, draw a normal tensor, add it.

Both work in the same process, one right after the other, repeatedly, so that a noisy machine slows both alike. The
unit is 10^9 (parameter x perturbation) a second. value: peerturb, the median. reference: the generator loop, the
median; its `add_` carries the code as a factor, as the real loop must. ratio: value / reference, on a CPU in float32
at least 1 000 for `rank1` and 40 for `dense`.

Where there is a CUDA device, rows `cuda ...` follow: ms of an update of all matrices and vectors of a Llama of 6.7 x
10^9 parameters in bfloat16, 160 probes, both families. reference: the limit on an H200 that the project set itself
(another card has another). ratio: value / reference.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peerturb.manifest import DType, Manifest, Parameter
from peerturb.zo import fast
from peerturb.zo.update import Family, apply_update
from peerturb_bench import plots
from peerturb_bench.rows import Row

ALPHA = float(np.float32(1e-6))
TARGETS: dict[Family, float] = {"rank1": 1_000.0, "dense": 40.0}
"""Ratio on a CPU in float32, at least."""
LOOP_DRAWS = 4
"""Perturbations one timing of the loop draws; each costs the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One matrix and how many probes a round brings."""

    family: Family
    dtype: DType
    rows: int
    columns: int
    probes: int

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.family} {self.dtype} {self.rows}x{self.columns}, {self.probes} probes"


CASES = (
    Case(family="rank1", dtype="float32", rows=1024, columns=1024, probes=512),
    Case(family="rank1", dtype="float32", rows=4096, columns=4096, probes=512),
    Case(family="rank1", dtype="float32", rows=4096, columns=4096, probes=4096),
    Case(family="rank1", dtype="bfloat16", rows=4096, columns=4096, probes=512),
    Case(family="dense", dtype="float32", rows=1024, columns=1024, probes=128),
)
QUICK_CASES = (
    Case(family="rank1", dtype="float32", rows=1024, columns=1024, probes=512),
    Case(family="dense", dtype="float32", rows=512, columns=512, probes=64),
)


GPU_LAYERS = 32
GPU_PROBES = 160
GPU_LIMITS_MS: dict[Family, float] = {"rank1": 25.0, "dense": 500.0}
"""For all GPU_LAYERS layers on an H200."""
GPU_BYTES_SPARE = 2**30
"""Memory left free for signs and the allocator."""


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure and return one row a case, `rank1 ...` and `dense ...`, then `cuda ...` where there is such a device."""
    rows = [measure(case, repeats=3 if quick else 7) for case in (QUICK_CASES if quick else CASES)]
    on_gpu: list[Row] = []
    if torch.cuda.is_available():
        on_gpu = gpu_rows(torch.device("cuda", torch.cuda.current_device()), repeats=3 if quick else 7)
    if out is not None:
        draw(rows, on_gpu, out)
    return rows + on_gpu


def draw(rows: Sequence[Row], on_gpu: Sequence[Row], out: Path) -> None:
    """Draw the ratios on the CPU in `update.png`, those on a GPU, if any, in `update-cuda.png`."""
    plots.bars(
        out / "update.png",
        [plots.Bar(label=row.name, value=row.ratio, target=TARGETS[_family(row)]) for row in rows if row.ratio],
        title="Applying a round, against the generator loop",
        axis="times as fast",
        is_log=True,
    )
    if on_gpu:
        found = [plots.Bar(label=row.name, value=row.ratio, target=1.0) for row in on_gpu if row.ratio]
        plots.bars(out / "update-cuda.png", found, title="Update of a whole model", axis="times the limit")


def _family(row: Row) -> Family:
    """Return the family that a CPU row's name begins with."""
    return "rank1" if row.name.startswith("rank1") else "dense"


def gpu_rows(device: torch.device, *, repeats: int) -> list[Row]:
    """Return a row for each family: a whole model's update on the device, of as many layers as its memory holds."""
    free = torch.cuda.mem_get_info(device)[0]
    layers = max(
        (count for count in range(1, GPU_LAYERS + 1) if 2 * _elements(llama(count)) + GPU_BYTES_SPARE <= free),
        default=0,
    )
    if layers == 0:
        return []
    manifest = llama(layers)
    weights = [torch.empty(p.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02) for p in manifest]
    families: tuple[Family, ...] = ("rank1", "dense")
    return [measure_model(family, manifest, weights, repeats=repeats) for family in families]


def measure_model(family: Family, manifest: Manifest, weights: Sequence[Tensor], *, repeats: int) -> Row:
    """Time updates of a whole model; the limit is scaled to its share of the full number of parameters."""
    generator = np.random.default_rng(0)
    codes = np.clip(np.rint(generator.normal(0, 32, GPU_PROBES)), -127, 127).astype(np.int8)

    def apply(round: int) -> None:
        apply_update(
            weights, manifest, family=family, run_key=1, round=round, slots=[0], counts=[GPU_PROBES], codes=codes,
            alpha=ALPHA,
        )  # fmt: skip
        if weights[0].device.type == "cuda":
            torch.cuda.synchronize(weights[0].device)

    apply(0)
    value = statistics.median(_seconds(apply, repeat) for repeat in range(1, repeats + 1)) * 1e3
    limit = GPU_LIMITS_MS[family] * _elements(manifest) / _elements(llama(GPU_LAYERS))
    device = weights[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    way = "Triton" if fast.kernels(device) is not None else "torch"
    what = f"{family} bfloat16, {_elements(manifest) / 1e9:.3g} G parameters, {GPU_PROBES} probes"
    return Row(
        name=f"{device.type} {what} ({name}, {way})",
        value=float(f"{value:.4g}"), unit="ms", reference=float(f"{limit:.4g}"), ratio=float(f"{value / limit:.4g}"),
    )  # fmt: skip


def llama(layers: int, width: int = 4096, inner: int = 11_008, vocabulary: int = 32_000) -> Manifest:
    """Return the tensors of a Llama, 6.7 G parameters with 32 layers."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (vocabulary, width), (width,)]
    for _ in range(layers):
        shapes += [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)] + [(width,)] * 2
    return tuple(Parameter(index=i, name=f"t{i}", shape=s, dtype="bfloat16") for i, s in enumerate(shapes))


def _elements(manifest: Manifest) -> int:
    return sum(parameter.elements for parameter in manifest)


def measure(case: Case, *, repeats: int) -> Row:
    """Time both ways `repeats` times, alternating."""
    generator = np.random.default_rng(0)
    codes = np.clip(np.rint(generator.normal(0, 32, case.probes)), -127, 127).astype(np.int8)
    parameter = Parameter(index=0, name="weight", shape=(case.rows, case.columns), dtype=case.dtype)
    weight = torch.randn(parameter.shape).mul_(0.02).to(getattr(torch, case.dtype))

    def apply(round: int) -> None:
        apply_update(
            [weight], (parameter,), family=case.family, run_key=1, round=round, slots=[0], counts=[case.probes],
            codes=codes, alpha=ALPHA,
        )  # fmt: skip

    apply(0)
    draw_and_add(weight, codes[:1], 0)
    drawn = codes[:LOOP_DRAWS]
    ours, theirs = [], []
    for repeat in range(1, repeats + 1):
        ours.append(parameter.elements * case.probes / _seconds(apply, repeat))
        theirs.append(parameter.elements * len(drawn) / _seconds(partial(draw_and_add, weight, drawn), repeat))
    value, reference = statistics.median(ours) / 1e9, statistics.median(theirs) / 1e9
    value, reference, ratio = (float(f"{figure:.4g}") for figure in (value, reference, value / reference))
    return Row(name=case.name, unit="G/s", value=value, reference=reference, ratio=ratio)


def draw_and_add(weight: Tensor, codes: np.typing.NDArray[np.int8], seed: int) -> None:
    """Do for each code what the generator loop does: seed, draw a normal tensor of the weight's shape, add."""
    generator = torch.Generator()
    for number, code in enumerate(codes.tolist()):
        generator.manual_seed(seed * 1_000_003 + number)
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.add_(noise, alpha=-ALPHA * code)


def _seconds(work: Callable[[int], None], argument: int) -> float:
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start
