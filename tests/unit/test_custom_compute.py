"""A node's compute on a user's evaluator: applies, starts over, saves and restores, and refuses other base weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerturb.errors import LogError, ModelError, RefusedError
from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.spec import ObjectiveSpec, RoundSpec, RunSpec
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.digest import short_digest
from peerturb.zo.local import LocalRun
from peerturb_node.compute.custom import CustomCompute
from tests.zo_models import one_thread

__all__ = ["one_thread"]

ITEMS = list(zip(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.ones(20, 1), strict=True))


def build(**more: Any) -> tuple[CustomCompute[Any], RunSpec]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    spec = RunSpec(
        name="unit",
        model=base_spec(module, name="m"),
        round=RoundSpec(probes_max=8),
        objective=ObjectiveSpec(examples_per_probe=2),
    )

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        squares: Tensor = (outputs - batch[1]).square().mean(1)
        return squares

    evaluator = CustomEvaluator(module, spec.model, ITEMS, loss=loss)
    given = {"base_digest": spec.model.digest, **more}
    return CustomCompute(spec, evaluator, ITEMS, **given), spec


def advance(compute: CustomCompute[Any]) -> RoundSealed:
    work = Measure(round=RoundNumber(compute.rounds), scale=0.5, count=8)
    measured = compute.measure(work, Slot(0), lambda: False)
    sealed = RoundSealed(
        round=work.round,
        alpha=2.0**-8,
        loss=measured.loss,
        digest=short_digest(compute.digest()),
        slots=(Slot(0),),
        counts=(8,),
        codes=measured.codes,
    )
    compute.apply(sealed)
    return sealed


def test_start_over_save_and_restore(tmp_path: Path) -> None:
    compute, _ = build(held_out=ITEMS)
    start, loss = compute.digest(), compute.evaluate(lambda: False)
    assert loss is not None
    assert loss.examples == 20
    first = advance(compute)
    middle = compute.digest()
    assert middle != start
    compute.save(tmp_path / "c", position=2, chain=bytes(32))
    with pytest.raises(LogError, match="round 0 cannot be applied to weights after 1 rounds"):
        compute.apply(first)
    compute.reset()
    assert (compute.rounds, compute.digest()) == (0, start)
    assert compute.evaluate(lambda: False) == loss
    assert compute.restore(tmp_path / "c") == 1
    assert compute.digest() == middle


def test_held_out_evaluation_can_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerturb_node.compute.custom.EVALUATED_AT_ONCE", 7)
    compute, _ = build(held_out=ITEMS)
    assert compute.evaluate(lambda: True) is None
    assert build()[0].evaluate(lambda: False) is None
    assert not build()[0].has_held_out


def test_other_base_weights_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"the run wants 'm' with digest .*, this program has 000"):
        build(base_digest="0" * 64)


def test_export_is_the_users(tmp_path: Path) -> None:
    written: list[Path] = []
    build(export=written.append)[0].export(tmp_path)
    assert written == [tmp_path]
    with pytest.raises(ModelError, match="gave its compute no `export`"):
        build()[0].export(tmp_path)


def test_a_loss_of_a_group_is_of_all_that_is_held_out() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    spec = RunSpec(name="unit", model=base_spec(module, name="m"), objective=ObjectiveSpec(examples_per_probe=2))

    def loss(outputs: Tensor, batch: Any) -> float:
        return float((outputs - batch[1]).abs().max())  # not the mean of those of parts

    evaluator = CustomEvaluator(module, spec.model, ITEMS, loss=loss, per_probe=2)
    held_out = ITEMS * 5
    compute = CustomCompute(spec, evaluator, ITEMS, base_digest=spec.model.digest, held_out=held_out)
    found = compute.evaluate(lambda: False)
    assert found is not None
    assert found.examples == len(held_out) > 64
    assert found.loss == pytest.approx(LocalRun(evaluator, spec, [ITEMS]).loss(held_out))


def test_what_is_measured_slowly_is_told_and_not_warned_of() -> None:
    assert build()[0].slowness is None
    module = nn.Sequential(nn.Linear(3, 1), nn.PReLU())
    spec = RunSpec(name="unit", model=base_spec(module, name="m"), objective=ObjectiveSpec(examples_per_probe=2))
    evaluator = CustomEvaluator(
        module, spec.model, ITEMS, loss=lambda outputs, batch: (outputs - batch[1]).square().mean(1)
    )
    compute = CustomCompute(spec, evaluator, ITEMS, base_digest=spec.model.digest)  # warnings are errors here
    assert compute.slowness is not None
    assert "the parameter 1.weight" in compute.slowness
