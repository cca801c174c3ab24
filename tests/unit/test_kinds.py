"""Classifiers and encoder-decoders: probes equal written-out weights, padding changes nothing, answers are theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaXLConfig,
    XLMRobertaXLForSequenceClassification,
)

from peerturb.errors import DataError, ModelError, SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import ObjectiveSpec, RunSpec
from peerturb.zo.batch import Runner, each_side
from peerturb.zo.coverage import check_coverage, check_trial, text_trial
from peerturb.zo.data import Example
from peerturb.zo.evaluate import answers, evaluate
from peerturb.zo.families import FAMILIES
from peerturb.zo.kinds import Form, Task, kind_for, shared_tables
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.update import apply_update
from tests.zo_models import (
    BERT,
    CLASSIFIERS,
    CONFIGS,
    SEQ2SEQ,
    RandomSigns,
    byte_tokenizer,
    manifest_of,
    one_thread,
    small_model,
    spec_of,
)

__all__ = ["one_thread"]

PROBES, PER_PROBE = 3, 2
EPSILON = 1e-2
TEXTS = ("a fine film", "no", "what a bore it is", "so so", "I left", "see it again!")
MODELS = [("classes", name) for name in sorted(CLASSIFIERS)] + [("seq2seq", name) for name in sorted(SEQ2SEQ)]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "classes": {"kind": "classes", "classes": ("bad", "good", "fair")},
    "seq2seq": {"kind": "completion", "completion": "{answer}"},
}


def runner_of(form: str, name: str, *, dtype: torch.dtype = torch.float64, **fields: Any) -> Runner:
    model = small_model(name, kind=form, dtype=dtype)
    spec = ObjectiveSpec.model_validate({"tokens_max": 24, **OBJECTIVES[form], **fields})
    return Runner(model, manifest_of(model), Objective.of(spec, model, byte_tokenizer()))


def examples_of(runner: Runner) -> list[Any]:
    values = runner.objective.label_values or ("",)
    return runner.objective.encode(
        [
            Example(prompt=text, completion=text[::-2], label=values[number % len(values)], where=text)
            for number, text in enumerate(TEXTS)
        ],
        source="x",
    )


@torch.inference_mode()
def written_out(runner: Runner, signs: RandomSigns, family: str, items: list[Any], sides: int = 2) -> Tensor:
    """Losses with really perturbed weights: [probes, sides, examples per probe]."""
    kept = [tensor.clone() for _, tensor in runner.parameters]
    result = torch.empty(PROBES, sides, PER_PROBE, dtype=torch.float64)
    for probe in range(PROBES):
        for side, step in enumerate((EPSILON, -EPSILON)[:sides]):
            for (entry, tensor), plain in zip(runner.parameters, kept, strict=True):
                tensor.copy_(plain + step * signs.noise(entry, probe, family).to(plain.dtype))
            result[probe, side] = runner.losses(items[probe * PER_PROBE : (probe + 1) * PER_PROBE])
    for (_, tensor), plain in zip(runner.parameters, kept, strict=True):
        tensor.copy_(plain)
    return result


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(
    ("kind", "name", "sides"), [*((*model, 2) for model in MODELS), ("classes", "bert", 1), ("seq2seq", "t5", 1)]
)
def test_losses_are_those_of_written_out_weights(kind: str, name: str, sides: int, family: str) -> None:
    runner = runner_of(kind, name)
    manifest: Manifest = tuple(entry for entry, _ in runner.parameters)
    signs, items = RandomSigns(manifest, PROBES), examples_of(runner)
    assert runner.objective.rows(items).mask is not None  # of different lengths
    perturbation = FAMILIES[family](
        signs, probes=PROBES, epsilon=EPSILON, dtype=torch.float64, device=torch.device("cpu"), sides=sides
    )
    losses = runner.losses(items, perturbation)
    truth = written_out(runner, signs, family, items, sides)
    assert (truth[:, 0] - (truth[:, 1] if sides == 2 else runner.losses(items).view(PROBES, -1))).abs().min() > 1e-6
    torch.testing.assert_close(losses, truth, rtol=0, atol=1e-10 if kind == "classes" else 1e-6)  # T5 norms in f32


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_they_pass_the_coverage_check(kind: str, name: str, family: str) -> None:
    model = small_model(name, kind=kind)
    check_coverage(model, manifest_of(model), family)


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_padding_changes_no_loss(kind: str, name: str) -> None:
    runner = runner_of(kind, name)
    items = examples_of(runner)
    alone = torch.cat([runner.losses([item]) for item in items])
    torch.testing.assert_close(runner.losses(items), alone, rtol=0, atol=1e-6)


def test_shared_positions_are_told_from_rows_even_when_their_numbers_agree() -> None:
    """With as many tokens as rows, the shape of T5's table of positions is that of a batch."""
    runner = runner_of("seq2seq", "t5", tokens_max=12)
    items = [runner.objective.encode([Example(prompt="elevenchars", completion="y", where="x")], source="x")[0]] * 6
    assert shared_tables(runner.model) == {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")
    }
    signs = RandomSigns(tuple(entry for entry, _ in runner.parameters), PROBES)
    perturbation = FAMILIES["rank1"](
        signs, probes=PROBES, epsilon=EPSILON, dtype=torch.float64, device=torch.device("cpu")
    )
    assert each_side(runner.objective.rows(items), perturbation).ids.shape == (12, 12)
    losses = runner.losses(items, perturbation)
    torch.testing.assert_close(losses, written_out(runner, signs, "rank1", items), rtol=0, atol=1e-6)


