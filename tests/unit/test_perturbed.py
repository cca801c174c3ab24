"""The perturbed forward equals the model with written-out perturbed weights, writes no weight, and skips nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peerturb.errors import ModelError
from peerturb.manifest import Manifest
from peerturb.zo import experts
from peerturb.zo.coverage import check_coverage
from peerturb.zo.experts import Routing, expert_linear
from peerturb.zo.families import FAMILIES
from peerturb.zo.model import prepare
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.perturbed import PerturbedForward
from tests.zo_models import CONFIGS, EXCLUDE, RandomSigns, manifest_of, one_thread, small_model

__all__ = ["one_thread"]

PROBES, PER_PROBE, TOKENS = 3, 2, 7
EPSILON = 1e-2


def perturbation_of(signs: RandomSigns, family: str, dtype: torch.dtype, sides: int = 2) -> Perturbation:
    device = torch.device("cpu")
    return FAMILIES[family](signs, probes=PROBES, epsilon=EPSILON, dtype=dtype, device=device, sides=sides)


def pairs_of(model: Any, manifest: Manifest) -> list[Any]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return [(entry, named[entry.name]) for entry in manifest]


def batch(sides: int = 2) -> Tensor:
    ids = torch.randint(2, 260, (PROBES, 1, PER_PROBE, TOKENS), generator=torch.Generator().manual_seed(5))
    return ids.expand(PROBES, sides, PER_PROBE, TOKENS).reshape(-1, TOKENS)


@torch.inference_mode()
def written_out(model: Any, manifest: Manifest, signs: RandomSigns, family: str, ids: Tensor) -> Tensor:
    """Logits with really perturbed weights, probe by probe and side by side; experts as transformers runs them."""
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        model.config._experts_implementation = "eager"
    named = dict(model.named_parameters(remove_duplicate=False))
    kept = {entry.name: named[entry.name].clone() for entry in manifest}
    parts = []
    for index, rows in enumerate(ids.split(PER_PROBE)):
        probe, side = divmod(index, len(ids) // PER_PROBE // PROBES)
        step = -EPSILON if side else EPSILON
        for entry in manifest:
            z = signs.noise(entry, probe, family).to(kept[entry.name].dtype)
            named[entry.name].copy_(kept[entry.name] + step * 2.0**entry.exponent * z)
        parts.append(model(input_ids=rows, use_cache=False).logits)
    if experts is not None:
        model.config._experts_implementation = experts
    for name, value in kept.items():
        named[name].copy_(value)
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(
    ("name", "sides"),
    [*((name, 2) for name in sorted(CONFIGS)), *((name, 1) for name in ("gpt2", "gpt-oss", "llama-tied", "qwen3-moe"))],
)
def test_equals_written_out_weights(name: str, sides: int, family: str) -> None:
    model = small_model(name, dtype=torch.float64)
    manifest = tuple(
        replace(entry, exponent=(0, 2, -1)[entry.index % 3])
        for entry in manifest_of(model, exclude=EXCLUDE.get(name, ()))
    )
    signs = RandomSigns(manifest, PROBES)
    ids = batch(sides)
    before = {key: value.clone() for key, value in model.named_parameters()}
    with (
        torch.inference_mode(),
        PerturbedForward(
            pairs_of(model, manifest), perturbation_of(signs, family, torch.float64, sides), rows=len(ids)
        ) as mode,
    ):
        logits = model(input_ids=ids, use_cache=False).logits
    assert mode.used == {entry.name for entry in manifest}
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    truth = written_out(model, manifest, signs, family, ids)
    plain = model(input_ids=ids, use_cache=False).logits
    assert (truth - plain).abs().max() > 1e-2  # the perturbation does something
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_float32_agrees_to_three_millionths(name: str) -> None:
    model = small_model(name)
    manifest = manifest_of(model)
    signs = RandomSigns(manifest, PROBES)
    ids = batch()
    with (
        torch.inference_mode(),
        PerturbedForward(pairs_of(model, manifest), perturbation_of(signs, "rank1", torch.float32), rows=len(ids)),
    ):
        logits = model(input_ids=ids, use_cache=False).logits
    truth = written_out(model, manifest, signs, "rank1", ids)
    assert (logits - truth).abs().max() <= 3e-6 * truth.abs().max()


def test_only_wanted_positions_leave_the_head() -> None:
    model = small_model("llama-tied", dtype=torch.float64)
    manifest = manifest_of(model)
    signs = RandomSigns(manifest, PROBES)
    ids = batch()
    positions = torch.randint(0, TOKENS, (len(ids), 2), generator=torch.Generator().manual_seed(1))
    pairs = pairs_of(model, manifest)
    with torch.inference_mode():
        with PerturbedForward(pairs, perturbation_of(signs, "rank1", torch.float64), rows=len(ids)):
            everywhere = model(input_ids=ids, use_cache=False).logits
        with PerturbedForward(
            pairs,
            perturbation_of(signs, "rank1", torch.float64),
            rows=len(ids),
            head=model.get_output_embeddings().weight,
            positions=positions,
        ) as mode:
            kept = model(input_ids=ids, use_cache=False).logits
    assert mode.has_kept
    picked = everywhere.gather(1, positions[:, :, None].expand(-1, -1, everywhere.shape[2]))
    torch.testing.assert_close(kept, picked, rtol=0, atol=1e-12)


def test_excluded_parameters_stay_plain() -> None:
    model = small_model("qwen2", dtype=torch.float64)
    manifest = manifest_of(model, exclude=["*bias", "*embed*", "*layernorm*"])
    assert not any("bias" in entry.name or "layernorm" in entry.name for entry in manifest)
    signs = RandomSigns(manifest, PROBES)
    ids = batch()
    with (
        torch.inference_mode(),
        PerturbedForward(pairs_of(model, manifest), perturbation_of(signs, "rank1", torch.float64), rows=len(ids)),
    ):
        logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, written_out(model, manifest, signs, "rank1", ids), rtol=0, atol=1e-12)


def test_bfloat16_keeps_the_perturbation_of_a_scale_near_one() -> None:
    """1.1 + epsilon is 1.1 in bfloat16; the product must change all the same."""
    model = small_model("llama-tied", dtype=torch.bfloat16)
    model.model.norm.weight.data.fill_(1.1)
    manifest = tuple(entry for entry in manifest_of(model.float()) if entry.name == "model.norm.weight")
    model.bfloat16()
    signs = RandomSigns(manifest, PROBES)
    ids = batch()
    perturbation = FAMILIES["rank1"](
        signs, probes=PROBES, epsilon=1e-3, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    with torch.inference_mode(), PerturbedForward(pairs_of(model, manifest), perturbation, rows=len(ids)):
        logits = model(input_ids=ids, use_cache=False).logits.float()
    sides = logits.view(PROBES, 2, -1)
    assert (sides[:, 0] - sides[:, 1]).abs().mean() > 0


class Wrapped(nn.Module):
    """A model with one more parameter, used in some way."""

    def __init__(self, model: Any, use: str) -> None:
        super().__init__()
        self.model = model
        self.extra = nn.Parameter(torch.full((model.config.vocab_size,), 0.5), requires_grad=False)
        self.grid = nn.Parameter(torch.ones(7, model.config.vocab_size), requires_grad=False)
        self.use = use
        self._kept: Tensor | None = None

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        output = self.model(input_ids=input_ids, use_cache=use_cache)
        logits = output.logits
        if self.use == "sigmoid":
            logits = logits * torch.sigmoid(self.extra)
        elif self.use == "slice":
            logits = logits + self.grid[: logits.shape[1]]
        elif self.use == "data":
            logits = logits + self.extra.data
        elif self.use == "cached":
            self._kept = self.extra.float() + 0 if self._kept is None else self._kept
            logits = logits * self._kept
        elif self.use == "one plus":
            logits = logits * (1.0 + self.extra.float())
        elif self.use == "flattened":
            logits = (logits.flatten(0, 1) * self.extra).view_as(logits)
        elif self.use == "transposed rows":
            logits = (logits.transpose(0, 1).contiguous() * self.extra).transpose(0, 1)
        output.logits = logits
        return output


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("sigmoid", "extra"),
        ("slice", "grid"),
        ("data", "extra"),
        ("cached", "extra"),
        ("transposed rows", "extra"),
        ("", "extra"),
    ],
)
def test_unknown_uses_are_refused_by_name(use: str, name: str, family: str) -> None:
    model = Wrapped(small_model("llama-tied"), use)
    other = {"extra": "grid", "grid": "extra"}[name]
    manifest = manifest_of(model, exclude=[other])
    with pytest.raises(ModelError, match=rf"\b{name}\b.*model\.exclude"):
        check_coverage(model, manifest, family)
    check_coverage(model, manifest_of(model, exclude=["extra", "grid"]), family)  # the remedy works


@pytest.mark.parametrize("use", ["one plus", "flattened"])
def test_derived_vectors_are_followed(use: str) -> None:
    model = Wrapped(small_model("llama-tied"), use)
    check_coverage(model, manifest_of(model, exclude=["grid"]))


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_known_models_pass_the_coverage_check(name: str, family: str) -> None:
    model = small_model(name)
    check_coverage(model, manifest_of(model, exclude=EXCLUDE.get(name, ())), family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", [2, 1])
def test_a_wrong_perturbation_is_noticed_and_named(
    sides: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is not blind: a family that forgets one matrix fails it."""
    right = FAMILIES["rank1"]

    class Forgetful(right):  # type: ignore[misc, valid-type]
        def add_linear(self, parameter: Any, x: Tensor, y: Tensor, **options: Any) -> None:
            if "layers.1.mlp.up_proj" not in parameter.name:
                super().add_linear(parameter, x, y, **options)

    monkeypatch.setitem(FAMILIES, "rank1", Forgetful)
    model = small_model("llama-tied")
    manifest = manifest_of(model)
    model = model.to(dtype)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        check_coverage(model, manifest, sides=sides)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral"])
