"""The package against the committed known answers, and the committed file against the script that made it."""

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerturb import codec, mixing, rng, stepping
from peerturb.manifest import Parameter
from peerturb.plateau import Plateau
from peerturb.spec import StepSpec
from peerturb.zo.digest import run_digest, splitmix64, tensor_digest
from peerturb.zo.directions import Directions, Probes, dense_signs, left_signs
from peerturb.zo.update import apply_update

pytestmark = pytest.mark.usefixtures("either_loops")

FOLDER = Path(__file__).parent
VECTORS: dict[str, Any] = json.loads((FOLDER / "numerics.json").read_text(encoding="utf-8"))
RUN_KEY, ROUND = VECTORS["run_key"], VECTORS["round"]


def parameter_of(item: dict[str, Any]) -> Parameter:
    return Parameter(
        index=item["index"],
        name=item["name"],
        shape=tuple(item["shape"]),
        dtype=item["dtype"],
        exponent=item["exponent"],
        is_stack=item["stack"],
    )


def tensor_of(bits: list[int], shape: list[int], dtype: str) -> torch.Tensor:
    words = np.array(bits, np.uint32 if dtype == "float32" else np.uint16)
    signed = torch.from_numpy(words.view(np.int32 if dtype == "float32" else np.int16))
    return signed.view(getattr(torch, dtype)).reshape(shape).clone()


def bits_of(weight: torch.Tensor) -> list[int]:
    words = weight.reshape(-1).view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
    unsigned: list[int] = words.numpy().view(np.uint32 if weight.dtype == torch.float32 else np.uint16).tolist()
    return unsigned


def text_of(signs: torch.Tensor) -> str:
    return "".join("+" if sign > 0 else "-" for sign in signs.reshape(-1).tolist())


def test_the_script_reproduces_the_committed_file() -> None:
    script = runpy.run_path(str(FOLDER / "make_vectors.py"))
    assert script["text"]() == (FOLDER / "numerics.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", VECTORS["generator"])
def test_generator(case: dict[str, Any]) -> None:
    block, stream, sample, round_ = case["counter"]
    assert rng.philox(block, stream, sample, round_, key=tuple(case["key"])).tolist() == case["words"]


def test_linear_layout() -> None:
    case = VECTORS["layouts"]["linear"]
    signs = rng.linear_signs(
        case["stream"], 0, 300, round=ROUND, run_key=RUN_KEY, slots=case["slot"], samples=[case["sample"]]
    )
    assert text_of(torch.from_numpy(signs)) == case["signs"]
    parameter = Parameter(index=1, name="w", shape=(300, 2), dtype="float32")
    probes = Probes.of(run_key=RUN_KEY, round=ROUND, slots=case["slot"], samples=[case["sample"]])
    assert text_of(left_signs(parameter, probes)) == case["signs"]


