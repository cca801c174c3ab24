"""A node takes exact gradients where run, loss and memory allow them, and says why it does or does not."""

from typing import Any

import pytest
import torch

from peerturb.errors import ModelError, SpecError
from peerturb.spec import RunSpec
from peerturb.zo import gradients
from peerturb.zo.choosing import Wanted, choose_engine
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.exact import ExactEngine
from peerturb.zo.probe import ProbeEngine
from tests.zo_models import one_thread

__all__ = ["one_thread"]

ITEMS = [(torch.tensor([1.0, 2.0, float(n)]), float(n % 2)) for n in range(6)]


def chosen(*estimators: str, wanted: Wanted = "auto", loss: Any = None) -> Any:
    torch.manual_seed(3)
    module = torch.nn.Linear(3, 1)
    spec = RunSpec.model_validate({
        "name": "x", "model": base_spec(module, name="two").model_dump(),
        "perturbation": {"estimators": estimators, **({"exact": {"examples": 4}} if "exact" in estimators else {})},
        "step": {"half_codes": 100},
    })  # fmt: skip
    squares = loss or (lambda outputs, batch: (outputs[:, 0] - batch[1]).square())
    evaluator = CustomEvaluator(module, spec.model, ITEMS, loss=squares)
    return choose_engine(evaluator, spec, ITEMS, wanted=wanted)


def judged(outputs: Any, batch: Any) -> Any:
    return ((outputs[:, 0] > 0.5) != (batch[1] > 0)).double()


@pytest.mark.parametrize(
    ("estimators", "wanted", "found"),
    [
        (("spsa",), "auto", "spsa"), (("spsa",), "spsa", "spsa"), (("exact",), "auto", "exact"),
        (("spsa", "exact"), "auto", "exact"), (("spsa", "exact"), "spsa", "spsa"),
        (("spsa", "exact"), "exact", "exact"),
    ],
)  # fmt: skip
def test_what_the_run_allows_and_a_person_wants(estimators: tuple[str, ...], wanted: Wanted, found: str) -> None:
    choice = chosen(*estimators, wanted=wanted)
    assert choice.estimator == found
    assert isinstance(choice.engine, ExactEngine if found == "exact" else ProbeEngine)
    assert ("4 examples and 4,096 codes a round" in choice.why) == (found == "exact")


@pytest.mark.parametrize(("estimators", "wanted"), [(("spsa",), "exact"), (("exact",), "spsa")])
def test_what_the_run_does_not_allow_is_refused(estimators: tuple[str, ...], wanted: Wanted) -> None:
    with pytest.raises(SpecError, match=f'"{wanted}" is not allowed in this run.*estimator = "auto"'):
        chosen(*estimators, wanted=wanted)


def test_a_loss_without_gradients_falls_back_where_it_may() -> None:
    choice = chosen("spsa", "exact", loss=judged)
    assert choice.estimator == "spsa"
    assert "accuracy, F1 or a reward" in choice.why
    for estimators, wanted in ((("exact",), "auto"), (("spsa", "exact"), "exact")):
        with pytest.raises(ModelError, match="accuracy, F1 or a reward"):
            chosen(*estimators, wanted=wanted, loss=judged)  # type: ignore[arg-type]


def test_too_little_memory_falls_back_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "free_bytes", lambda device: 8)
    choice = chosen("spsa", "exact")
    assert choice.estimator == "spsa"
    assert "not enough memory" in choice.why
    with pytest.raises(ModelError, match="not enough memory"):
        chosen("spsa", "exact", wanted="exact")
