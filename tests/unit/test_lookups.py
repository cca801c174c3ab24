"""Rows of an embedding that all examples share are told from one number for each example, however many there are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerturb.ids import RoundNumber, Slot
from peerturb.spec import ObjectiveSpec, PerturbationSpec, RoundSpec, RunSpec
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.families import RankOne
from peerturb.zo.probe import ProbeEngine
from tests.zo_models import one_thread, written_out

__all__ = ["one_thread"]

WORDS, WIDTH = 30, 8
EPSILON = 1e-2
Use = Callable[[nn.Embedding, Tensor, Tensor], Tensor]
"""(positions, hidden [rows, tokens, width], ids [rows, tokens]) -> hidden."""


class Reader(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self._use = use

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self._use(self.places, self.words(ids), ids)))
        return outputs


def numbers(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


FOLLOWED: dict[str, Use] = {
    "one dimension": lambda places, hidden, ids: hidden + places(numbers(ids)),
    "left": lambda places, hidden, ids: places(numbers(ids)) + hidden,
    "taken away": lambda places, hidden, ids: places(numbers(ids)) - hidden,
    "product": lambda places, hidden, ids: hidden * places(input=numbers(ids)),
    "unsqueezed": lambda places, hidden, ids: hidden + places(numbers(ids)).unsqueeze(0),
    "two dimensions": lambda places, hidden, ids: hidden + places(numbers(ids)[None]),
    "expanded": lambda places, hidden, ids: hidden + places(numbers(ids).expand_as(ids)),
    "one number": lambda places, hidden, ids: hidden + places(torch.tensor(3)),
    "pairs": lambda places, hidden, ids: (
        hidden[:, :, None] + places((numbers(ids)[:, None] - numbers(ids)).abs())
    ).tanh(),
    "one for each row": lambda places, hidden, ids: hidden + places(ids[:, 0])[:, None],
    "rows and tokens flattened": lambda places, hidden, ids: hidden + places(ids.flatten()).view_as(hidden),
}
SLOW: dict[str, Use] = {
    "repeated": lambda places, hidden, ids: hidden + places(numbers(ids)).unsqueeze(0).repeat(len(ids), 1, 1),
    "both ways": lambda places, hidden, ids: hidden + places(numbers(ids)) + places(ids),
    "tokens first": lambda places, hidden, ids: (hidden.transpose(0, 1) + places(numbers(ids)).unsqueeze(1)).transpose(
        0, 1
    ),
    "tokens first and flattened": lambda places, hidden, ids: (
        hidden + places(ids.t().flatten()).view(ids.shape[1], len(ids), -1).transpose(0, 1)
    ),
}


def squares(outputs: Tensor, batch: Any) -> Tensor:
    losses: Tensor = (outputs.flatten(1) - batch[1][:, None]).square().mean(1)
    return losses


def check(use: Use, tokens: int, *, sides: str, family: str = "rank1") -> None:
    """Compare losses with those of written-out weights."""
    torch.manual_seed(0)
    module = Reader(use)
    items = [(row, float(row[0])) for row in torch.randint(0, WORDS, (12, tokens))]
    spec = RunSpec(
        name="unit",
        model=base_spec(module, name="m"),
        perturbation=PerturbationSpec.model_validate({"sides": sides, "epsilon": EPSILON, "family": family}),
        round=RoundSpec(probes_max=4),
        objective=ObjectiveSpec(examples_per_probe=3),
    )
    evaluator = CustomEvaluator(module, spec.model, items[:6], loss=squares)
    engine = ProbeEngine(evaluator, spec, items)
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    drawn = engine.drawn(RoundNumber(0), Slot(0), 4)
    for sample in range(4):
        rows = [items[index] for index in drawn[sample]]
        batch = (torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows]))
        back = -EPSILON if sides == "two" else 0.0
        for step, found in ((EPSILON, measured.plus[sample]), (back, measured.reference[sample])):
            moved = written_out(module, evaluator.manifest, spec, sample, step)
            with torch.no_grad():
                assert found == pytest.approx(float(squares(moved(batch[0]), batch).mean()), rel=2e-6)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("tokens", [5, 6, 12, 24])  # multiples of the trial's rows, and of a forward's
@pytest.mark.parametrize("name", FOLLOWED)
def test_lookups_are_followed(name: str, tokens: int, sides: str) -> None:
    check(FOLLOWED[name], tokens, sides=sides)  # a warning of slowness would be an error here


@pytest.mark.parametrize("name", ["one dimension", "one for each row", "pairs"])
def test_dense_lookups_are_followed(name: str) -> None:
    check(FOLLOWED[name], 12, sides="two", family="dense")


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("tokens", [5, 12, 24])
@pytest.mark.parametrize("name", SLOW)
def test_what_is_not_followed_is_right_all_the_same(name: str, tokens: int, sides: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"the parameter places\.weight cannot be perturbed row by row"):
        check(SLOW[name], tokens, sides=sides)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.width, self.shift = nn.Parameter(1 + torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.warmth, self.gain = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shift - (self.first(x) / self.width - self.shift).tanh()
        outputs: Tensor = self.last((1 - self.gain) / (hidden / self.warmth + 3))
        return outputs


def test_quotients_and_differences_are_followed() -> None:
    torch.manual_seed(0)
    module = Scaled()
    items = list(torch.randn(8, 4))
    spec = RunSpec(
        name="unit",
        model=base_spec(module, name="m"),
        perturbation=PerturbationSpec(epsilon=EPSILON),
        round=RoundSpec(probes_max=4),
        objective=ObjectiveSpec(examples_per_probe=1),
    )
    evaluator = CustomEvaluator(
        module, spec.model, items, loss=lambda found, _: found.square().mean(1), forward=lambda module, x: module(x)
    )
    engine = ProbeEngine(evaluator, spec, items)
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    for sample, (index,) in enumerate(engine.drawn(RoundNumber(0), Slot(0), 4)):
        for step, found in ((EPSILON, measured.plus[sample]), (-EPSILON, measured.reference[sample])):
            moved = written_out(module, evaluator.manifest, spec, sample, step)
            assert found == pytest.approx(float(moved(items[index]).square().mean()), rel=2e-6)


def test_memory_that_runs_out_in_the_trial_is_no_reason_to_go_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    rows = [(torch.randn(4),) for _ in range(8)]
    spec = RunSpec(
        name="unit", model=base_spec(module, name="m"), round=RoundSpec(probes_max=4),
        objective=ObjectiveSpec(examples_per_probe=2),
    )  # fmt: skip
    evaluator = CustomEvaluator(module, spec.model, rows, loss=lambda found, _: found.square().mean(1))

    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RankOne, "add_linear", short)
    with pytest.raises(torch.OutOfMemoryError):
        ProbeEngine(evaluator, spec, rows)
