"""Replaying a long log, beside the sum of what its parts must cost: generator, products, passes over the weights.

A log of plausible codes (normal, rms 32) is replayed onto stories3m by the code of `peerturb log replay`; the parts are
timed one by one on the same plan of the same model right after it, on as many threads. value: seconds; reference: 90 s
for 10 000 rounds of 64 probes, scaled to fewer in the quick form; ratio: value / reference (at most 1). For the parts
the reference is the replay.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peerturb import stepping
from peerturb.errors import DataError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.protocol.records import RoundSealed
from peerturb.spec import ModelSpec, RunSpec
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.directions import Probes
from peerturb.zo.gemm import exact_product
from peerturb.zo.model import base_digest, build_manifest, load_model, trainable_weights
from peerturb.zo.parallel import in_parallel
from peerturb.zo.plan import PIECES_PER_THREAD, Group, plan_groups
from peerturb.zo.replay import CHECK_EVERY, replay
from peerturb.zo.rounding import subtract
from peerturb.zo.update import apply_update
from peerturb_bench import plots
from peerturb_bench.rows import Row
from peerturb_bench.single import shared_folder

ROUNDS, QUICK_ROUNDS = 10_000, 300
SLOTS, PROBES = 4, 16
"""Contributions a round and codes in each."""
SECONDS_MAX = 90.0
_CODE_RMS = 32.0
_PART_ROUNDS = 100
"""Rounds over which a part is timed."""


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure and return the rows `N rounds x 64`, one for each part, and their sum."""
    rows = measure(QUICK_ROUNDS if quick else ROUNDS)
    if out is not None:
        draw(rows, out / "replay.png")
    return rows


def measure(rounds: int) -> list[Row]:
    """Replay so many rounds and time the parts.

    Raises:
        DataError: the folder of test models is missing.
    """
    folder = shared_folder()
    if folder is None:
        raise DataError("this benchmark needs the folder of test models: PEERTURB_SHARED names it")
    model, _ = load_model(folder / "models" / "stories3m", "float32")
    spec = RunSpec(name="replay", model=ModelSpec(name="stories3m", digest=base_digest(model, "float32")))
    manifest = build_manifest(model, spec.model)
    weights = list(trainable_weights(model, manifest).values())
    base = [weight.clone() for weight in weights]
    log = _log(spec, manifest, weights, rounds)
    for weight, kept in zip(weights, base, strict=True):
        weight.copy_(kept)
    started_s = time.perf_counter()
    replay(log, weights, manifest, spec)
    seconds = time.perf_counter() - started_s
    limit_s = SECONDS_MAX * rounds / ROUNDS
    name = f"{rounds} rounds x {SLOTS * PROBES}"
    rows = [Row(name=name, value=seconds, unit="s", reference=limit_s, ratio=seconds / limit_s)]
    floor_s = 0.0
    for part, part_s in _parts(spec, manifest, weights).items():
        part_s *= rounds
        floor_s += part_s
        rows.append(Row(name=f"  {part}", value=part_s, unit="s", reference=seconds, ratio=part_s / seconds))
    rows.append(Row(name="  sum of the parts", value=floor_s, unit="s", reference=seconds, ratio=floor_s / seconds))
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the replay beside its parts, end to end."""
    whole, *parts, _ = [plots.Bar(label=row.name.strip(), value=row.value or 0.0, target=row.reference) for row in rows]
    plots.parts(path, whole, parts, title="Replay of a log, beside what its parts cost alone", axis="seconds")


def _log(spec: RunSpec, manifest: Manifest, weights: Sequence[Tensor], rounds: int) -> list[RoundSealed]:
    """Return sealed rounds with the digests of the weights they really give, where replay looks at them."""
    generator = np.random.default_rng(1)
    scale, log = 0.5, []
    for number in range(rounds):
        drawn = np.rint(generator.normal(0.0, _CODE_RMS, SLOTS * PROBES))
        codes = np.clip(drawn, -127, 127).astype(np.int8).tobytes()
        sealed = RoundSealed(
            round=RoundNumber(number),
            alpha=stepping.step_size(spec.step, number, scale, codes, spec.round.count),
            loss=2.0,
            digest=short_digest(run_digest(manifest, weights)) if number % CHECK_EVERY == 0 else 0,
            slots=tuple(Slot(slot) for slot in range(SLOTS)),
            counts=(PROBES,) * SLOTS,
            codes=codes,
        )
        _apply(spec, manifest, weights, sealed)
        log.append(sealed)
    return log


def _apply(spec: RunSpec, manifest: Manifest, weights: Sequence[Tensor], sealed: RoundSealed) -> None:
    apply_update(
        weights, manifest, family=spec.perturbation.family, run_key=spec.run_key, round=sealed.round,
        slots=sealed.slots, counts=sealed.counts, codes=sealed.codes, alpha=sealed.alpha,
    )  # fmt: skip


def _parts(spec: RunSpec, manifest: Manifest, weights: Sequence[Tensor]) -> dict[str, float]:
    """Return seconds a round of each part alone, on the update's own groups and threads."""
    count = SLOTS * PROBES
    samples = np.tile(np.arange(PROBES), SLOTS)
    probes = Probes.of(run_key=spec.run_key, round=1, slots=np.repeat(np.arange(SLOTS), PROBES), samples=samples)
    factors = np.ones(count, np.int8)
    pieces = PIECES_PER_THREAD * torch.get_num_threads()
    groups = plan_groups(manifest, False, "cpu", count, pieces)
    device = torch.device("cpu")
    signs = {id(g): g.table.scaled_signs(probes, device, rows=count, factors=factors, columns=0) for g in groups}
    totals = {id(g): [_product(signs[id(g)], pair) for pair in g.pairs] for g in groups}
    flats = {p.index: w.reshape(-1).clone() for p, w in zip(manifest, weights, strict=True)}

    def generate(group: Group) -> None:
        group.table.scaled_signs(probes, device, rows=count, factors=factors, columns=0)

    @torch.no_grad()
    def multiply(group: Group) -> None:
        for pair in group.pairs:
            _product(signs[id(group)], pair)

    @torch.no_grad()
    def pass_over(group: Group) -> None:
        for tile, total in zip(group.tiles, totals[id(group)], strict=True):
            subtract(flats[tile.parameter.index], tile.first, total, tile.parameter, probes, 0.0, 0)

    works = {"generator": generate, "products": multiply, "passes over the weights": pass_over}
    seconds = {name: _seconds(lambda work=work: in_parallel(work, groups)) for name, work in works.items()}  # type: ignore[misc]
    seconds["digests"] = _seconds(lambda: run_digest(manifest, weights)) / CHECK_EVERY
    return seconds


def _product(signs: Tensor, pair: tuple[slice, slice | None]) -> Tensor:
    left, right = pair
    ones = torch.ones((len(signs), 1), dtype=torch.int8)
    return exact_product(signs[:, left], ones if right is None else signs[:, right])


def _seconds(work: Callable[[], object]) -> float:
    """Return the mean time of `work` after a first time."""
    work()
    started_s = time.perf_counter()
    for _ in range(_PART_ROUNDS):
        work()
    return (time.perf_counter() - started_s) / _PART_ROUNDS
