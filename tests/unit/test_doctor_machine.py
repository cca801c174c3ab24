"""What the doctor says a run needs is what its files and tensors take: small adapters, packed weights as packed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from peerturb.spec import RunSpec
from peerturb.zo.base import load_base
from peerturb.zo.shadow import Shadow
from peerturb_node.compute.torch_compute import TorchCompute
from peerturb_node.doctor import replica
from peerturb_node.doctor.machine import check_disk, checkpoint_bytes, memory_needed, tensor_bytes
from peerturb_node.doctor.replica import NAMES, Replica
from peerturb_node.doctor.report import Check
from peerturb_node.settings import NodeSettings
from tests.zo_models import LLAMA, byte_tokenizer, one_thread

__all__ = ["one_thread"]

HEADER_BYTES = 8_192
"""Names and metadata of a small safetensors file."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose linear layers are nearly all of it, and can be packed."""
    torch.manual_seed(0)
    sizes = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def spec_of(folder: Path, **model: Any) -> RunSpec:
    document = {
        "name": "test", "seed": 1, "model": {"name": "test", "digest": "0" * 64, **model},
        "objective": {"tokens_max": 24}, "round": {"probes_max": 4},
    }  # fmt: skip
    _, _, digest = load_base(folder, RunSpec.model_validate(document))
    document["model"]["digest"] = digest  # type: ignore[index]
    return RunSpec.model_validate(document)


def settings_of(folder: Path, **extra: Any) -> NodeSettings:
    data = folder.parent / "data.txt"
    data.write_text("many words make a text, " * 20)
    return NodeSettings(
        coordinator="h:1", model=str(folder), data=data, device="cpu", state=folder.parent / "state", **extra
    )


def examined(spec: RunSpec, settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The bytes that the checks `memory` and `disk` were given: of all tensors, and of a checkpoint."""
    given: dict[str, int] = {}

    def needed(weights: int, vocabulary: int, width: int, *, tokens: int) -> int:
        given["held"] = weights
        return memory_needed(weights, vocabulary, width, tokens=tokens)

    def disk(settings: NodeSettings, each_checkpoint: int) -> Iterator[Check]:
        given["each"] = each_checkpoint
        return check_disk(settings, each_checkpoint)

    monkeypatch.setattr(replica, "memory_needed", needed)
    monkeypatch.setattr(replica, "check_disk", disk)
    found = list(Replica(settings=settings, spec=spec, is_speed_measured=False).checks())
    assert tuple(check.name for check in found) == NAMES
    assert {check.outcome for check in found} <= {"ok", "skip"}
    return given["held"], given["each"]


def checkpoint_of(spec: RunSpec, settings: NodeSettings, path: Path) -> int:
    compute = TorchCompute(spec, settings)
    compute.save(path, position=1, chain=bytes(32))
    assert checkpoint_bytes(compute.manifest) <= path.stat().st_size
    return path.stat().st_size


def test_a_whole_model_takes_what_its_file_has(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, settings = spec_of(folder), settings_of(folder)
    held, each = examined(spec, settings, monkeypatch)
    file = (folder / "model.safetensors").stat().st_size
    assert file - HEADER_BYTES < each <= file  # the tied head once
    assert 0 <= checkpoint_of(spec, settings, tmp_path / "point") - each < HEADER_BYTES
    assert each <= held < each + 4_096  # rotary frequencies are buffers


def test_an_adapter_has_small_checkpoints(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")
    spec, settings = spec_of(folder, adapter={"rank": 2}), settings_of(folder)
    held, each = examined(spec, settings, monkeypatch)
    base = (folder / "model.safetensors").stat().st_size
    assert 0 <= checkpoint_of(spec, settings, tmp_path / "point") - each < HEADER_BYTES
    assert each < base / 20
    assert base + each - HEADER_BYTES < held < base + each + HEADER_BYTES


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_are_counted_as_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: peerturb[quantised]")
    spec, settings = spec_of(folder, adapter={"rank": 2}, quantise=kind), settings_of(folder)
    held, each = examined(spec, settings, monkeypatch)
    model, _, _ = load_base(folder, spec)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "packed")
    packed = (tmp_path / "packed").stat().st_size
    assert packed < (folder / "model.safetensors").stat().st_size / 2
    assert packed - 3 * HEADER_BYTES < held - each < packed + HEADER_BYTES
    # A cast copy has floats and buffers of its own and shares the packed weights.
    floats = sum(tensor.numel() for tensor in model.parameters() if tensor.is_floating_point())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    both = tensor_bytes(model, Shadow(model, torch.bfloat16).model) - tensor_bytes(model)
    assert 2 * floats <= both <= 2 * floats + buffers
