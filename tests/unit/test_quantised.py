"""Bases in 4 or 8 bits: fingerprinted by their bytes, perturbed through their adapters only."""

import json
import os
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from peerturb.errors import ModelError, SpecError
from peerturb.spec import AdapterSpec, ModelSpec, RoundSpec, RunSpec, StepSpec
from peerturb.zo.adapter_files import merge_adapter
from peerturb.zo.adapters import attach_adapter
from peerturb.zo.batch import Runner
from peerturb.zo.coverage import check_coverage
from peerturb.zo.data import Example
from peerturb.zo.local import LocalRun
from peerturb.zo.model import base_digest, build_manifest, prepare, trainable_weights
from peerturb.zo.objective import Objective
from peerturb.zo.quantised import Packing, is_quantised, quantise_base
from peerturb.zo.replay import replay
from peerturb.zo.shadow import Shadow
from tests.integration.network import network
from tests.zo_models import SIZES, byte_tokenizer, one_thread, small_model

__all__ = ["one_thread"]

pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")
bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: peerturb[quantised]")

KINDS = ("nf4", "fp4", "int8")
IDS = torch.arange(24).view(3, 8) * 11 % 250


def base(dtype: str = "float32") -> Any:
    """Wide enough for blocks of 64."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "attention_bias": True}
    model: Any = prepare(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), "float32")
    model = model.to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model


def quantised(kind: Any, dtype: str = "float32") -> Any:
    model = base(dtype)
    try:
        quantise_base(model, kind)
    except ModelError as error:
        pytest.skip(f"bitsandbytes does not work on this computer: {error}")
    return model


def section(kind: str | None, dtype: str = "float32", digest: str = "0" * 64) -> ModelSpec:
    adapter = AdapterSpec(rank=4)
    return ModelSpec.model_validate(
        {"name": "base", "digest": digest, "dtype": dtype, "adapter": adapter, "quantise": kind}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_perturbs_the_adapter_on_a_quantised_base(kind: str, dtype: str) -> None:
    model = quantised(kind, dtype)
    assert is_quantised(model)
    attach_adapter(model, section(kind, dtype), seed=1)
    manifest = build_manifest(model, section(kind, dtype))
    assert len(manifest) == 28
    for family in ("rank1", "dense"):
        check_coverage(model, manifest, family)  # at the start, where the adapter's output is least
    for weight in trainable_weights(model, manifest).values():
        weight.normal_(0, 0.2)
    for family in ("rank1", "dense"):
        check_coverage(model, manifest, family)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.4), ("fp4", 0.5), ("int8", 0.05)])
def test_a_quantised_model_is_close_to_its_base(kind: str, most: float) -> None:
    with torch.inference_mode():
        truth, found = base()(input_ids=IDS).logits, quantised(kind)(input_ids=IDS).logits
    assert 0 < float((found - truth).norm() / truth.norm()) < most


def test_the_digest_sees_packed_bytes_scales_and_floats() -> None:
    digests = {base_digest(quantised(kind), "float32") for kind in KINDS} | {base_digest(base(), "float32")}
    assert len(digests) == 4
    first = base_digest(quantised("nf4"), "float32")
    assert first == base_digest(quantised("nf4"), "float32")
    model = quantised("nf4")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data[3, 0] ^= 1
    assert base_digest(model, "float32") != first
    layer.weight.data[3, 0] ^= 1
    assert base_digest(model, "float32") == first
    layer.weight.quant_state.absmax[5] *= 1.5
    assert base_digest(model, "float32") != first
    other = quantised("int8")
    whole = base_digest(other, "float32")
    other.model.norm.weight.data[0] += 1
    assert base_digest(other, "float32") != whole


def test_head_and_narrow_layers_stay_as_they_are() -> None:
    model = quantised("nf4")
    assert type(model.lm_head) is torch.nn.Linear
    with pytest.raises(
        ModelError, match=r'"nf4" finds no layer of torch.nn.Linear to quantise whose rows are a multiple of 64'
    ):
        quantise_base(_narrow(), "nf4")


def _narrow() -> Any:
    sizes = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    return prepare(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), "float32")


def test_misuse_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"quantised weights cannot be trained; add a section \[model.adapter\]"):
        RunSpec.from_document(
            {"name": "unit", "seed": 1, "model": {"name": "x", "digest": "0" * 64, "quantise": "nf4"}},
            source="RUN.toml",
        )
    model = quantised("nf4")
    attach_adapter(model, section("nf4"), seed=1)
    with pytest.raises(ModelError, match=r"down_proj is quantised, .* without --merge"):
        merge_adapter(model)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install \"peerturb\[quantised\]\""):
        quantise_base(base(), "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_on_a_quantised_base_and_replays(kind: str) -> None:
    model = quantised(kind)
    spec = RunSpec(
        name="unit",
        seed=3,
        model=section(kind, digest=base_digest(model, "float32")),
        round=RoundSpec(probes_max=48),
        step=StepSpec(learning_rate=0.03),
    )
    attach_adapter(model, spec.model, seed=spec.seed)
    manifest = build_manifest(model, spec.model)
    start = [weight.clone() for weight in trainable_weights(model, manifest).values()]
    objective = Objective(spec.objective, byte_tokenizer())
    sequences = objective.encode([Example(prompt="abcdefgh" * 3, where=str(n)) for n in range(4)], source="test")
    run = LocalRun(Runner(model, manifest, objective), spec, [sequences])
    before = run.loss(sequences)
    for _ in run.run(15):
        pass
    assert run.loss(sequences) < before - 0.1, (before, run.loss(sequences))
    assert replay(run.rounds, start, manifest, spec) == run.digest()


@pytest.mark.slow
@pytest.mark.integration
def test_a_node_trains_on_a_quantised_base(tmp_path: Path) -> None:
    quantised("nf4")  # skips where it does not work
    folder, data = tmp_path / "base", tmp_path / "data.jsonl"
    base().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    data.write_text("".join(json.dumps({"text": "abcdefgh" + str(n)}) + os.linesep for n in range(20)))
    with network(tmp_path, "") as net:
        shown = net.run("model", str(folder), "--adapter", "lora", "--rank", "2", "--quantise", "nf4", "--json")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["quantised"]["kind"] == "nf4"
        section = json.loads(shown.stdout)["toml"]
        net.run_file.write_text(f'name = "q"\nseed = 1\n{section}\n[round]\ncount = 3\nprobes_max = 8\n')
        coordinator = net.start_coordinator()
        exported = tmp_path / "exported"
        node = net.start_node(
            "only", "--model", str(folder), "--data", str(data), "--export", str(exported), compute="torch"
        )
        assert node.wait() == 0, node.errors
        assert coordinator.stop() == 0
        out = tmp_path / "out"
        result = net.run("log", "export", str(net.export_log()), "--model", str(folder), "--out", str(out))
        assert result.returncode == 0, result.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_computes_what_it_did(kind: Any) -> None:
    """T5 converts activations to the type of `wo`'s weights; packed bytes would make whole numbers of them."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model: Any = prepare(T5ForConditionalGeneration(config), "float32")
    ids = IDS % 64

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=ids, decoder_input_ids=ids[:, :5], use_cache=False).logits
        return found

    before = logits()
    try:
        quantise_base(model, kind)
    except ModelError as error:
        pytest.skip(f"bitsandbytes does not work on this computer: {error}")
    assert (logits() - before).norm() < 0.3 * before.norm()


