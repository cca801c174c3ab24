"""Modules whose parameters cannot be perturbed row by row: measured with written-out copies, slowly but rightly."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from peerturb.errors import ModelError, ObjectiveError, UnfollowedError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import ObjectiveSpec, PerturbationSpec, RoundSpec, RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.coverage import check_written, text_slowness
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.data import Example
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.families import FAMILIES
from peerturb.zo.generation import GenerationEvaluator, Writing
from peerturb.zo.local import LocalRun
from peerturb.zo.metrics import ScoredRunner, error_rate
from peerturb.zo.model import prepare
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.replay import replay
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model, spec_of, written_out

__all__ = ["one_thread"]

WORDS, TOKENS, WIDTH = 20, 6, 8
EPSILON = 1e-2
SLOW = "one forward for each probe and side"


class Texts(nn.Module):
    """Words to logits, with some layer in between; `use` is (layer, hidden) -> hidden."""

    def __init__(self, layer: nn.Module, use: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(WORDS, WIDTH), layer, nn.Linear(WIDTH, WORDS)
        self._use = use or (lambda layer, hidden: layer(hidden))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self._use(self.layer, self.words(ids)))
        return logits


class Held(nn.Module):
    """A parameter by itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(*shape))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bag(ids))[:, None].expand(-1, TOKENS, -1)
        return logits


def add_in_place(layer: Held, hidden: Tensor) -> Tensor:
    hidden = hidden * 1
    hidden += layer.weight
    return hidden


def begin(layer: Held, hidden: Tensor) -> Tensor:
    """As vision transformers write their class token."""
    whole = hidden * 1
    whole[:, 0] = layer.weight
    return whole


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Texts(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda layer, x: layer(x, x, x, need_weights=False)[0]
    ),
    "encoder layer": lambda: Texts(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)),
    "lstm": lambda: Texts(nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda layer, x: layer(x)[0]),
    "conv1d": lambda: Texts(nn.Conv1d(TOKENS, TOKENS, 3, padding=1)),
    "conv2d": lambda: Texts(nn.Conv2d(1, 1, 3, padding=1), lambda layer, x: layer(x[:, None])[:, 0]),
    "group norm": lambda: Texts(nn.GroupNorm(2, TOKENS)),
    "prelu": lambda: Texts(nn.PReLU()),
    "embedding bag": Bag,
    "bilinear": lambda: Texts(nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda layer, x: layer(x, x)),
    "einsum": lambda: Texts(Held(WIDTH, WIDTH), lambda layer, x: torch.einsum("bti,ij->btj", x, layer.weight)),
    "in place": lambda: Texts(Held(WIDTH), add_in_place),
    "assignment": lambda: Texts(Held(WIDTH), begin),
    "sliced positions": lambda: Texts(Held(1, 9, WIDTH), lambda layer, x: x + layer.weight[:, : x.shape[1]]),
    "number": lambda: Texts(Held(1), lambda layer, x: x * layer.weight.item()),
    "list of numbers": lambda: Texts(
        Held(WIDTH), lambda layer, x: x * torch.tensor(layer.weight.tolist(), dtype=x.dtype)
    ),
    "condition": lambda: Texts(Held(1), lambda layer, x: x * (float(layer.weight) if layer.weight > 0 else 2.0)),
    "positions of data": lambda: Texts(Held(TOKENS, WIDTH), lambda layer, x: x + layer.weight.data),
}


def items(count: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(row, row.flip(0)) for row in torch.randint(0, WORDS, (count, TOKENS), generator=generator)]


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.float().transpose(1, 2), batch[1], reduction="none").mean(1)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]().to(dtype)


def spec_for(module: nn.Module, *, family: str = "rank1", sides: str = "two") -> RunSpec:
    return RunSpec(
        name="unit",
        model=base_spec(module, name="m"),
        perturbation=PerturbationSpec.model_validate({"family": family, "sides": sides, "epsilon": EPSILON}),
        round=RoundSpec(probes_max=4),
        objective=ObjectiveSpec(examples_per_probe=3),
    )


