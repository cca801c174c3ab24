"""A run in one process seals what a coordinator would, starts from the run's weights, and says when it diverges."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerturb.errors import RefusedError
from peerturb.floats import f32
from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.contributions import Contributions
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.messages import Contribution
from peerturb.protocol.records import PeerJoined, RoundOpened, RunStarted
from peerturb.spec import ObjectiveSpec, PerturbationSpec, PlateauSpec, RoundSpec, RunSpec, StepSpec
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.local import LocalRun
from peerturb.zo.probe import ProbeEngine, ProbeResult
from tests.zo_models import one_thread

__all__ = ["one_thread"]

ITEMS = list(
    zip(
        torch.randn(24, 3, generator=torch.Generator().manual_seed(0)),
        torch.randn(24, 1, generator=torch.Generator().manual_seed(1)),
        strict=True,
    )
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def squares(outputs: Tensor, batch: Any) -> Tensor:
    losses: Tensor = (outputs - batch[1]).square().mean(1)
    return losses


def start(module: nn.Module, *, exclude: tuple[str, ...] = (), **more: Any) -> tuple[CustomEvaluator[Any], RunSpec]:
    given: dict[str, Any] = {
        "name": "unit",
        "model": base_spec(module, name="m", exclude=exclude),
        "round": RoundSpec(probes_max=8),
        "objective": ObjectiveSpec(examples_per_probe=2),
        **more,
    }
    spec = RunSpec(**given)
    return CustomEvaluator(module, spec.model, ITEMS[:4], loss=squares), spec


def test_every_round_is_the_one_that_a_coordinator_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepSpec(learning_rate=0.3, schedule="plateau", plateau=PlateauSpec(window=2, patience=1))
    # So small a first scale that it is raised, and a loss that one peer cannot always measure.
    evaluator, spec = start(network(), step=step, perturbation=PerturbationSpec(initial_scale=1e-40))
    said: list[ProbeResult] = []
    contribute = ProbeEngine.contribute

    def overheard(*args: Any, **kwargs: Any) -> ProbeResult:
        said.append(contribute(*args, **kwargs))
        return said[-1]

    monkeypatch.setattr(ProbeEngine, "contribute", overheard)
    nothing = [(x * float("nan"), y) for x, y in ITEMS[:1]]
    run = LocalRun(evaluator, spec, [ITEMS[:12], ITEMS[12:23] + nothing])
    ledger = Ledger.fold([RunStarted(spec=spec)])
    for slot in range(2):
        ledger.apply(PeerJoined(slot=Slot(slot), key=PeerKey(bytes([slot]) * 32), name=str(slot)))
    fractions = set()
    for number in range(24):
        said.clear()
        scale = run.scale
        found = run.step()
        ledger.apply(RoundOpened(round=RoundNumber(number), scale=scale, deadline_ms=spec.round.deadline_ms_max))
        pending = Contributions()
        for slot, result in enumerate(said):
            codes, loss = result.codes.tobytes(), f32(result.loss)
            message = Contribution(round=RoundNumber(number), codes=codes, loss=loss, digest=found.digest)
            pending.add(Slot(slot), message, latency_ms=1)
        sealed = pending.seal(ledger)
        for field in ("round", "alpha", "loss", "digest", "slots", "counts", "codes"):
            assert getattr(found, field) == getattr(sealed, field), field
        fractions.add(ledger.plateau.fraction)
        ledger.apply(sealed)
    assert len(fractions) > 2
    assert any(0x80 in sealed.codes for sealed in run.rounds)
    assert run.plateau == ledger.plateau


def test_a_run_that_diverges_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    evaluator, spec = start(network(), step=StepSpec(learning_rate=1e-3))
    height = [0.0]
    evaluator = CustomEvaluator(
        evaluator.module, spec.model, ITEMS, loss=lambda outputs, batch: squares(outputs, batch) + height[0]
    )
    run = LocalRun(evaluator, spec, [ITEMS])
    for number in range(64):
        height[0] = max(0, number - 24)
        run.step()
    told = [sealed.warning for sealed in run.rounds]
    assert not any(told[:24])
    assert all(told[40:])
    assert "the training loss rises" in told[-1]
    assert "begin a new run with a lower step.learning_rate" in told[-1]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [next(filter(None, told))]


def test_other_weights_than_the_runs_are_refused() -> None:
    evaluator, spec = start(network())
    with torch.no_grad():
        evaluator.parameters[0][1][0] += 1
    with pytest.raises(RefusedError, match=rf"wants 'm' with digest {spec.model.digest}.*the evaluator has .*anew"):
        LocalRun(evaluator, spec, [ITEMS])
    model = base_spec(evaluator.module, name="m")  # as it is now
    LocalRun(evaluator, spec.model_copy(update={"model": model}), [ITEMS]).step()


def test_frozen_weights_are_told_by_the_digest_given() -> None:
    evaluator, spec = start(network(), exclude=("0.*",))
    other = base_spec(network(1), name="m").digest
    with pytest.raises(RefusedError, match=f"the evaluator has {other}"):
        LocalRun(evaluator, spec, [ITEMS], base_digest=other)
    LocalRun(evaluator, spec, [ITEMS], base_digest=spec.model.digest).step()
    LocalRun(evaluator, spec, [ITEMS]).step()  # nothing to tell them by
