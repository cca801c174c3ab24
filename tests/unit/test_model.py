"""Loading, numbering and fingerprinting models; every way it can fail is a ModelError that helps."""

import json
import re
import shutil
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peerturb.errors import ModelError, SpecError
from peerturb.manifest import manifest_digest
from peerturb.rng import philox
from peerturb.spec import ModelSpec, ObjectiveSpec, RunSpec
from peerturb.zo.coverage import check_coverage
from peerturb.zo.heads import initial_values
from peerturb.zo.kinds import Task
from peerturb.zo.model import base_digest, build_manifest, load_model, positions_max, trainable_weights
from peerturb.zo.objective import Objective
from peerturb_node.cli import model as model_command
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model

__all__ = ["one_thread"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as the hub would deliver it."""
    small_model("llama-tied").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def spec_with(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "test", "digest": "0" * 64, **fields})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_ready_for_probes(folder: Path, dtype: Any) -> None:
    model, tokenizer = load_model(folder, dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert tokenizer("a")["input_ids"][0] == 0
    assert positions_max(model) == 64
    inverse = model.model.rotary_emb.inv_freq
    assert inverse.dtype == torch.float32  # bfloat16 positions would be wrong beyond 256


def test_manifest_is_sorted_and_counts_tied_tensors_once(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    manifest = build_manifest(model, spec_with())
    names = [entry.name for entry in manifest]
    assert names == sorted(names)
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    assert [entry.index for entry in manifest] == list(range(len(names)))
    assert sum(entry.elements for entry in manifest) == sum(p.numel() for p in model.parameters())
    assert {entry.kind for entry in manifest} == {"vector", "matrix"}


def test_patterns_exclude_and_scale(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    manifest = build_manifest(model, spec_with(exclude=["*norm*"], exponents={"*mlp*": 1, "*mlp.down*": -2}))
    exponents = {entry.name: entry.exponent for entry in manifest}
    assert not any("norm" in name for name in exponents)
    assert exponents["model.layers.0.mlp.up_proj.weight"] == 1
    assert exponents["model.layers.0.mlp.down_proj.weight"] == 1  # "*mlp*" comes first in sorted order
    assert exponents["model.layers.0.self_attn.q_proj.weight"] == 0


def test_a_tied_tensor_is_excluded_by_either_name(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        manifest = build_manifest(model, spec_with(exclude=[name]))
        assert not {"lm_head.weight", "model.embed_tokens.weight"} & {entry.name for entry in manifest}


@pytest.mark.parametrize("fields", [{"exclude": ["*nrom*"]}, {"exponents": {"*nrom*": 1}}])
def test_patterns_that_match_nothing_are_errors(folder: Path, fields: dict[str, Any]) -> None:
    model, _ = load_model(folder, "float32")
    with pytest.raises(ModelError, match=r"\*nrom\*"):
        build_manifest(model, spec_with(**fields))


def test_excluding_everything_is_an_error(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    with pytest.raises(ModelError, match="nothing is left"):
        build_manifest(model, spec_with(exclude=["*"]))


def test_experts_are_stacks() -> None:
    layer = torch.nn.Module()
    layer.experts = torch.nn.Module()
    layer.experts.up = torch.nn.Parameter(torch.zeros(4, 6, 8))
    layer.kernel = torch.nn.Parameter(torch.zeros(4, 6, 8))
    manifest = build_manifest(layer, spec_with())
    assert [(entry.name, entry.kind, entry.stacked) for entry in manifest] == [
        ("experts.up", "stack", (4, 6, 8)),
        ("kernel", "matrix", (1, 4, 48)),
    ]


def test_base_digest_sees_every_bit_and_frozen_tensors_too(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    before = base_digest(model, "float32")
    assert before == base_digest(load_model(folder, "float32")[0], "float32")
    assert before != base_digest(load_model(folder, "bfloat16")[0], "bfloat16")
    model.model.norm.weight.view(torch.int32)[3] ^= 1
    assert base_digest(model, "float32") != before


def test_weights_are_the_models_own(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    manifest = build_manifest(model, spec_with())
    weights = trainable_weights(model, manifest)
    assert list(weights) == [entry.name for entry in manifest]
    weights["lm_head.weight"].fill_(0.25)
    assert set(dict(model.named_parameters())["model.embed_tokens.weight"].flatten().tolist()) == {0.25}
    with pytest.raises(ModelError, match="no parameter"):
        trainable_weights(small_model("gpt2"), manifest)


def test_changing_weights_leaves_the_files_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_model(folder, "float32")
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert base_digest(load_model(folder, "float32")[0], "float32") != base_digest(model, "float32")


def test_manifest_digest_tells_exponents_apart(folder: Path) -> None:
    model, _ = load_model(folder, "float32")
    assert manifest_digest(manifest_of(model)) != manifest_digest(manifest_of(model, exponents={"*norm*": 1}))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_model(tmp_path / "nothing", "float32")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path, "float32")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        load_model(folder, "float32")


def test_incomplete_weights_are_not_filled_with_noise(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(folder, "float32")


def test_damaged_files_are_errors(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(folder, "float32")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration"):
        load_model(folder, "float32")


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code was run')\n")
    with pytest.raises(ModelError):
        load_model(folder, "float32")


def test_a_missing_tokenizer_is_an_error(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(folder, "float32")


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="some-org/some-model"):
        load_model("some-org/some-model", "float32")


def test_shared_models_load(shared: Path, tmp_path: Path) -> None:
    for name in ("stories260k", "stories3m", "gpt2-horoscope"):
        shutil.copytree(shared / "models" / name, tmp_path / name)
        first, _ = load_model(shared / "models" / name, "bfloat16")
        second, _ = load_model(str(tmp_path / name), "bfloat16")
        assert base_digest(first, "bfloat16") == base_digest(second, "bfloat16")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A bare encoder: no classification head, no pooler."""
    model = small_model("bert", kind="classes").bert
    model.pooler = None
    model.save_pretrained(tmp_path / "encoder")
    byte_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_head_that_is_lacking_follows_from_the_seed_alone(encoder: Path) -> None:
    torch.manual_seed(1)
    first, _ = load_model(encoder, "float32", task=Task(classes=3, seed=7))
    torch.manual_seed(2)
    second, _ = load_model(encoder, "float32", task=Task(classes=3, seed=7))
    assert base_digest(first, "float32") == base_digest(second, "float32")
    other, _ = load_model(encoder, "float32", task=Task(classes=3, seed=8))
    assert base_digest(first, "float32") != base_digest(other, "float32")
    named = dict(first.named_parameters())
    # New tensors by name: pooler bias and weight, classifier bias and weight.
    new = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    for number, name in enumerate(new):
        expected = torch.zeros(named[name].shape)
        if name.endswith("weight"):
            expected = initial_values(named[name].shape, seed=7, tensor=number)
        assert torch.equal(named[name], expected)
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(named[f"bert.{words}"], load_file(encoder / "model.safetensors")[words])


def test_initial_values_are_the_documented_ones() -> None:
    """Section 9 of docs/numerics.md, written out with integers and exact fractions."""
    seed, tensor = (5 << 40) + 3, 2
    values = initial_values((3, 3), seed=seed, tensor=tensor).flatten().tolist()
    words = philox(np.arange(3), 0xFFFFFFFD, tensor, 0, key=(seed & 0xFFFFFFFF, seed >> 32)).flatten().tolist()
    bound = Fraction(float(np.float32(0.02 * 3**0.5)))
    for value, word in zip(values, words, strict=False):
        exact = (2 * Fraction(word >> 9) + 1 - 2**23) / 2**23 * bound
        assert value == float(np.float32(float(exact)))
    many = initial_values((200, 200), seed=0, tensor=0)
    assert abs(float(many.std()) - 0.02) < 2e-4
    assert abs(float(many.mean())) < 4e-4


def test_a_head_of_the_files_is_kept(tmp_path: Path) -> None:
    model = small_model("roberta", kind="classes")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "float32", task=Task(classes=3, seed=7))
    name = "classifier.out_proj.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    with pytest.raises(ModelError, match=r"classifier.*5 the number of its classes"):
        load_model(tmp_path, "float32", task=Task(classes=5))