@pytest.mark.parametrize(
    ("name", "dtype", "family", "sides"),
    [
        *((name, torch.float32, "rank1", "two") for name in MODULES),
        *((name, torch.bfloat16, "rank1", "two") for name in ("encoder layer", "conv2d")),
        ("conv1d", torch.float32, "dense", "two"),
        ("lstm", torch.float32, "rank1", "one"),
    ],
)
def test_losses_are_those_of_written_out_weights(name: str, dtype: torch.dtype, family: str, sides: str) -> None:
    module = build(name, dtype)
    spec = spec_for(module, family=family, sides=sides)
    evaluator = CustomEvaluator(module, spec.model, items(8), loss=cross_entropy)
    with pytest.warns(RuntimeWarning, match=rf"{SLOW}.*the parameter (layer|bag)\..*model\.exclude") as caught:
        engine = ProbeEngine(evaluator, spec, items())
    assert ("rounds away" in str(caught[0].message)) == (dtype == torch.bfloat16)
    before = [tensor.clone() for _, tensor in evaluator.parameters]
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    assert all(torch.equal(tensor, kept) for (_, tensor), kept in zip(evaluator.parameters, before, strict=True))
    drawn = engine.drawn(RoundNumber(0), Slot(0), 4)
    moved = set()
    for sample in range(4):
        back = -EPSILON if sides == "two" else 0.0
        rows = [items()[index] for index in drawn[sample]]
        batch = (torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))
        for step, found in ((EPSILON, measured.plus[sample]), (back, measured.reference[sample])):
            copied = written_out(module, evaluator.manifest, spec, sample, step)
            with torch.no_grad():
                wanted = float(cross_entropy(copied(batch[0]), batch).double().mean())
            assert found == pytest.approx(wanted, rel=1e-6 if dtype == torch.float32 else 4e-3)
            moved.add(wanted)
    assert len(moved) == (8 if sides == "two" else 5)  # the copies differ, or equality would say nothing


@pytest.mark.parametrize("sides", ["two", "one"])
def test_a_run_learns_and_replay_gives_the_same_bits(sides: str) -> None:
    module = build("conv1d")
    spec = spec_for(module, sides=sides)
    spec = spec.model_copy(update={"round": RoundSpec(probes_max=32)})
    evaluator = CustomEvaluator(module, spec.model, items(8), loss=cross_entropy)
    base = [tensor.clone() for _, tensor in evaluator.parameters]
    with pytest.warns(RuntimeWarning, match=SLOW):
        run = LocalRun(evaluator, spec, [items()])
    before = run.loss(items())
    for _ in run.run(15):
        pass
    assert run.loss(items()) < before
    assert replay(run.rounds, base, run.manifest, spec) == run.digest()


def test_time_is_asked_after_every_probe() -> None:
    module = build("conv1d")
    spec = spec_for(module)
    evaluator = CustomEvaluator(module, spec.model, items(8), loss=cross_entropy)
    with pytest.warns(RuntimeWarning, match=SLOW):
        engine = ProbeEngine(evaluator, spec, items())
    answers = iter([False, True])
    measured = engine.measure(RoundNumber(0), slot=Slot(0), should_stop=lambda: next(answers))
    assert len(measured.plus) == 2


def forwards_of(evaluator: CustomEvaluator[Any]) -> list[int]:
    """Note the examples of every forward from now on."""
    losses, seen = evaluator.losses, []

    def watched(items: Any, perturbation: Any = None) -> Tensor:
        seen.append(len(items))
        return losses(items, perturbation)

    evaluator.losses = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(("rows_max", "parts"), [(None, [3]), (3, [3]), (2, [1, 2]), (1, [1, 1, 1])])
def test_a_side_is_as_large_as_allowed(rows_max: int | None, parts: list[int]) -> None:
    module = build("conv1d")
    spec = spec_for(module)
    evaluator = CustomEvaluator(module, spec.model, items(8), loss=cross_entropy)
    with pytest.warns(RuntimeWarning, match=SLOW):
        whole = ProbeEngine(evaluator, spec, items()).measure(RoundNumber(0), slot=Slot(0))
    with pytest.warns(RuntimeWarning, match=SLOW):
        engine = ProbeEngine(evaluator, spec, items(), rows_max=rows_max)
    assert engine.slowness is not None
    seen = forwards_of(evaluator)
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    assert sorted(seen) == sorted(2 * 4 * parts)
    np.testing.assert_allclose(measured.plus, whole.plus, rtol=1e-6)