def test_an_undeclared_table_of_positions_is_refused_by_name() -> None:
    model = small_model("t5", kind="seq2seq")
    named = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ModelError, match=r"relative_attention_bias.*model\.exclude"):
        check_trial(text_trial(model), [(entry, named[entry.name]) for entry in manifest_of(model)], "rank1")


def test_a_decoder_writes_labels_too() -> None:
    runner = runner_of("seq2seq", "t5", kind="labels", completion="", labels={"n": "bad", "y": "good!"})
    items = runner.objective.encode([Example(prompt=text, label="y", where=text) for text in TEXTS], source="x")
    rows = runner.objective.rows(items)
    assert rows.ids.shape[0] == 2 * len(TEXTS)
    result = evaluate(runner, items)
    assert result is not None
    assert result.accuracy is not None


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_text_of_an_encoder_decoders_classifier_has_one_end(name: str) -> None:
    """The head reads at the texts' ends, and the model wants as many of them in every row."""
    runner = runner_of("classes", name)
    texts = ("short", "one </s> within </s>", "a text that is longer than all the tokens it may have")
    examples = [Example(prompt=text, label="good", where=text) for text in texts]
    items = runner.objective.encode(examples, source="x")
    assert [(item.tokens == 1).sum() for item in items] == [1, 1, 1]
    assert [item.tokens[-1] for item in items] == [1, 1, 1]
    assert len(items[2].tokens) == 24
    assert runner.losses(items).isfinite().all()


def test_classes_are_evaluated_and_answered() -> None:
    runner = runner_of("classes", "bert")
    items = examples_of(runner)
    chosen = runner.logits(runner.objective.rows(items)).argmax(1).tolist()
    result = evaluate(runner, items)
    assert result is not None
    assert result.accuracy == sum(a == b % 3 for b, a in enumerate(chosen)) / len(items)
    said = answers(runner, [Example(prompt=text, label="good", where=text) for text in TEXTS])
    assert [answer.answer for answer in said] == [OBJECTIVES["classes"]["classes"][index] for index in chosen]
    assert [answer.is_right for answer in said] == [index == 1 for index in chosen]


def test_greedy_text_of_a_decoder_is_the_librarys() -> None:
    runner = runner_of("seq2seq", "t5", dtype=torch.float32)
    read = torch.tensor([runner.objective.prompt_tokens("see it")])
    whole = runner.model.generate(read, max_new_tokens=24, do_sample=False, num_beams=1)
    (said,) = answers(runner, [Example(prompt="see it", completion="x", where="x")])
    assert said.answer == runner.objective.tokenizer.decode(whole[0], skip_special_tokens=True)


def test_long_prompts_keep_their_end_and_the_special_tokens() -> None:
    objective = runner_of("classes", "bert", tokens_max=6).objective
    (item,) = objective.encode([Example(prompt="0123456789", label="bad", where="x")], source="x")
    assert item.tokens[0] == 0
    assert objective.tokenizer.decode(item.tokens[1:].tolist()) == "56789"


