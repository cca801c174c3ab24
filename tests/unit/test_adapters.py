"""Adapters: equal first values everywhere, only their tensors are trained, and their files are what peft reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peerturb.errors import ModelError, SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import AdapterSpec, ModelSpec, RunSpec
from peerturb.zo.adapter_files import export_adapter, merge_adapter
from peerturb.zo.adapters import attach_adapter, first_values, target_names, trained_whole
from peerturb.zo.coverage import check_coverage
from peerturb.zo.digest import run_digest
from peerturb.zo.model import base_digest, build_manifest, trainable_weights
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.shadow import Shadow
from tests.golden.make_vectors import philox
from tests.zo_models import CLASSIFIERS, CONFIGS, byte_tokenizer, one_thread, small_model

__all__ = ["one_thread"]

pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")

IDS = torch.arange(24).view(3, 8) * 11 % 250


def section(kind: str = "lora", *, dtype: str = "float32", **more: Any) -> ModelSpec:
    adapter = AdapterSpec.model_validate({"kind": kind, "rank": 4, **more})
    return ModelSpec.model_validate({"name": "base", "digest": "0" * 64, "dtype": dtype, "adapter": adapter})


def adapted(
    kind: str = "lora", *, name: str = "llama-tied", form: str = "causal", seed: int = 5, dtype: str = "float32"
) -> tuple[Any, Any]:
    model = small_model(name, kind=form, dtype=getattr(torch, dtype))
    spec = section(kind, dtype=dtype)
    attach_adapter(model, spec, seed=seed)
    return model, build_manifest(model, spec)


def trained(kind: str = "lora", **more: Any) -> tuple[Any, Any]:
    """An adapter that does something."""
    model, manifest = adapted(kind, **more)
    generator = torch.Generator().manual_seed(1)
    for weight in trainable_weights(model, manifest).values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model, manifest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_perturbs_all_of_an_adapter(name: str, kind: str, family: str, dtype: str) -> None:
    model, manifest = trained(kind, name=name, dtype=dtype)
    check_coverage(model, manifest, family)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(("form", "name"), [*(("classes", name) for name in CLASSIFIERS), ("seq2seq", "t5")])
def test_the_engine_perturbs_adapters_of_other_kinds_of_models(form: str, name: str, family: str) -> None:
    model, manifest = trained(form=form, name=name)
    check_coverage(model, manifest, family)


def test_a_classifiers_head_is_trained_beside_the_adapter() -> None:
    _, manifest = adapted(name="bert", form="classes")
    whole = {entry.name for entry in manifest if "lora" not in entry.name}
    assert whole == {"bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"}


@pytest.mark.parametrize(("kind", "tensors"), [("lora", 28), ("vera", 28)])
def test_only_the_adapter_is_trained(kind: str, tensors: int) -> None:
    model, manifest = adapted(kind)
    assert len(manifest) == tensors
    assert all(kind in entry.name for entry in manifest)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    plain, (model, _) = small_model("gpt2"), adapted(kind, name="gpt2")
    assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_first_values_are_those_of_the_definition() -> None:
    name, seed, bound = "layer.lora_A.default.weight", 2**40 + 7, 0.3
    key = hashlib.sha256(b"peerturb adapter 1\0" + seed.to_bytes(8, "little") + name.encode()).digest()
    k0, k1 = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
    values = first_values(seed=seed, name=name, shape=(3, 7), bound=bound)
    bound_f32 = float(torch.tensor(bound))
    for element, value in enumerate(values.flatten().tolist()):
        word = int(philox((element // 4, 0, 0, 0), (k0, k1))[element % 4])
        exact = (2 * (word >> 8) + 1 - 2**24) / 2**24 * bound_f32  # 24 x 24 bits: exact in f64
        assert value == float(torch.tensor(exact, dtype=torch.float64).float())


def test_first_values_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_values(seed=1, name="a", shape=(33, 5), bound=1.0)
    monkeypatch.setattr("peerturb.zo.adapters.BLOCKS_AT_ONCE", 7)
    assert torch.equal(whole, first_values(seed=1, name="a", shape=(33, 5), bound=1.0))
    assert float(whole.abs().max()) < 1
    assert abs(float(whole.mean())) < 0.2
    assert 0.2 < float(whole.square().mean()) < 0.45


@pytest.mark.parametrize(
    ("kind", "dtype", "digest"),
    [
        ("lora", "float32", "6a22439281afe2e7"),
        ("lora", "bfloat16", "1d35e56467c4e910"),
    ],
)
def test_first_values_never_change(kind: str, dtype: str, digest: str) -> None:
    """Golden: a run that was started must be joinable with every later release."""
    model, manifest = adapted(kind, dtype=dtype)
    assert run_digest(manifest, list(trainable_weights(model, manifest).values())).hex()[:16] == digest


def test_replicas_start_equal_whatever_torchs_generator_says() -> None:
    digests = []
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        model, manifest = small_model("llama-tied"), None
        torch.set_rng_state(state)
        attach_adapter(model, section(), seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        manifest = build_manifest(model, section())
        digests.append(run_digest(manifest, list(trainable_weights(model, manifest).values())))
    other, manifest = adapted(seed=6)
    digests.append(run_digest(manifest, list(trainable_weights(other, manifest).values())))
    assert digests[0] == digests[1] != digests[2]


def test_vera_matrices_come_from_the_seed() -> None:
    first, second, third = (adapted("vera", seed=seed)[0] for seed in (1, 1, 2))
    matrices = [model.model.layers[0].mlp.up_proj.vera_A["default"] for model in (first, second, third)]
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


def test_targets_are_patterns_of_linear_layers_without_the_head() -> None:
    model = small_model("llama-untied-biased")
    every = target_names(model, AdapterSpec())
    assert len(every) == 14
    assert "lm_head" not in every
    assert target_names(model, AdapterSpec(targets=("*.1.*.[qv]_proj",))) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(ModelError, match=r"'\*\.z_proj' in model.adapter.targets matches no linear layer.*down_proj"):
        target_names(model, AdapterSpec(targets=("*.q_proj", "*.z_proj")))
    with pytest.raises(ModelError, match="matches only layers that get no adapter"):
        target_names(model, AdapterSpec(targets=("lm_head",)))


def test_misuse_is_told() -> None:
    model = small_model("llama-tied")
    with pytest.raises(ModelError, match="attach it first"):
        build_manifest(model, section())
    attach_adapter(model, section(), seed=1)
    with pytest.raises(ModelError, match="has an adapter already"):
        attach_adapter(model, section(), seed=1)


def test_without_peft_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install \"peerturb\[adapters\]\""):
        attach_adapter(small_model("llama-tied"), section(), seed=1)


def run_spec(kind: str = "lora") -> RunSpec:
    return RunSpec(name="unit", seed=5, model=section(kind))


def test_an_adapter_needs_a_seed() -> None:
    document = {"name": "unit", "model": {"name": "x", "digest": "0" * 64, "adapter": {}}}
    with pytest.raises(SpecError, match="follow from the seed, and none is given; write for instance seed = 1"):
        RunSpec.from_document(document, source="RUN.toml")
    assert RunSpec.from_document({**document, "seed": 0}, source="RUN.toml").model.adapter == AdapterSpec()


@pytest.mark.parametrize("wrong", [{"kind": "prefix"}, {"rank": 0}, {"alpha": 0.0}, {"targets": []}, {"dropout": 0.1}])
def test_unknown_kinds_and_keys_are_refused(wrong: dict[str, Any]) -> None:
    document = {"name": "unit", "seed": 1, "model": {"name": "x", "digest": "0" * 64, "adapter": wrong}}
    with pytest.raises(SpecError, match=rf"model.adapter.{next(iter(wrong))}"):
        RunSpec.from_document(document, source="RUN.toml")


def test_canonical_form_and_first_digest() -> None:
    plain = RunSpec(name="unit", model=ModelSpec(name="x", digest="01" * 32))
    assert b"adapter" not in plain.canonical
    assert plain.first_digest == 0x01010101
    spec = run_spec()
    assert b'"adapter":{"alpha":16.0,"kind":"lora","rank":4,"targets":["*"]}' in spec.canonical
    assert RunSpec.from_canonical(spec.canonical) == spec
    assert spec.first_digest is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize(
    ("form", "name"),
    [("causal", "llama-untied-biased"), ("causal", "gpt2"), ("causal", "qwen3-moe"), ("seq2seq", "t5"),
     ("classes", "bert"), ("classes", "roberta"), ("classes", "distilbert"), ("classes", "llama")],
)  # fmt: skip
def test_peft_reads_what_is_written(tmp_path: Path, kind: str, form: str, name: str) -> None:
    import peft

    model, _ = trained(kind, name=name, form=form)
    export_adapter(model, run_spec(kind), tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    base = small_model(name, kind=form)
    for head in trained_whole(base):
        base.get_parameter(head).data.zero_()  # what the files do not bring is missed
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    more = {"decoder_input_ids": IDS} if form == "seq2seq" else {}
    assert torch.equal(loaded(input_ids=IDS, **more).logits, model(input_ids=IDS, **more).logits)


@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_merged_model_is_the_base_with_the_adapter_in_it(kind: str, name: str) -> None:
    model, _ = trained(kind, name=name)
    before = model(input_ids=IDS).logits
    merge_adapter(model)
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in small_model(name).named_parameters()}
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert base_digest(model, "float32") != base_digest(small_model(name), "float32")


def test_merging_adds_rank_after_rank_in_f64() -> None:
    model, _ = trained()
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    left, right = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    total = layer.base_layer.weight.double()
    for rank in range(4):
        total = total + left[:, [rank]] * right[[rank]] * 4.0
    merge_adapter(model)
    assert torch.equal(model.get_submodule(name).weight, total.float())


def test_only_runs_with_an_adapter_have_one_to_export(tmp_path: Path) -> None:
    spec = RunSpec(name="unit", model=ModelSpec(name="x", digest="0" * 64))
    with pytest.raises(ModelError, match="not an adapter"):
        export_adapter(small_model("llama-tied"), spec, tmp_path / "out")


def test_probes_of_an_adapter_lower_the_loss() -> None:
    from peerturb.spec import RoundSpec, StepSpec
    from peerturb.stepping import step_size
    from peerturb.zo.batch import Runner
    from peerturb.zo.objective import Objective
    from peerturb.zo.update import apply_update

    model, manifest = adapted()
    spec = RunSpec(
        name="unit", seed=5, model=section(), round=RoundSpec(probes_max=64), step=StepSpec(learning_rate=0.05)
    )
    objective = Objective(spec.objective, byte_tokenizer())
    engine = ProbeEngine(Runner(model, manifest, objective), spec, objective.encode(_texts(), source="test"))
    weights = list(trainable_weights(model, manifest).values())
    losses = []
    for number in range(12):
        result = engine.contribute(RoundNumber(number), slot=Slot(0), scale=0.5)
        alpha = float(step_size(spec.step, number, 0.5, result.codes, 0))
        apply_update(
            weights,
            manifest,
            family="rank1",
            run_key=spec.run_key,
            round=number,
            slots=[0],
            counts=[len(result.codes)],
            codes=result.codes,
            alpha=alpha,
        )
        losses.append(result.loss)
    assert losses[-1] < losses[0] - 0.2, losses


def _texts() -> list[Any]:
    from peerturb.zo.data import Example

    return [Example(prompt="abcdefgh" * 3, where=f"line {number}") for number in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_losses_of_an_adapter_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    model, manifest = trained(kind)
    check_coverage(Shadow(model, dtype).model, manifest, "rank1")