def test_a_model_without_attention_is_measured_too() -> None:
    config = MambaConfig(
        vocab_size=300,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = prepare(MambaForCausalLM(config), "float32")
    spec = spec_of(objective={"examples_per_probe": 2}, probes=2, epsilon=EPSILON)
    objective = Objective(spec.objective, byte_tokenizer())
    sequences = objective.encode([Example(prompt="ab" * n, label="", where="x") for n in range(2, 7)], source="test")
    manifest = manifest_of(model)
    with pytest.warns(RuntimeWarning, match=SLOW):
        engine = ProbeEngine(Runner(model, manifest, objective), spec, sequences)
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    drawn = engine.drawn(RoundNumber(0), Slot(0), 2)
    for sample in range(2):
        moved = written_out(model, manifest, spec, sample, EPSILON)
        wanted = Runner(moved, manifest, objective).losses([sequences[index] for index in drawn[sample]])
        assert measured.plus[sample] == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_a_loss_of_a_group_is_given_the_whole_group() -> None:
    module, seen = build("conv1d"), []

    def loss(outputs: Tensor, batch: Any) -> float:
        seen.append(len(outputs))
        return float(cross_entropy(outputs, batch).max())

    spec = spec_for(module)
    evaluator = CustomEvaluator(module, spec.model, items(8), loss=loss, per_probe=3)
    with pytest.warns(RuntimeWarning, match=SLOW):
        engine = ProbeEngine(evaluator, spec, items())
    seen.clear()
    engine.measure(RoundNumber(0), slot=Slot(0))
    assert seen == [3] * 8


def mix(layer: Any, hidden: Tensor) -> Tensor:
    found: Tensor = layer(hidden)
    return found - found.mean(0)


def test_rows_that_mix_are_still_refused() -> None:
    def evaluate(module: nn.Module, examples: list[Any]) -> CustomEvaluator[Any]:
        return CustomEvaluator(module, base_spec(module, name="m"), examples, loss=cross_entropy)

    statistics = Texts(nn.BatchNorm1d(TOKENS), lambda layer, x: layer.train()(x))
    with pytest.raises(ObjectiveError, match="`forward` gives example 0 another value alone"):
        evaluate(statistics, items(8))
    module = Texts(nn.Conv1d(TOKENS, TOKENS, 1), mix)
    with pytest.raises(ObjectiveError, match="`forward` gives example 0 another value alone"):
        evaluate(module, items(8))
    # One example, repeated, is alike among others and alone: it proves nothing.
    with pytest.raises(UnfollowedError, match=r"layer\.(weight|bias) cannot be perturbed"):
        ProbeEngine(evaluate(module, items(1)), spec_for(module), items())


@pytest.mark.parametrize("strength", [1.0, 0.02])
def test_the_check_of_written_out_weights_notices_mixed_rows(strength: float) -> None:
    module = build("conv1d")
    evaluator = CustomEvaluator(module, base_spec(module, name="m"), items(8), loss=cross_entropy)
    error = UnfollowedError("layer.weight", "uses it in `conv1d`")
    check_written(evaluator.trial, evaluator.parameters, error)

    def mixed(numbers: Tensor) -> Tensor:
        outputs = evaluator.trial(numbers)
        return outputs - strength * outputs.mean(0)

    with pytest.raises(UnfollowedError, match="conv1d"):
        check_written(mixed, evaluator.parameters, error)


class Keeper(nn.Module):
    """Derives a tensor once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Conv1d(TOKENS, TOKENS, 1), nn.Parameter(torch.ones(WIDTH))
        self.words = nn.Embedding(WORDS, WIDTH)
        self.kept: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.kept = self.kept or [torch.exp(self.scale)]
        outputs: Tensor = self.first(self.words(ids)) * self.kept[0]
        assert self.scale.shape == (WIDTH,)  # a question about it is no use of it
        return outputs


def test_a_parameter_that_is_not_used_is_refused() -> None:
    module = Keeper()
    evaluator = CustomEvaluator(module, base_spec(module, name="m"), items(8), loss=lambda found, _: found.mean((1, 2)))
    with pytest.raises(ModelError, match="never uses the parameter scale in a forward"):
        ProbeEngine(evaluator, spec_for(module), items())


def text_model() -> Any:
    """A language model with a norm of its own kind."""
    model = small_model("llama-tied")
    norm = model.model.norm
    norm.forward = lambda hidden: F.rms_norm(hidden, norm.weight.shape) * torch.sigmoid(norm.weight)
    return model


def test_language_models_are_measured_so_too() -> None:
    given = {"kind": "labels", "template": "{text}", "labels": {"0": " a", "1": " b"}, "examples_per_probe": 4}
    spec = spec_of(objective=given, probes=3, epsilon=EPSILON)
    objective = Objective(spec.objective, byte_tokenizer())
    examples = [Example(prompt="ab"[n % 2] * (2 + n % 5), label=str(n % 2), where=str(n)) for n in range(12)]
    sequences = objective.encode(examples, source="test")

    def squares(scores: Tensor, answers: Tensor) -> Tensor:
        return scores.double().square().mean(1)

    for metric in (squares, error_rate):
        model = text_model()
        runner = ScoredRunner(model, manifest_of(model), objective, metric)
        with pytest.warns(RuntimeWarning, match=r"the parameter model\.norm\.weight cannot be perturbed row by row"):
            engine = ProbeEngine(runner, spec, sequences)
        measured = engine.measure(RoundNumber(0), slot=Slot(0))
        drawn = engine.drawn(RoundNumber(0), Slot(0), 3)
        for sample in range(3):
            chosen = [sequences[index] for index in drawn[sample]]
            for step, found in ((EPSILON, measured.plus[sample]), (-EPSILON, measured.reference[sample])):
                moved = perturbed_texts(model, spec, sample, step)
                wanted = ScoredRunner(moved, manifest_of(moved), objective, metric).losses(chosen)
                assert found == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_the_cost_of_a_language_model_is_told_beforehand() -> None:
    model = text_model()
    found = text_slowness(model, manifest_of(model), "rank1")
    assert found is not None
    assert SLOW in found
    assert 'add "model.norm.weight"' in found
    model = small_model("llama-tied")
    assert text_slowness(model, manifest_of(model), "rank1") is None


def perturbed_texts(model: Any, spec: RunSpec, sample: int, step: float) -> Any:
    """Return the model with perturbed weights; the replaced norm must be that of the copy."""
    moved = text_model()
    moved.load_state_dict(written_out(model, manifest_of(model), spec, sample, step).state_dict())
    return moved


def test_texts_are_written_under_written_out_weights() -> None:
    model, spec = text_model(), spec_of(objective={"examples_per_probe": 2}, probes=3, epsilon=0.05)
    prompts = ["a", "bb", "abab", "b"]

    def reward(prompt: str, text: str) -> float:
        return float(zlib.crc32(text.encode()))  # another for every text

    def judge(model: Any) -> GenerationEvaluator[str]:
        writing = Writing(tokens_max=6, temperature=1.0)
        return GenerationEvaluator(model, byte_tokenizer(), manifest_of(model), reward, writing=writing)

    with pytest.warns(RuntimeWarning, match=r"model\.norm\.weight"):
        engine = ProbeEngine(judge(model), spec, prompts)
    measured = engine.measure(RoundNumber(0), slot=Slot(0))
    drawn = engine.drawn(RoundNumber(0), Slot(0), 3)
    for sample in range(3):
        signs = Directions(Probes.of(run_key=spec.run_key, round=0, slots=0, samples=[sample]))
        # At epsilon 0 a perturbation moves nothing, but what is drawn still follows from its signs.
        still = FAMILIES["rank1"](
            signs, probes=1, epsilon=0.0, dtype=torch.float32, device=torch.device("cpu"), sides=1
        )
        chosen = [prompts[index] for index in drawn[sample]]
        for step, found in ((0.05, measured.plus[sample]), (-0.05, measured.reference[sample])):
            moved = small_model("llama-tied")
            norm = moved.model.norm
            moved.load_state_dict(written_out(model, manifest_of(model), spec, sample, step).state_dict())
            weight = torch.sigmoid(norm.weight)
            norm.forward = lambda hidden, weight=weight: F.rms_norm(hidden, weight.shape) * weight
            assert found == float(judge(moved).losses(chosen, still).mean())