def test_layers_of_another_sort_are_named() -> None:
    with pytest.raises(ModelError, match=r"no layer of torch.nn.Linear to quantise: .* Conv1D \(as GPT-2's\)"):
        quantise_base(small_model("gpt2"), "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_that_is_quantised_is_told(kind: Any) -> None:
    model = quantised(kind)
    base_weights = sum(tensor.numel() for tensor in base().parameters())
    head = model.lm_head.weight.numel()
    alone = Packing.of(model, ())
    attach_adapter(model, section(kind), seed=1)
    found = Packing.of(model, trainable_weights(model, build_manifest(model, section(kind))))
    assert found is not None
    assert found == alone
    assert (found.kind, found.weights) == (kind, base_weights)
    assert found.packed == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert list(found.floats.items())[:2] == [("model.embed_tokens.weight", head), ("lm_head.weight", head)]
    assert found.floats["model.layers.*.self_attn.q_proj.bias"] == 2 * 64
    assert found.packed + sum(found.floats.values()) == base_weights
    assert found.text == (
        f"{kind} holds 68% of the base's 108,224 weights; in floating point stay model.embed_tokens.weight (16%), "
        "lm_head.weight (16%)"
    )
    assert Packing.of(base(), ()) is None


def test_expert_stacks_that_stay_in_float_are_named() -> None:
    model = small_model("mixtral")
    quantise_base(model, "int8")
    found = Packing.of(model, ())
    assert found is not None
    assert "in floating point stay model.layers.*.mlp.experts.gate_up_proj (4" in found.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_another_type_computes_in_it(kind: str) -> None:
    """Else bitsandbytes would round the activations of a float32 copy to bfloat16."""
    model, truth = quantised(kind, "bfloat16"), base("bfloat16").float()
    with torch.inference_mode():
        layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        for name, layer in layers:
            if layer.weight.is_floating_point():
                continue
            if kind == "int8":
                weight = layer.weight * layer.scale[:, None]
            else:
                state = copy(layer.weight.quant_state)
                state.dtype = torch.float32
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight, state)
            truth.get_submodule(name).weight.copy_(weight)
        wanted = truth(input_ids=IDS).logits
        found = Shadow(model, torch.float32).model(input_ids=IDS).logits
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16
