"""Checkpoints come back bit for bit or not at all; exports of equal weights are equal files."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peerturb.errors import LogError, ModelError
from peerturb.zo.checkpoint import CheckpointInfo, load_checkpoint, read_info, save_checkpoint
from peerturb.zo.export import export_model
from peerturb.zo.model import load_model, prepare, trainable_weights
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model

__all__ = ["one_thread"]

INFO = CheckpointInfo(spec_digest="aa" * 32, base_digest="bb" * 32, round=17, position=19, chain="cc" * 32)


def saved(path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    model = small_model("qwen2", seed=seed)
    manifest = manifest_of(model, exclude=["*bias"])
    model = model.to(dtype)
    manifest = tuple(replace(entry, dtype="bfloat16" if dtype == torch.bfloat16 else "float32") for entry in manifest)
    save_checkpoint(path, manifest, trainable_weights(model, manifest), INFO)
    return model, manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_place_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model, manifest = saved(tmp_path / "c.safetensors", dtype=dtype)
    other = trainable_weights(small_model("qwen2", seed=1).to(dtype), manifest)
    info = load_checkpoint(tmp_path / "c.safetensors", manifest, other, spec_digest="aa" * 32, base_digest="bb" * 32)
    assert (info.round, info.position, info.chain) == (17, 19, "cc" * 32)
    assert info == read_info(tmp_path / "c.safetensors")
    for name, tensor in trainable_weights(model, manifest).items():
        assert torch.equal(tensor, other[name])


def test_checkpoints_of_other_runs_are_refused_untouched(tmp_path: Path) -> None:
    _, manifest = saved(tmp_path / "c.safetensors")
    other = trainable_weights(small_model("qwen2", seed=1), manifest)
    before = {name: tensor.clone() for name, tensor in other.items()}
    for digests in (
        {"spec_digest": "dd" * 32, "base_digest": "bb" * 32},
        {"spec_digest": "aa" * 32, "base_digest": "dd" * 32},
    ):
        with pytest.raises(LogError, match="dddddddddddd"):
            load_checkpoint(tmp_path / "c.safetensors", manifest, other, **digests)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.items())


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "c.safetensors")
    for name, hint in (("llama-untied-biased", "lacks the tensor"), ("gpt2", "lacks the tensor")):
        model = small_model(name)
        manifest = manifest_of(model)
        with pytest.raises(ModelError, match=hint):
            load_checkpoint(
                tmp_path / "c.safetensors",
                manifest,
                trainable_weights(model, manifest),
                spec_digest="aa" * 32,
                base_digest="bb" * 32,
            )


def test_every_kind_of_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    model, manifest = saved(path)
    whole = path.read_bytes()
    weights = trainable_weights(model, manifest)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 64, bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ModelError):
            load_checkpoint(path, manifest, weights, spec_digest="aa" * 32, base_digest="bb" * 32)
    path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        read_info(path)


def test_a_model_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    small_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a peerturb checkpoint"):
        read_info(tmp_path / "model.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    saved(path)
    before = path.read_bytes()

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, no_space)
            with pytest.raises(ModelError, match="No space left"):
                saved(path, seed=1)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied-biased", "gpt2"])
def test_equal_weights_export_to_equal_files(tmp_path: Path, name: str) -> None:
    """A live node's model came from one folder, a replay's from another, and they lived different lives."""
    base = small_model(name)
    base.save_pretrained(tmp_path / "one")
    byte_tokenizer().save_pretrained(tmp_path / "one")
    export_model(base, byte_tokenizer(), tmp_path / "two")
    exports = []
    for source in ("one", "two"):
        model, tokenizer = load_model(tmp_path / source, "float32")
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        if source == "two":
            tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
            model(input_ids=torch.tensor([[1, 2]]))
        export_model(model, tokenizer, tmp_path / f"{source}-out")
        exports.append({file.name: file.read_bytes() for file in (tmp_path / f"{source}-out").iterdir()})
    assert exports[0] == exports[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(exports[0])
    assert str(tmp_path).encode() not in b"".join(exports[0].values())


def test_exports_load_again_with_the_same_bits(tmp_path: Path) -> None:
    model = prepare(small_model("llama-tied"), "bfloat16")
    export_model(model, byte_tokenizer(), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.use_cache
    assert again.dtype == torch.bfloat16
    for name, tensor in model.named_parameters():
        assert torch.equal(again.get_parameter(name), tensor)


def test_exports_replace_models_but_nothing_else(tmp_path: Path) -> None:
    model = small_model("gpt2")
    export_model(model, byte_tokenizer(), tmp_path / "out")
    export_model(model, byte_tokenizer(), tmp_path / "out")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    for name in ("diary", "file"):
        with pytest.raises(ModelError, match="name an empty or a new folder"):
            export_model(model, byte_tokenizer(), tmp_path / name)
    assert (tmp_path / "diary" / "today.txt").read_text() == "dear diary"
    assert sorted(os.listdir(tmp_path)) == ["diary", "file", "out"]


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("gpt2")
    export_model(model, byte_tokenizer(), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", no_space)
    with pytest.raises(ModelError, match="No space left"):
        export_model(model, byte_tokenizer(), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]
