"""Losses in another type than the weights': the copy follows the weights, and they never follow it."""

from typing import Any

import pytest
import torch

from peerturb.errors import ModelError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import ObjectiveSpec
from peerturb.zo.batch import Runner
from peerturb.zo.coverage import check_coverage
from peerturb.zo.data import Example
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.resolution import epsilon_warning
from peerturb.zo.shadow import Shadow, compute_dtype
from tests.zo_models import EXCLUDE, byte_tokenizer, manifest_of, one_thread, small_model, spec_of

__all__ = ["one_thread"]

HALVES = [torch.float16, torch.bfloat16]


def test_auto_is_the_weights_own_type_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert compute_dtype("auto", "bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("float16", "float32", cpu) == torch.float16
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert compute_dtype("auto", "bfloat16", cuda) == expected
        assert compute_dtype("auto", "float32", cuda) == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_a_copy_follows_the_weights_and_keeps_ties(dtype: torch.dtype) -> None:
    model = small_model("llama-tied")
    shadow = Shadow(model, dtype)
    named = dict(shadow.model.named_parameters(remove_duplicate=False))
    assert named["lm_head.weight"] is named["model.embed_tokens.weight"]
    assert {tensor.dtype for tensor in named.values()} == {dtype}
    assert shadow.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert shadow.model.config is not model.config
    assert model.config.dtype == torch.float32
    before = named["lm_head.weight"].clone()
    model.lm_head.weight.data.add_(1.0)
    shadow.refresh()
    assert torch.equal(named["lm_head.weight"], before)  # nobody said that it had changed
    shadow.expire()
    shadow.refresh()
    assert torch.equal(named["lm_head.weight"], model.lm_head.weight.to(dtype))


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "mixtral", "gpt-oss"])
def test_half_precision_copies_pass_the_coverage_check(name: str, dtype: torch.dtype, family: str) -> None:
    model = small_model(name)
    manifest = manifest_of(model, exclude=EXCLUDE.get(name, ()))
    check_coverage(Shadow(model, dtype).model, manifest, family)


@pytest.mark.parametrize(("kind", "name"), [("classes", "bert"), ("classes", "roberta"), ("seq2seq", "t5")])
@pytest.mark.parametrize("dtype", HALVES)
def test_other_kinds_pass_it_too(kind: str, name: str, dtype: torch.dtype) -> None:
    model = small_model(name, kind=kind)
    check_coverage(Shadow(model, dtype).model, manifest_of(model))


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.99), (torch.bfloat16, 0.9)])
def test_gradients_in_half_precision_are_those_of_float32(dtype: torch.dtype, least: float, family: str) -> None:
    model = small_model("llama-tied")
    objective = Objective.of(ObjectiveSpec(tokens_max=16), model, byte_tokenizer())
    items = objective.encode([Example(prompt="many words make a text, " * 4, where="x")], source="x")
    spec = spec_of(family=family, probes=24, epsilon=4e-3)
    found = []
    for evaluated in (model, Shadow(model, dtype).model):
        engine = ProbeEngine(Runner(evaluated, manifest_of(model), objective), spec, items)
        measured = engine.measure(RoundNumber(0), slot=Slot(0))
        found.append(torch.from_numpy(engine.projected_gradients(measured)))
    assert torch.corrcoef(torch.stack(found))[0, 1] > least


def pairs_of(model: Any) -> list[Any]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return [(entry, named[entry.name]) for entry in manifest_of(model)]


def test_an_epsilon_that_rounds_away_is_told_with_the_number_that_would_not() -> None:
    pairs = pairs_of(small_model("llama-tied"))  # matrices of rms 0.15
    assert epsilon_warning(pairs, 1e-3, torch.float32) is None
    assert epsilon_warning(pairs, 1e-3, torch.bfloat16) is None
    warning = epsilon_warning(pairs, 1e-5, torch.bfloat16)
    assert warning is not None
    assert "1e-05" in warning
    assert "bfloat16" in warning
    least = float(warning.rpartition("epsilon = ")[2].split()[0])
    assert 4e-4 < least < 9e-4  # half of 2**-7, times 0.15
    assert epsilon_warning(pairs, 1.05 * least, torch.bfloat16) is None
    assert epsilon_warning(pairs, 1e-9, torch.float16) is not None


def test_what_cannot_be_perturbed_is_refused_by_name_in_a_copy_too() -> None:
    model = small_model("gpt-oss")
    with pytest.raises(ModelError, match=r"self_attn\.sinks.*model\.exclude"):
        check_coverage(Shadow(model, torch.float16).model, manifest_of(model))


def test_a_copy_shares_no_memory() -> None:
    model = small_model("gpt2")
    addresses = {tensor.data_ptr() for tensor in model.parameters()}
    assert not addresses & {tensor.data_ptr() for tensor in Shadow(model, torch.float32).model.parameters()}
