"""Tokens computed over tokens needed: the engine's micro-batches against plain padding in random order.

Real examples (SST-2 for stories3m, with the label prompt, none cut short) of many lengths. Counted from the batches
themselves: the engine measures whole rounds with a model that only notes the shapes it is given. Needed is what each
example takes alone. value: computed / needed in the engine's batches of at most so many rows (a sequence has two, one
for each side), sorted over a whole contribution (`budget_ms = 0`) or, where time may cut it short, within windows.
reference: the same for batches of as many sequences in random order, padded to the longest. ratio: reference / value,
how many times fewer tokens are computed. Where the engine chooses the rows itself, the reference has as many as its
largest batch. Examples of one probe are sorted apart from each other, as units of their own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerturb.ids import RoundNumber, Slot
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective, Rows, TokenSequence
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.probe import ProbeEngine
from peerturb_bench import plots
from peerturb_bench.cases import SST2, load
from peerturb_bench.rows import Row
from peerturb_bench.single import Case

TASK = replace(SST2, objective=SST2.objective.model_copy(update={"tokens_max": 128}))
ROWS = (16, 32, 128)
PROBES = 64
ROUNDS, QUICK_ROUNDS = 16, 2
BUDGET_MS = 1_000
"""Any budget makes windows; nothing here takes time."""


class Recorder(Runner):
    """A runner that notes the shape of each batch and does not compute it: its logits are zeros."""

    def __init__(self, model: Any, spec: RunSpec, objective: Objective) -> None:
        super().__init__(model, build_manifest(model, spec.model), objective)
        self.shapes: list[tuple[int, int]] = []
        """(rows, tokens) of each batch, padding included."""

    def logits(self, rows: Rows, perturbation: Perturbation | None = None) -> Tensor:
        """See `Runner`."""
        self.shapes.append((rows.ids.shape[0], rows.ids.shape[1]))
        scored = rows.ids.shape[1] if rows.positions is None else rows.positions.shape[1]
        return torch.zeros(len(rows.ids), scored, self._vocabulary)

    @property
    def computed(self) -> int:
        """Tokens of all batches so far."""
        return sum(rows * tokens for rows, tokens in self.shapes)


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Count and return rows `plain, N rows` and `engine, ...`."""
    rows = count(load(TASK), rounds=QUICK_ROUNDS if quick else ROUNDS)
    if out is not None:
        draw(rows, out / "padding.png")
    return rows


def count(case: Case, *, rounds: int) -> list[Row]:
    """Return the rows of a case whose examples have one part."""
    items = case.parts[0]
    plain = {size: plain_ratio(case.objective, items, size) for size in ROWS}
    rows = [_row(f"plain, {size} rows", ratio) for size, ratio in plain.items()]
    per_probe = case.spec.objective.examples_per_probe
    plans = [(size, per_probe) for size in (*ROWS, None)] + ([(None, 1)] if per_probe > 1 else [])
    for budget_ms, how in ((0, "whole contribution"), (BUDGET_MS, "windows")):
        for size, examples in plans:
            spec = _spec(case, budget_ms=budget_ms, examples=examples)
            ratio, largest = engine_ratio(case, spec, rounds=rounds, rows_max=size)
            reference = plain[size] if size else plain_ratio(case.objective, items, largest)
            limit = f"{size} rows" if size else f"own choice of at most {largest}"
            rows.append(_row(f"engine, {how}, {examples} a probe, {limit}", ratio, reference))
    return rows


def plain_ratio(objective: Objective, items: list[TokenSequence], size: int) -> float:
    """Return tokens computed over needed in batches of `size` examples in random order, over several epochs."""
    generator = np.random.default_rng(0)
    computed = needed = 0
    for _ in range(8):
        order = generator.permutation(len(items)).tolist()
        for begin in range(0, len(order) - size + 1, size):
            part = [items[index] for index in order[begin : begin + size]]
            computed += objective.rows(part).ids.numel()
            needed += sum(alone(objective, item) for item in part)
    return computed / needed


def engine_ratio(case: Case, spec: RunSpec, *, rounds: int, rows_max: int | None) -> tuple[float, int]:
    """Return tokens computed over needed in the engine's batches, and the rows of the largest."""
    recorder = Recorder(case.model, spec, case.objective)
    engine = ProbeEngine(recorder, spec, case.parts[0], rows_max=rows_max)
    needed = 0
    for number in range(rounds):
        engine.measure(RoundNumber(number), slot=Slot(0))
        drawn = engine.drawn(RoundNumber(number), Slot(0), PROBES)
        needed += 2 * sum(alone(case.objective, engine.items[index]) for index in drawn.flatten().tolist())
    return recorder.computed / needed, max(rows for rows, _ in recorder.shapes)


def _spec(case: Case, *, budget_ms: int, examples: int) -> RunSpec:
    document = case.run_spec(seed=0, probes_max=PROBES).model_dump(mode="json")
    document["round"]["budget_ms"] = budget_ms
    document["objective"]["examples_per_probe"] = examples
    return RunSpec.from_document(document, source="the benchmark's run")


def alone(objective: Objective, item: TokenSequence) -> int:
    """Return the tokens that one example takes without any padding, at one side of a probe."""
    return objective.rows([item]).ids.numel()


def draw(rows: list[Row], path: Path) -> None:
    """Draw all figures, plain padding in grey."""
    found = [
        plots.Bar(
            label=row.name, value=row.value, target=1.0, colour=plots.GREY if row.reference is None else plots.BLUE
        )
        for row in rows
        if row.value is not None
    ]
    plots.bars(path, found, title="Padding: tokens computed, SST-2", axis="times the tokens needed")


def _row(name: str, value: float, reference: float | None = None) -> Row:
    ratio = None if reference is None else reference / value
    return Row(name=name, value=value, unit="computed/needed", reference=reference, ratio=ratio)