def test_an_incomplete_encoder_is_not_filled(encoder: Path) -> None:
    tensors = load_file(encoder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight"):
        load_model(encoder, "float32", task=Task(classes=3))


def test_an_encoder_is_refused_as_a_language_model(encoder: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder \(bert\).*classes"):
        load_model(encoder, "float32")


def test_seq2seq_folders_load(tmp_path: Path) -> None:
    model = small_model("t5", kind="seq2seq")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path, "bfloat16")
    assert type(loaded).__name__ == "T5ForConditionalGeneration"
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    spec = ObjectiveSpec(kind="completion", completion="{a}", tokens_max=16)
    assert Objective.of(spec, loaded, tokenizer).form.begin == 1


def test_a_classifier_without_padding_token_gets_the_tokenizers(tmp_path: Path) -> None:
    model = small_model("llama", kind="classes")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "float32", task=Task(classes=3))
    assert loaded.config.pad_token_id == byte_tokenizer().pad_token_id


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_expert_stacks_survive_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = small_model(name)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "float32")
    assert base_digest(loaded, "float32") == base_digest(model, "float32")
    assert "peerturb" not in (tmp_path / "config.json").read_text()
    assert "stack" in {entry.kind for entry in manifest_of(loaded)}


def test_the_command_prints_a_classifiers_digest(encoder: Path) -> None:
    found = CliRunner().invoke(model_command.app, [str(encoder), "--classes", "3", "--seed", "7"])
    assert found.exit_code == 0, found.output
    digest = base_digest(load_model(encoder, "float32", task=Task(classes=3, seed=7))[0], "float32")
    assert f'digest = "{digest}"' in found.output
    assert "BertForSequenceClassification" in found.output
    assert "3 classes and seed = 7" in found.output


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    """An encoder-decoder."""
    small_model("t5", kind="seq2seq").save_pretrained(tmp_path / "writer")
    byte_tokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


