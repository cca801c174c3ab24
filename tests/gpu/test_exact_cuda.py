"""Exact projections on a card: those of the CPU to far less than a code."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.gradients import Backward
from peerturb.zo.kinds import Form
from peerturb.zo.objective import Objective
from peerturb.zo.projection import Projector
from tests.zo_models import EXCLUDE, byte_tokenizer, manifest_of, small_model, spec_of

pytestmark = pytest.mark.gpu
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {"kind": "text"},
    "classes": {"kind": "classes", "classes": ["0", "1", "2"]},
    "seq2seq": {"kind": "completion", "completion": " {answer}"},
}
EXAMPLES = [
    Example(prompt=prompt, completion=answer, label=str(number % 3), where="x")
    for number, (prompt, answer) in enumerate([("hello there", " yes"), ("to be", " or not to"), ("abc", " d")])
]


def projections(kind: str, name: str, family: Any, dtype: torch.dtype, device: str) -> NDArray[np.float64]:
    model = small_model(name, kind=kind)
    manifest = manifest_of(model, exclude=EXCLUDE.get(name, ()))
    model = model.to(dtype).to(device)
    objective = Objective(spec_of(objective=OBJECTIVES[kind]).objective, byte_tokenizer(), form=Form.of(model))
    runner, items = Runner(model, manifest, objective), objective.encode(EXAMPLES, source="x")
    gradient = Backward(runner, items, rows_max=2).gradient(items)
    assert gradient is not None
    projector = Projector(manifest, gradient.tensors, family)
    return projector.project(run_key=77, round=3, slot=2, count=130)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("causal", "llama-tied"), ("causal", "gpt2"), ("causal", "mixtral"), ("classes", "bert"), ("seq2seq", "t5")],
)
def test_projections_are_those_of_the_cpu(kind: str, name: str, dtype: torch.dtype, family: str) -> None:
    expected = projections(kind, name, family, dtype, "cpu")
    found = projections(kind, name, family, dtype, "cuda")
    rms = float(np.sqrt(np.mean(expected**2)))
    assert np.abs(found - expected).max() < (0.02 if dtype == torch.float32 else 0.4) * rms
    assert np.corrcoef(found, expected)[0, 1] > (0.9999 if dtype == torch.float32 else 0.98)
