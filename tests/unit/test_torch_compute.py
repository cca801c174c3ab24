"""A node's compute on small models: other kinds of models, and losses in another type than the weights'."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerturb.errors import RefusedError, SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.kinds import Task
from peerturb.zo.model import base_digest, load_model
from peerturb_node.compute.torch_compute import TorchCompute
from peerturb_node.doctor.replica import Replica
from peerturb_node.settings import NodeSettings, load
from tests.zo_models import byte_tokenizer, one_thread, small_model

__all__ = ["one_thread"]

CLASSES = {"kind": "classes", "classes": ["bad", "good"], "tokens_max": 24}
COMPLETION = {"kind": "completion", "template": "{text}", "completion": "{label}", "tokens_max": 24}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [("a fine film", "good"), ("no", "bad"), ("what a bore it is", "bad"), ("see it again!", "good")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def folder_of(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def spec_for(folder: Path, objective: dict[str, Any], *, seed: int = 5, **fields: Any) -> RunSpec:
    task = Task(classes=len(objective.get("classes", ())), seed=seed)
    digest = base_digest(load_model(folder, "float32", task=task)[0], "float32")
    return RunSpec.model_validate(
        {
            "name": "test",
            "seed": seed,
            "model": {"name": "test", "digest": digest},
            "objective": objective,
            "round": {"probes_max": 6},
            **fields,
        }
    )


def compute_of(spec: RunSpec, folder: Path, data: Path, **settings: Any) -> TorchCompute:
    return TorchCompute(
        spec, NodeSettings(coordinator="h:1", model=str(folder), data=data, eval=data, device="cpu", **settings)
    )


def round_of(compute: TorchCompute) -> RoundSealed:
    measured = compute.measure(Measure(round=RoundNumber(0), scale=0.5, count=6), Slot(0), lambda: False)
    assert len(measured.codes) == 6
    assert np.isfinite(measured.loss)
    assert set(measured.codes) - {0, 128}  # neither all zero nor void
    return RoundSealed(
        round=RoundNumber(0),
        alpha=2.0**-14,
        loss=measured.loss,
        digest=0,
        slots=(Slot(0),),
        counts=(6,),
        codes=measured.codes,
    )


@pytest.mark.parametrize("kind", ["bert without head", "roberta", "t5"])
def test_other_kinds_of_models_take_part(kind: str, tmp_path: Path, data: Path) -> None:
    if kind == "t5":
        model, objective = small_model("t5", kind="seq2seq"), COMPLETION
    elif kind == "roberta":
        model, objective = small_model("roberta", kind="classes"), CLASSES | {"classes": ["bad", "good", "fair"]}
    else:
        model, objective = small_model("bert", kind="classes").bert, CLASSES
    spec = spec_for(folder_of(model, tmp_path / "base"), objective)
    compute = compute_of(spec, tmp_path / "base", data)
    before = compute.digest()
    compute.apply(round_of(compute))
    after = compute.digest()
    assert after != before
    held_out = compute.evaluate(lambda: False)
    assert held_out is not None
    assert (held_out.accuracy is None) == (kind == "t5")
    compute.export(tmp_path / "out")
    task = Task(classes=len(spec.objective.classes))
    exported, _ = load_model(tmp_path / "out", "float32", task=task)  # its head is in the files now
    assert bytes.fromhex(base_digest(exported, "float32")) == after
    if kind != "t5":
        assert exported.config.id2label == dict(enumerate(spec.objective.classes))
    compute.reset()
    assert compute.digest() == before


def test_a_head_of_another_seed_is_refused(tmp_path: Path, data: Path) -> None:
    folder = folder_of(small_model("bert", kind="classes").bert, tmp_path / "base")
    spec = spec_for(folder, CLASSES)
    with pytest.raises(RefusedError, match="the base weights differ"):
        compute_of(spec.model_copy(update={"seed": 6}), folder, data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_weights_do_not_depend_on_the_type_of_the_losses(dtype: str, tmp_path: Path, data: Path) -> None:
    folder = folder_of(small_model("llama-tied"), tmp_path / "base")
    spec = spec_for(folder, {"tokens_max": 24}, perturbation={"epsilon": 4e-3})
    plain, cast = (compute_of(spec, folder, data, compute_dtype=name) for name in ("auto", dtype))
    assert (plain.compute_dtype, cast.compute_dtype) == ("float32", dtype)
    first = cast.evaluate(lambda: False)
    sealed = round_of(cast)
    for compute in (plain, cast):
        compute.apply(sealed)
    assert plain.digest() == cast.digest()
    now, also = (compute.evaluate(lambda: False) for compute in (plain, cast))
    assert now is not None
    assert also is not None
    assert first is not None
    assert also.loss != first.loss  # the copy was cast again
    assert also.loss == pytest.approx(now.loss, rel=2e-2)
    cast.save(tmp_path / "point", position=1, chain=b"\0" * 32)
    cast.reset()
    back = cast.evaluate(lambda: False)
    assert back is not None
    assert back.loss == first.loss
    assert cast.restore(tmp_path / "point") == 1
    again = cast.evaluate(lambda: False)
    assert again is not None
    assert again.loss == also.loss


def test_an_epsilon_too_small_is_told(tmp_path: Path, data: Path) -> None:
    folder = folder_of(small_model("llama-tied"), tmp_path / "base")
    spec = spec_for(folder, {"tokens_max": 24}, perturbation={"epsilon": 1e-5})
    assert compute_of(spec, folder, data).warning is None
    warning = compute_of(spec, folder, data, compute_dtype="bfloat16").warning
    assert warning is not None
    assert "1e-05 is below the resolution of bfloat16" in warning


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_doctor_examines_classifiers(dtype: str, tmp_path: Path, data: Path) -> None:
    folder = folder_of(small_model("bert", kind="classes").bert, tmp_path / "base")
    spec = spec_for(folder, CLASSES, perturbation={"epsilon": 1e-5})
    settings = NodeSettings.model_validate(
        {"coordinator": "h:1", "model": str(folder), "data": data, "device": "cpu", "state": tmp_path}
        | {"compute_dtype": dtype}
    )
    checks = {check.name: check for check in Replica(settings=settings, spec=spec, is_speed_measured=True).checks()}
    assert {check.outcome for check in checks.values()} <= {"ok", "skip"}
    assert ("--compute-dtype" in checks["epsilon"].remedy) == (dtype == "bfloat16")
    assert checks["speed"].outcome == "ok"


def test_types_of_losses_are_named_where_wrong() -> None:
    with pytest.raises(SpecError, match="compute_dtype"):
        load({"coordinator": "h:1", "compute_dtype": "float8"})