def run_spec(output: str) -> RunSpec:
    """The RunSpec that the command has printed, as `--json`."""
    return RunSpec.from_document(tomllib.loads(json.loads(output)["run_toml"]), source="the output")


def test_the_command_begins_what_the_engine_accepts(writer: Path, encoder: Path) -> None:
    cases: list[tuple[Path, list[str]]] = [
        (writer, []),
        (writer, ["--objective", "labels"]),
        (writer, ["--classes", "3"]),
        (encoder, ["--classes", "3"]),
    ]
    for folder, options in cases:
        found = CliRunner().invoke(model_command.app, [str(folder), *options, "--json"])
        assert found.exit_code == 0, found.output
        spec = run_spec(found.stdout)
        model, tokenizer = load_model(folder, "float32", task=Task.of(spec))
        assert base_digest(model, "float32") == spec.model.digest
        objective = Objective.of(spec.objective, model, tokenizer)
        assert objective.form.kind == ("classes" if spec.objective.classes else "seq2seq")
        check_coverage(model, build_manifest(model, spec.model))


def test_the_command_refuses_text_for_an_encoder_decoder(writer: Path) -> None:
    found = CliRunner().invoke(model_command.app, [str(writer), "--objective", "text"])
    assert isinstance(found.exception, SpecError)
    assert "use completion or labels" in str(found.exception)


def test_the_command_names_a_folder_that_is_called_by_a_dot(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(writer)
    found = CliRunner().invoke(model_command.app, [".", "--json"])
    assert run_spec(found.stdout).model.name == "writer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "5000", "--adapter", "lora"], r"model\.adapter\.rank.*4096"),
        (["--label", "x" * 600], r"model\.name"),
        (["--target", "*"], "--target needs --adapter"),
        (["--quantise", "nf4"], "--quantise needs --adapter"),
        (["--classes", "1"], "at least two"),
    ],
)
def test_options_that_no_run_accepts_are_told_before_the_model_is_loaded(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(model_command.app, ["no/such/model", *arguments])
    assert isinstance(found.exception, SpecError)
    assert re.search(message, str(found.exception))


def test_the_seed_is_bounded_by_the_run_specs() -> None:
    for seed in (2**63, 2**64):
        found = CliRunner().invoke(model_command.app, ["m", "--adapter", "lora", "--seed", str(seed)])
        assert found.exit_code == 2
        assert "--seed" in found.output
    with pytest.raises(SpecError, match="seed"):
        RunSpec.from_document({"name": "x", "seed": 2**63, "model": {"name": "m", "digest": "0" * 64}}, source="x")
