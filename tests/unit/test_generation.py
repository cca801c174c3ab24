"""Text generated under perturbed weights: each row's own, the same as one model at a time would write."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from peerturb.errors import ObjectiveError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import ObjectiveSpec, PerturbationSpec, RoundSpec, RunSpec
from peerturb.zo.families import FAMILIES
from peerturb.zo.generation import GenerationEvaluator, Writing
from peerturb.zo.local import LocalRun
from peerturb.zo.model import base_digest
from peerturb.zo.probe import ProbeEngine
from tests.zo_models import BERT, RandomSigns, byte_tokenizer, manifest_of, one_thread, small_model, spec_of

__all__ = ["one_thread"]

PROMPTS = ["ab", "xyzxyz", "k", "hello", "gh", "abcabcabc"]
"""Two for each of three probes, of different lengths."""


def evaluator(model: Any, manifest: Manifest, **changes: Any) -> GenerationEvaluator[Any]:
    given = {"reward": lambda prompt, text: float(len(text)), "writing": Writing(tokens_max=8), **changes}
    return GenerationEvaluator(model, byte_tokenizer(), manifest, **given)


def perturbation(
    manifest: Manifest, family: str = "rank1", epsilon: float = 0.05, *, seed: int = 0, sides: int = 2
) -> Any:
    signs = RandomSigns(manifest, 3, seed)
    given = {"probes": 3, "epsilon": epsilon, "dtype": torch.float32, "device": torch.device("cpu"), "sides": sides}
    return signs, FAMILIES[family](signs, **given)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, (0.05, -0.05)) for name in ("llama-tied", "mistral-window", "qwen3", "gpt2", "opt")),
        ("llama-tied", (0.05,)),
    ],
)
def test_each_row_writes_what_its_own_weights_say(name: str, steps: tuple[float, ...], family: str) -> None:
    model = small_model(name)
    manifest = manifest_of(model)
    signs, noise = perturbation(manifest, family, sides=len(steps))
    texts = evaluator(model, manifest).texts(PROMPTS, noise)
    assert len(set(texts)) >= 3
    row = 0
    for probe in range(3):
        for side in steps:
            other = small_model(name)
            named = dict(other.named_parameters(remove_duplicate=False))
            for entry in manifest:
                named[entry.name].data.add_(signs.noise(entry, probe, family).float(), alpha=side)
            for prompt in PROMPTS[2 * probe : 2 * probe + 2]:
                ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
                wanted = other.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=1
                )
                assert texts[row] == byte_tokenizer().decode(wanted[0, ids.shape[1] :], skip_special_tokens=True), row
                row += 1


def test_weights_are_only_read() -> None:
    model = small_model("llama-tied")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    manifest = manifest_of(model)
    evaluator(model, manifest).losses(PROMPTS, perturbation(manifest)[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


def test_sampling_repeats_itself_and_differs_by_seed_and_perturbation() -> None:
    model = small_model("llama-tied")
    manifest = manifest_of(model)

    def texts(seed: int, *, signs: int = 0, epsilon: float = 1e-9) -> list[str]:
        writing = Writing(tokens_max=8, temperature=1.0, seed=seed)
        return evaluator(model, manifest, writing=writing).texts(
            PROMPTS, perturbation(manifest, "rank1", epsilon, seed=signs)[1]
        )

    first = texts(1)
    assert first == texts(1)
    assert first != texts(2)
    assert first != texts(1, signs=5)
    # With next to no perturbation both sides of a probe write the same: they draw with the same numbers.
    assert first[0:2] == first[2:4]
    assert first[4:6] == first[6:8]
    assert first[0:2] != evaluator(model, manifest).texts(PROMPTS[:2])


def test_one_sided_probes_and_the_clean_weights_draw_with_the_same_numbers() -> None:
    """Sampled texts then differ by the weights alone: with next to no perturbation every reward is the clean one."""
    model = small_model("llama-tied")
    judge = evaluator(
        model,
        manifest_of(model),
        reward=lambda prompt, text: float(sum(map(ord, text))),
        writing=Writing(tokens_max=8, temperature=1.0),
    )
    spec = spec_of(sides="one", epsilon=1e-9, objective={"examples_per_probe": 2})
    engine = ProbeEngine(judge, spec, PROMPTS[:2], rows_max=4)  # the same prompts every round
    rounds = [engine.measure(RoundNumber(number), slot=Slot(0)) for number in range(3)]
    assert all((measured.plus == measured.reference).all() for measured in rounds)
    assert len({measured.reference[0] for measured in rounds}) == 3  # each round draws anew
    assert engine.measure(RoundNumber(0), slot=Slot(1)).reference[0] != rounds[0].reference[0]


@pytest.mark.parametrize("rows_max", [None, 2])
def test_equal_prompts_of_a_probe_draw_for_themselves_whatever_shares_a_forward(rows_max: int | None) -> None:
    model, texts = small_model("llama-tied"), []

    def reward(prompt: str, text: str) -> float:
        texts.append((prompt, text))
        return float(zlib.crc32(text.encode()))

    judge = evaluator(model, manifest_of(model), reward=reward, writing=Writing(tokens_max=8, temperature=1.0))
    spec = spec_of(probes=1, objective={"examples_per_probe": 4})
    found = {}
    for name, prompts in (("alike", ["ab"] * 4), ("others too", ["ab", "abababab", "ab", "ab"])):
        texts.clear()
        ProbeEngine(judge, spec, prompts, rows_max=rows_max).measure(RoundNumber(0), slot=Slot(0))
        found[name] = {text for prompt, text in texts if prompt == "ab"}
    assert len(found["alike"]) >= 4  # four examples on two sides, of nearly the same weights
    assert len(found["others too"]) >= 3


def test_sampling_follows_the_probabilities() -> None:
    model = small_model("llama-tied")
    writing = Writing(tokens_max=1, temperature=1.0)
    generator = evaluator(model, manifest_of(model), writing=writing)
    ids = byte_tokenizer()("ab")["input_ids"]
    probabilities = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], 0)
    best = int(probabilities.argmax())
    word = str(byte_tokenizer().decode([best]))
    found = generator.texts(["ab"] * 2000).count(word) / 2000
    assert found == pytest.approx(float(probabilities[best]), abs=0.04)


def test_the_end_token_ends_a_text() -> None:
    model = small_model("llama-tied")
    whole = evaluator(model, manifest_of(model)).texts(["ab"])[0]
    letter = next(character for character in whole[1:] if character.isascii() and character not in whole[:1])
    model.generation_config.eos_token_id = [1, byte_tokenizer()(letter)["input_ids"][1]]
    assert evaluator(model, manifest_of(model)).texts(["ab", "hello"])[0] == whole.partition(letter)[0]


@pytest.mark.parametrize(
    ("changes", "items", "message"),
    [
        ({"reward": lambda prompt, text: "good"}, ["a"], "`reward` returned str; it must return a number"),
        ({"reward": lambda prompt, text: None}, ["a"], "`reward` returned NoneType"),
        ({"prompt": lambda item: 3}, ["a"], "`prompt` returned int"),
        ({"writing": Writing(tokens_max=60)}, ["abcdefgh"], r"has 9 tokens; with 60 new ones .* 64 positions"),
        ({"writing": Writing(tokens_max=0)}, ["a"], "tokens_max must be at least 1"),
        ({"writing": Writing(temperature=-1.0)}, ["a"], "temperature at least 0"),
    ],
)
def test_misuse_is_told(changes: dict[str, Any], items: list[str], message: str) -> None:
    model = small_model("llama-tied")
    with pytest.raises(ObjectiveError, match=message):
        evaluator(model, manifest_of(model), **changes).losses(items)


def test_models_that_do_not_write_are_refused() -> None:
    encoder = BertForMaskedLM(BertConfig(**BERT))
    for model, name in (
        (small_model("t5", kind="seq2seq"), "T5ForConditionalGeneration"),
        (small_model("bert", kind="classes"), "BertForSequenceClassification"),
        (small_model("llama", kind="classes"), "LlamaForSequenceClassification"),
        (encoder, "BertForMaskedLM"),
        (encoder.bert, "BertModel"),
        (torch.nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(ObjectiveError, match=f"needs a causal language model .* not {name}: encoder-decoders"):
            evaluator(model, manifest_of(model))


def test_a_reward_that_is_not_finite_makes_a_void_code() -> None:
    model = small_model("llama-tied")
    spec = spec_of(probes=2, digest=base_digest(model, "float32"))
    run = LocalRun(evaluator(model, manifest_of(model), reward=lambda prompt, text: float("nan")), spec, [PROMPTS])
    assert run.step().codes == b"\x80\x80"


def test_rewards_rise() -> None:
    model = small_model("llama-tied")
    spec = RunSpec(
        name="unit",
        model=spec_of(digest=base_digest(model, "float32")).model,
        perturbation=PerturbationSpec(epsilon=0.03, initial_scale=0.05),
        round=RoundSpec(probes_max=48),
        objective=ObjectiveSpec(examples_per_probe=2),
    )
    items = [{"prompt": prompt, "wanted": "abc"} for prompt in PROMPTS]
    judge = evaluator(
        model,
        manifest_of(model),
        prompt=lambda item: item["prompt"],
        reward=lambda item, text: sum(letter in item["wanted"] for letter in text) / 8,
    )
    run = LocalRun(judge, spec, [items])
    before = run.loss(items)
    for _ in run.run(15):
        pass
    assert run.loss(items) < before - 0.1, (before, run.loss(items))


def test_a_real_tokenizer(shared: Path) -> None:
    from peerturb.zo.model import load_model

    model, tokenizer = load_model(shared / "models" / "stories260k", "float32")
    generator: GenerationEvaluator[str] = GenerationEvaluator(
        model, tokenizer, manifest_of(model), lambda prompt, text: 0.0, writing=Writing(tokens_max=12)
    )
    assert generator.texts(["Once upon a time"])[0].startswith(", there was")
    sampled: GenerationEvaluator[str] = GenerationEvaluator(
        model, tokenizer, manifest_of(model), lambda prompt, text: 0.0, writing=Writing(tokens_max=12, temperature=1.0)
    )
    assert len(set(sampled.texts(["Once upon a time"] * 8))) > 2
