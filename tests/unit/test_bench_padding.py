"""The benchmark of padding counts the engine's own batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.zo.batch import Runner
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Rows
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.probe import ProbeEngine
from peerturb_bench import padding
from peerturb_bench.single import Case, demo_case
from tests.zo_models import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def case() -> Case:
    """The demo's, its examples cut to many lengths."""
    whole = demo_case(slots=1, heldout=24)
    items = [
        replace(item, tokens=item.tokens[:length], start=length)
        for number, item in enumerate(whole.parts[0][:240])
        for length in [min(len(item.tokens), 4 + number % 29)]
    ]
    return replace(whole, parts=(items,))


class Watched(Runner):
    """Computes, and counts the tokens it was given."""

    computed = 0

    def logits(self, rows: Rows, perturbation: Perturbation | None = None) -> torch.Tensor:
        self.computed += rows.ids.numel()
        return super().logits(rows, perturbation)


def test_a_recorded_round_has_the_batches_of_a_computed_one(case: Case) -> None:
    spec = case.run_spec(seed=0, probes_max=6)
    watched = Watched(case.model, build_manifest(case.model, spec.model), case.objective)
    recorder = padding.Recorder(case.model, spec, case.objective)
    tokens = [
        ProbeEngine(runner, spec, case.parts[0], rows_max=8).measure(RoundNumber(0), slot=Slot(0)).tokens
        for runner in (watched, recorder)
    ]
    assert recorder.computed == watched.computed > 0
    assert tokens[0] == tokens[1]
    assert max(rows for rows, _ in recorder.shapes) <= 8


def test_one_example_alone_wastes_nothing(case: Case) -> None:
    spec = padding._spec(case, budget_ms=0, examples=1)
    per_example = case.objective.per_example
    assert padding.engine_ratio(case, spec, rounds=1, rows_max=2 * per_example) == (1.0, 2 * per_example)
    assert padding.plain_ratio(case.objective, case.parts[0], 1) == 1.0


def test_plain_padding_is_to_the_longest(case: Case) -> None:
    pair = sorted(case.parts[0], key=lambda item: len(item.tokens))
    short, long = pair[0], pair[-1]
    alone = [padding.alone(case.objective, item) for item in (short, long)]
    assert alone[0] < alone[1]
    assert padding.plain_ratio(case.objective, [short, long], 2) == pytest.approx(2 * alone[1] / sum(alone))


def test_rows_compare_the_engine_with_plain_padding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "ROWS", (4, 16))
    monkeypatch.setattr(padding, "PROBES", 16)
    rows = padding.count(case, rounds=1)
    table = {row.name: row for row in rows}
    plain = table["plain, 16 rows"]
    examples = case.spec.objective.examples_per_probe
    for how in ("whole contribution", "windows"):
        row = table[f"engine, {how}, {examples} a probe, 16 rows"]
        assert row.reference == plain.value
        assert row.value is not None
        assert row.reference is not None
        assert row.ratio is not None
        assert row.ratio == pytest.approx(row.reference / row.value)
        assert np.isfinite(row.value)
        assert row.value >= 1
        assert row.ratio > 1  # sorted by length, it wastes less
    assert sum("own choice" in name for name in table) == (4 if examples > 1 else 2)