def test_known_models_pass_the_one_sided_coverage_check(name: str, family: str) -> None:
    model = small_model(name)
    check_coverage(model, manifest_of(model), family, sides=1)


def test_bfloat16_models_pass_the_coverage_check() -> None:
    model = small_model("llama-tied")
    manifest = manifest_of(model)
    check_coverage(model.bfloat16(), manifest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_of_experts_equals_the_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes it; torch has it for CPUs too, so its layout is checked here."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, 8, generator=generator).to(dtype)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)  # nobody goes to the second
    routing = Routing(experts=torch.tensor([0] * 4 + [2] * 5), tokens=torch.arange(9), ends=ends, tokens_total=9)
    for is_transposed in (False, True):
        x = torch.randn(9, 16 if is_transposed else 8, generator=generator).to(dtype)
        loop = expert_linear(x, weight, routing, is_transposed=is_transposed)
        with monkeypatch.context() as patch:
            patch.setattr(experts, "_can_group", lambda x, weight: True)
            grouped = expert_linear(x, weight, routing, is_transposed=is_transposed)
        torch.testing.assert_close(grouped, loop)
        matrices = weight if is_transposed else weight.transpose(1, 2)
        torch.testing.assert_close(loop[4:], (x[4:] @ matrices[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [0.005, 0.02, 0.1])
def test_deep_models_in_half_precision_pass_the_coverage_check(deviation: float, dtype: torch.dtype) -> None:
    """Rounding adds up over layers, and small weights are soon outweighed by what they are perturbed with."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=1376,
    )  # fmt: skip
    model: Any = prepare(AutoModelForCausalLM.from_config(config), "float32")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, deviation)
    manifest = manifest_of(model)
    check_coverage(model.to(dtype), manifest)
