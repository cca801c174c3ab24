"""Exact codes are those that central differences of the same batch give, over families of models and directions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from peerturb.codec import encode
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.families import FAMILIES
from peerturb.zo.gradients import Backward
from peerturb.zo.kinds import Form
from peerturb.zo.objective import Objective
from peerturb.zo.projection import Projector
from tests.zo_models import (
    CLASSIFIERS,
    CONFIGS,
    EXCLUDE,
    SEQ2SEQ,
    byte_tokenizer,
    manifest_of,
    one_thread,
    small_model,
    spec_of,
)

__all__ = ["one_thread"]

OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {"kind": "text"},
    "classes": {"kind": "classes", "classes": ["0", "1", "2"]},
    "seq2seq": {"kind": "completion", "completion": " {answer}"},
}
CASES = [
    *(("causal", name) for name in sorted(CONFIGS)),
    *(("classes", name) for name in sorted(CLASSIFIERS)),
    *(("seq2seq", name) for name in sorted(SEQ2SEQ)),
]
EXAMPLES = [
    Example(prompt=prompt, completion=answer, label=str(number % 3), where="x")
    for number, (prompt, answer) in enumerate([("hello there", " yes"), ("to be", " or not to"), ("abc", " d")])
]
COUNT, ROUND, SLOT, RUN_KEY = 5, 3, 2, 77
EPSILON = 1e-6
"""In float64: the cubic term is far below rounding, rounding (1e-16 / 1e-6) far below a code."""


class Wide(TorchFunctionMode):
    """Float32 is float64: some models take their norms and rotations in float32, and differences show its rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def runner_of(kind: str, name: str, dtype: torch.dtype) -> tuple[Runner, Any]:
    """A model whose tensors have exponents 0, 2 and -1 in turn, and its examples."""
    model = small_model(name, kind=kind)
    manifest = tuple(
        replace(entry, exponent=(0, 2, -1)[entry.index % 3])
        for entry in manifest_of(model, exclude=EXCLUDE.get(name, ()))
    )
    model = model.to(dtype)
    spec = spec_of(objective=OBJECTIVES[kind])
    objective = Objective(spec.objective, byte_tokenizer(), form=Form.of(model))
    return Runner(model, manifest, objective), objective.encode(EXAMPLES, source="x")


def differences(runner: Runner, items: Any, family: str, count: int = COUNT) -> NDArray[np.float64]:
    """(L+ - L-) / 2 epsilon of the mean loss, every direction on all items."""
    probes = Probes.of(run_key=RUN_KEY, round=ROUND, slots=SLOT, samples=np.arange(count))
    perturbation = FAMILIES[family](
        Directions(probes), probes=count, epsilon=EPSILON, dtype=runner.dtype, device=runner.device
    )
    losses = runner.losses(list(items) * count, perturbation).double().mean(2)
    found: NDArray[np.float64] = ((losses[:, 0] - losses[:, 1]) / (2 * EPSILON)).numpy()
    return found


def projections(runner: Runner, items: Any, family: Any, count: int = COUNT) -> NDArray[np.float64]:
    """<gradient of the mean loss, z>, by one backward pass of each micro-batch."""
    gradient = Backward(runner, items, rows_max=2).gradient(items)
    assert gradient is not None
    projector = Projector(tuple(entry for entry, _ in runner.parameters), gradient.tensors, family)
    return projector.project(run_key=RUN_KEY, round=ROUND, slot=SLOT, count=count)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_exact_projections_are_central_differences(kind: str, name: str, family: str) -> None:
    runner, items = runner_of(kind, name, torch.float64)
    with Wide():
        exact, measured = projections(runner, items, family), differences(runner, items, family)
    rms = float(np.sqrt(np.mean(measured**2)))
    assert rms > 1e-3
    # A thousand times finer than a code: only where rounding to a byte falls on the edge may codes differ by one.
    np.testing.assert_allclose(exact, measured, rtol=0, atol=1e-3 * rms / 32)
    codes = [encode(values, rms / 32).astype(int) for values in (exact, measured)]
    assert np.abs(codes[0] - codes[1]).max() <= 1


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("causal", "llama-tied"), ("causal", "gpt2"), ("causal", "qwen3-moe"), ("classes", "bert"), ("seq2seq", "t5")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_types_of_training_codes_keep_their_resolution(
    dtype: torch.dtype, kind: str, name: str, family: str
) -> None:
    truth = projections(*runner_of(kind, name, torch.float64), family, count=64)
    found = projections(*runner_of(kind, name, dtype), family, count=64)
    scale = float(np.sqrt(np.mean(truth**2))) / 32
    error = np.abs(encode(found, scale).astype(int) - encode(truth, scale).astype(int))
    # bfloat16 activations differ from float32's by more than a byte's rounding; the direction of the sum is the same.
    assert error.max() <= (1 if dtype == torch.float32 else 12)
    assert np.corrcoef(found, truth)[0, 1] > (0.99999 if dtype == torch.float32 else 0.98)