def test_training_lowers_the_loss_of_a_classifier() -> None:
    """Probes, codes and updates: the whole path from data to a smaller loss."""
    runner = runner_of("classes", "minilm", dtype=torch.float32)
    items = examples_of(runner)
    spec = spec_of(objective={**OBJECTIVES["classes"], "tokens_max": 24}, probes=32)
    engine = ProbeEngine(runner, spec, items)
    before = evaluate(runner, items)
    for number in range(12):
        codes = engine.contribute(RoundNumber(number), slot=Slot(0), scale=0.2).codes
        apply_update(
            [tensor for _, tensor in runner.parameters],
            tuple(entry for entry, _ in runner.parameters),
            family="rank1",
            run_key=spec.run_key,
            round=RoundNumber(number),
            slots=(Slot(0),),
            counts=(32,),
            codes=codes.tobytes(),
            alpha=2.0**-15,
        )
    after = evaluate(runner, items)
    assert before is not None
    assert after is not None
    assert after.loss < before.loss


def test_objectives_and_models_must_fit() -> None:
    for kind, name, fields in (
        ("classes", "bert", {"kind": "text", "classes": ()}),
        ("seq2seq", "t5", {"kind": "text"}),
    ):
        with pytest.raises(DataError, match=r"objective\.kind = \"text\""):
            runner_of(kind, name, **fields)
    spec = ObjectiveSpec.model_validate({"tokens_max": 16, **OBJECTIVES["classes"]})
    with pytest.raises(DataError, match="no classification head"):
        Objective.of(spec, small_model("gpt2"), byte_tokenizer())


def test_an_encoder_is_no_language_model() -> None:
    with pytest.raises(ModelError, match=r"bert.*classes"):
        kind_for(CLASSIFIERS["bert"](), Task())
    assert kind_for(CLASSIFIERS["bert"](), Task(classes=2)) == "classes"
    assert kind_for(CONFIGS["gpt2"](), Task()) == "causal"
    assert kind_for(SEQ2SEQ["t5"](), Task()) == "seq2seq"


POSITIONS: list[tuple[Any, Any, int]] = [
    (RobertaForSequenceClassification, RobertaConfig(**BERT), 62),
    (RobertaForSequenceClassification, RobertaConfig(**{**BERT, "pad_token_id": 0}), 63),
    (CamembertForSequenceClassification, CamembertConfig(**BERT), 62),
    (XLMRobertaForSequenceClassification, XLMRobertaConfig(**BERT), 62),
    (XLMRobertaXLForSequenceClassification, XLMRobertaXLConfig(**BERT), 62),
    # Its table always takes 1 for the padding token's place, and it has relative positions besides.
    (MPNetForSequenceClassification, MPNetConfig(**{**BERT, "pad_token_id": 5}), 62),
    (BertForSequenceClassification, BertConfig(**BERT), 64),
    (GPT2LMHeadModel, CONFIGS["gpt2"](), 64),
    (OPTForCausalLM, CONFIGS["opt"](), 64),
    (BartForConditionalGeneration, SEQ2SEQ["bart"](), 64),
]


@torch.inference_mode()
@pytest.mark.parametrize(("builder", "config", "positions"), POSITIONS)
def test_positions_run_out_where_the_model_fails(builder: Any, config: Any, positions: int) -> None:
    model = builder(config).eval()
    assert Form.of(model).positions_max == positions
    ids = torch.full((1, positions + 1), 9)
    assert model(input_ids=ids[:, 1:]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_positions_without_a_table_are_limited_by_the_configuration_or_not_at_all() -> None:
    assert Form.of(small_model("llama-tied")).positions_max == 64
    model = small_model("t5", kind="seq2seq")
    model.config.n_positions = 8  # as in the oldest files
    assert Form.of(model).positions_max is None


@pytest.mark.parametrize(
    "fields", [{"kind": "classes"}, {"classes": ("a", "b")}, {"kind": "classes", "classes": ("a", "a")}]
)
def test_classes_of_a_spec_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="classes"):
        RunSpec.from_document(
            {"name": "x", "model": {"name": "x", "digest": "0" * 64}, "objective": fields}, source="RUN.toml"
        )


def test_manifest_of_a_classifier_has_its_head(tmp_path: Path) -> None:
    model = small_model("roberta", kind="classes")
    names = [entry.name for entry in build_manifest(model, spec_of().model)]
    assert "classifier.out_proj.weight" in names


def test_only_runs_with_classes_have_them_in_their_identity() -> None:
    plain = spec_of()
    assert b"classes" not in plain.canonical
    spec = spec_of(objective=OBJECTIVES["classes"])
    assert b'"classes":["bad","good","fair"]' in spec.canonical
    for whole in (plain, spec):
        assert RunSpec.from_canonical(whole.canonical) == whole
    assert Task.of(spec).classes == 3
    assert Task.of(plain) == Task()