def test_planar_layout() -> None:
    case = VECTORS["layouts"]["planar"]
    parameter = Parameter(index=case["index"], name="w", shape=tuple(case["shape"]), dtype="float32")
    probes = Probes.of(run_key=RUN_KEY, round=ROUND, slots=case["slot"], samples=[case["sample"]])
    signs = dense_signs(parameter, probes)
    assert text_of(signs[0, :128]) == case["first"]
    assert hashlib.sha256(signs.contiguous().numpy().tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", VECTORS["noise"])
def test_noise(case: dict[str, Any]) -> None:
    parameter = parameter_of(case["tensor"])
    probes = Probes.of(run_key=RUN_KEY, round=ROUND, slots=case["slot"], samples=[case["sample"]])
    directions = Directions(probes)
    matrices, rows, columns = parameter.stacked
    if parameter.kind == "vector":
        noise = directions.left(parameter)
    elif case["family"] == "dense":
        noise = directions.dense(parameter, 0)
    else:
        left = directions.left(parameter).reshape(matrices, rows, 1)
        noise = left * directions.right(parameter).reshape(matrices, 1, columns)
    assert text_of(noise) == case["signs"]


@pytest.mark.parametrize("case", VECTORS["codes"])
def test_code(case: dict[str, Any]) -> None:
    projected = np.array([float(text) for text in case["projected"]])
    noise = codec.rounding_noise(run_key=RUN_KEY, slot=case["slot"], round=ROUND, samples=np.arange(len(projected)))
    assert codec.encode(projected, case["scale"]).tolist() == case["nearest"]
    stochastic = codec.encode(projected, case["scale"], rounding="stochastic", noise=noise)
    assert stochastic.tolist() == case["stochastic"]


@pytest.mark.parametrize("case", VECTORS["scales"])
def test_scale_rule(case: dict[str, Any]) -> None:
    codes = np.array(case["codes"], np.int8)
    assert float(stepping.next_scale(case["scale"], codes)) == case["next"]
    assert float(stepping.next_scale(case["scale"], codes.tobytes())) == case["next"]


@pytest.mark.parametrize("case", VECTORS["steps"])
def test_step_size(case: dict[str, Any]) -> None:
    step = StepSpec.model_validate(
        {key: case[key] for key in ("rule", "schedule", "warmup_rounds", "final_fraction", "learning_rate")}
    )
    alpha = stepping.step_size(step, case["round"], case["scale"], np.array(case["codes"], np.int8), case["total"])
    assert float(alpha) == case["alpha"]


@pytest.mark.parametrize("case", VECTORS["mixed"])
def test_rounds_of_both_estimators(case: dict[str, Any]) -> None:
    codes = [np.array(part, np.int8).tobytes() for part in case["codes"]]
    assert list(map(float, mixing.next_scales(case["scales"], codes))) == case["next"]
    step = StepSpec.model_validate({key: case[key] for key in ("rule", "half_codes", "learning_rate")})
    assert float(mixing.mixed_step_size(step, 0, case["scales"], codes, 0)) == case["alpha"]


@pytest.mark.parametrize("case", VECTORS["halves"])
def test_a_part_of_the_step(case: dict[str, Any]) -> None:
    step = StepSpec.model_validate({key: case[key] for key in ("rule", "half_codes", "learning_rate")})
    alpha = stepping.step_size(step, 0, case["scale"], np.array(case["codes"], np.int8), 0)
    assert float(alpha) == case["alpha"]


@pytest.mark.parametrize("case", VECTORS["plateaus"])
def test_plateau_cuts(case: dict[str, Any]) -> None:
    keys = ("rule", "schedule", "warmup_rounds", "final_fraction", "learning_rate", "plateau")
    step = StepSpec.model_validate({key: case[key] for key in keys})
    plateau, alphas = Plateau(), []
    for round_ in range(len(case["alphas"])):
        codes = np.array(case["codes"], np.int8)
        alpha = stepping.step_size(step, round_, case["scale"], codes, 0, fraction=plateau.fraction)
        alphas.append(float(alpha))
        if round_ < len(case["losses"]):
            plateau.take(step, round_, float(case["losses"][round_]))
    assert alphas == case["alphas"]
    assert len(set(alphas[case["warmup_rounds"] :])) > 1


@pytest.mark.parametrize("case", VECTORS["updates"])
def test_update(case: dict[str, Any]) -> None:
    manifest = tuple(parameter_of(item) for item in case["tensors"])
    weights = [tensor_of(b, i["shape"], i["dtype"]) for b, i in zip(case["before"], case["tensors"], strict=True)]
    assert run_digest(manifest, weights).hex() == case["digest_before"]
    apply_update(
        weights,
        manifest,
        family=case["family"],
        run_key=RUN_KEY,
        round=ROUND,
        slots=case["slots"],
        counts=case["counts"],
        codes=np.array(case["codes"], np.int8),
        alpha=case["alpha"],
    )
    assert [bits_of(weight) for weight in weights] == case["after"]
    assert run_digest(manifest, weights).hex() == case["digest_after"]


@pytest.mark.parametrize("number", range(2))
def test_update_of_several_chunks(number: int) -> None:
    case = VECTORS["chunks"]
    item = case["tensors"][number]
    weight = tensor_of(case["before"][number], item["shape"], item["dtype"])
    codes = (37 * np.arange(sum(case["counts"])) % 256 - 128).astype(np.int8)
    apply_update(
        [weight],
        (parameter_of(item),),
        family="rank1",
        run_key=RUN_KEY,
        round=ROUND,
        slots=case["slots"],
        counts=case["counts"],
        codes=codes,
        alpha=case["alpha"],
    )
    assert bits_of(weight) == case["after"][number]


@pytest.mark.parametrize("case", VECTORS["digests"])
def test_tensor_digest(case: dict[str, Any]) -> None:
    bits = (0x9E3779B1 * np.arange(case["count"], dtype=np.uint64)).astype(np.uint32)
    assert tensor_digest(torch.from_numpy(bits.view(np.float32))) == case["digest"]
    halves = (bits >> 16).astype(np.uint16).view(np.int16)
    assert tensor_digest(torch.from_numpy(halves).view(torch.bfloat16)) == case["digest16"]


def test_splitmix64() -> None:
    words = splitmix64(torch.arange(4)).numpy().view(np.uint64)
    assert words.tolist() == VECTORS["splitmix64"]
