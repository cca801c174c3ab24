"""Probes: right losses, untouched weights, repeatable, cut short in order; void codes where the model breaks down."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peerturb.codec import encode
from peerturb.errors import DataError, ModelError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Parameter
from peerturb.stepping import VOID
from peerturb.zo import room
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.need import need_of
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.room import SHARE
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model, spec_of

__all__ = ["one_thread"]

TEXTS = ["hello there", "to be or not", "abc", "the quick brown", "fox", "jumps over", "a lazy dog"]
LABELS: dict[str, Any] = {"kind": "labels", "labels": {"n": " bad", "y": " good!"}, "examples_per_probe": 2}
ROUND, SLOT = RoundNumber(4), Slot(2)


def engine_of(
    name: str = "llama-tied", *, dtype: torch.dtype = torch.float32, rows_max: int | None = None, **fields: Any
) -> ProbeEngine[TokenSequence]:
    spec = spec_of(**fields)
    model = small_model(name)
    manifest = manifest_of(model)
    model = model.to(dtype)
    objective = Objective(spec.objective, byte_tokenizer())
    label = "y" if spec.objective.labels else ""
    sequences = objective.encode([Example(prompt=text, label=label, where="x") for text in TEXTS], source="x")
    return ProbeEngine(Runner(model, manifest, objective), spec, sequences, rows_max=rows_max)


def model_of(engine: ProbeEngine[TokenSequence]) -> Any:
    assert isinstance(engine.evaluator, Runner)
    return engine.evaluator.model


@torch.inference_mode()
def losses_with_written_out_weights(engine: ProbeEngine[TokenSequence], sample: int, step: float) -> float:
    """One side of one probe the slow way: copy the model, change its weights, run each sequence."""
    drawn = [engine.items[index] for index in engine.drawn(ROUND, SLOT, engine.spec.round.probes_max)[sample]]
    signs = Directions(Probes.of(run_key=engine.spec.run_key, round=ROUND, slots=SLOT, samples=[sample]))
    kept = [tensor.clone() for _, tensor in engine.evaluator.parameters]
    for entry, tensor in engine.evaluator.parameters:
        if entry.kind == "vector":
            z = signs.left(entry)[0].view(entry.shape)
        elif engine.spec.perturbation.family == "dense":
            z = signs.dense(entry, 0).view(entry.shape)
        else:
            z = signs.left(entry)[0][:, None] * signs.right(entry)[0][None, :]
        tensor.add_(step * z.to(tensor.dtype))
    loss = float(engine.evaluator.losses(drawn).mean())
    for (_, tensor), value in zip(engine.evaluator.parameters, kept, strict=True):
        tensor.copy_(value)
    return loss


@pytest.mark.parametrize("objective", [{}, LABELS, {"examples_per_probe": 3}])
@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize(("name", "sides"), [("llama-tied", "two"), ("gpt2", "two"), ("llama-tied", "one")])
def test_losses_are_those_of_the_runs_perturbations(
    name: str, sides: str, family: str, objective: dict[str, Any]
) -> None:
    engine = engine_of(name, dtype=torch.float64, family=family, objective=objective, sides=sides)
    measured = engine.measure(ROUND, slot=SLOT)
    for sample in range(6):
        for side, step in ((measured.plus, 1e-3), (measured.reference, -1e-3 if sides == "two" else 0.0)):
            # Token losses are f32 in the labels' sums: 1e-6 is a few roundings.
            assert side[sample] == pytest.approx(losses_with_written_out_weights(engine, sample, step), abs=1e-6)


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_leave_the_weights_alone_bit_for_bit(dtype: torch.dtype, family: str) -> None:
    engine = engine_of(dtype=dtype, family=family)
    before = {name: value.clone() for name, value in model_of(engine).named_parameters()}
    engine.contribute(ROUND, slot=SLOT, scale=0.05)
    for name, value in model_of(engine).named_parameters():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def test_a_round_can_be_repeated_and_rounds_and_slots_differ() -> None:
    engine = engine_of()
    first = engine.contribute(ROUND, slot=SLOT, scale=0.01)
    again = engine_of().contribute(ROUND, slot=SLOT, scale=0.01)
    assert first.codes.tobytes() == again.codes.tobytes()
    assert first.loss == again.loss
    assert engine.contribute(RoundNumber(5), slot=SLOT, scale=0.01).codes.tobytes() != first.codes.tobytes()
    assert engine.contribute(ROUND, slot=Slot(3), scale=0.01).codes.tobytes() != first.codes.tobytes()


@pytest.mark.parametrize("sides", ["two", "one"])
def test_the_size_of_a_forward_changes_nothing(sides: str) -> None:
    whole = engine_of(dtype=torch.float64, sides=sides).measure(ROUND, slot=SLOT)
    for rows_max in (1, 2, 4, 7):
        parts = engine_of(dtype=torch.float64, rows_max=rows_max, sides=sides).measure(ROUND, slot=SLOT)
        np.testing.assert_allclose(parts.plus, whole.plus, rtol=0, atol=2e-6)
        np.testing.assert_allclose(parts.reference, whole.reference, rtol=0, atol=2e-6)
        assert parts.tokens == whole.tokens


@pytest.mark.parametrize("sides", ["two", "one"])
def test_a_probe_larger_than_a_forward_is_split(sides: str) -> None:
    fields: dict[str, Any] = {"dtype": torch.float64, "objective": {"examples_per_probe": 5}, "sides": sides}
    whole = engine_of(**fields).measure(ROUND, slot=SLOT)
    parts = engine_of(rows_max=4, **fields).measure(ROUND, slot=SLOT)
    np.testing.assert_allclose(parts.plus, whole.plus, rtol=0, atol=2e-6)
    np.testing.assert_allclose(parts.reference, whole.reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sides", "distance"), [("two", 2e-3), ("one", 1e-3)])
def test_codes_are_the_encoded_projected_gradients(sides: str, distance: float) -> None:
    engine = engine_of(sides=sides)
    measured = engine.measure(ROUND, slot=SLOT)
    gradients = (measured.plus - measured.reference) / distance
    scale = float(np.abs(gradients).max() / 100)
    result = engine.contribute(ROUND, slot=SLOT, scale=scale)
    assert np.array_equal(result.codes, encode(gradients, scale))
    assert result.codes.dtype == np.int8
    assert np.abs(result.codes.astype(int)).max() == 100
    assert result.loss == pytest.approx(np.concatenate([measured.plus, measured.reference]).mean())


@pytest.mark.parametrize(("name", "sides", "epsilon"), [("llama-tied", "two", 1e-4), ("gpt2", "one", 1e-6)])
def test_projected_gradients_follow_the_true_gradient(name: str, sides: str, epsilon: float) -> None:
    engine = engine_of(name, dtype=torch.float64, epsilon=epsilon, sides=sides)
    measured = engine.measure(ROUND, slot=SLOT)
    found = engine.projected_gradients(measured)
    drawn = engine.drawn(ROUND, SLOT, 6)
    model = model_of(engine)
    for sample in range(6):
        model.requires_grad_(True)
        tokens = torch.from_numpy(engine.items[drawn[sample, 0]].tokens.astype(np.int64))[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
        model.requires_grad_(False)
        signs = Directions(Probes.of(run_key=engine.spec.run_key, round=ROUND, slots=SLOT, samples=[sample]))
        truth = 0.0
        for entry, tensor in engine.evaluator.parameters:
            assert tensor.grad is not None
            left = signs.left(entry)[0].double()
            z = left.view(entry.shape) if entry.kind == "vector" else torch.outer(left, signs.right(entry)[0].double())
            truth += float((tensor.grad * z).sum())
        model.zero_grad()
        assert found[sample] == pytest.approx(truth, rel=1e-3, abs=3e-3)


@pytest.mark.parametrize("sides", ["two", "one"])
def test_a_contribution_cut_short_keeps_its_first_samples(sides: str) -> None:
    whole = engine_of(sides=sides).measure(ROUND, slot=SLOT)
    for allowed in range(1, 6):
        asked = 0

        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            return asked >= allowed  # noqa: B023 - called before the loop goes on

        part = engine_of(rows_max=2, sides=sides).measure(ROUND, slot=SLOT, should_stop=should_stop)
        assert len(part.plus) == len(part.reference) <= 6
        assert sides == "two" or len(part.plus) == min(2 * allowed, 6)
        np.testing.assert_allclose(part.plus, whole.plus[: len(part.plus)], rtol=0, atol=2e-6)
        np.testing.assert_allclose(part.reference, whole.reference[: len(part.plus)], rtol=0, atol=2e-6)


def test_at_least_one_sample_is_measured_under_a_time_budget() -> None:
    engine = engine_of(rows_max=2)
    rules = engine.spec.round.model_copy(update={"budget_ms": 1})
    engine.spec = engine.spec.model_copy(update={"round": rules})
    assert len(engine.contribute(ROUND, slot=SLOT, scale=0.05, should_stop=lambda: True).codes) >= 1


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_sends_void_codes(value: float, sides: str) -> None:
    engine = engine_of(sides=sides)
    model_of(engine).model.norm.weight.data.fill_(value)
    result = engine.contribute(ROUND, slot=SLOT, scale=0.05)
    assert (result.codes == VOID).all()
    assert np.isnan(result.loss)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def limit_rows(engine: ProbeEngine[TokenSequence], rows_max: int, error: Exception) -> list[int]:
    """Let forwards of more rows fail; return a list that gets the rows of each that was tried."""
    losses, tried = engine.evaluator.losses, []

    def small_only(items: Any, perturbation: Any = None) -> Tensor:
        tried.append(len(items) * (1 if perturbation is None else perturbation.sides))
        if tried[-1] > rows_max:
            raise error
        return losses(items, perturbation)

    engine.evaluator.losses = small_only  # type: ignore[method-assign]
    return tried


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "fields",
    [{}, {"sides": "one"}, {"objective": {"examples_per_probe": 3}}, {"objective": LABELS}, {"family": "dense"}],
    ids=str,
)
def test_memory_that_runs_out_halves_the_forwards_for_good(fields: dict[str, Any], error: Exception) -> None:
    whole = engine_of(dtype=torch.float64, **fields).measure(ROUND, slot=SLOT)
    engine = engine_of(dtype=torch.float64, **fields)
    tried = limit_rows(engine, 4, error)
    measured = engine.measure(ROUND, slot=SLOT)
    np.testing.assert_allclose(measured.plus, whole.plus, rtol=0, atol=2e-6)
    np.testing.assert_allclose(measured.reference, whole.reference, rtol=0, atol=2e-6)
    assert measured.tokens == whole.tokens
    assert max(tried) > 4
    tried.clear()
    engine.measure(RoundNumber(5), slot=SLOT)
    assert max(tried) <= 4


def test_a_dense_probe_too_large_for_memory_is_measured_example_by_example() -> None:
    fields: dict[str, Any] = {"dtype": torch.float64, "family": "dense", "objective": {"examples_per_probe": 5}}
    whole = engine_of(**fields).measure(ROUND, slot=SLOT)
    engine = engine_of(**fields)
    tried = limit_rows(engine, 3, MemoryError())
    np.testing.assert_allclose(engine.measure(ROUND, slot=SLOT).plus, whole.plus, rtol=0, atol=2e-6)
    assert 10 in tried
    assert tried[-1] == 2


def test_memory_that_runs_out_at_the_smallest_forward_is_told() -> None:
    engine = engine_of()
    limit_rows(engine, 1, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"))
    with pytest.raises(ModelError, match=r"(?s)smallest forward, 2 rows of \d+ tokens .*5 bytes.*objective.tokens_max"):
        engine.measure(ROUND, slot=SLOT)


def test_other_errors_are_not_taken_for_memory() -> None:
    engine = engine_of()
    tried = limit_rows(engine, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        engine.measure(ROUND, slot=SLOT)
    assert len(tried) == 1


@pytest.mark.parametrize("rows_max", [None, 8])
def test_little_free_memory_makes_small_forwards(rows_max: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def forwards(free_bytes: int) -> list[int]:
        monkeypatch.setattr(room, "free_bytes", lambda device: free_bytes)
        engine = engine_of(rows_max=rows_max)
        tried = limit_rows(engine, 99, MemoryError())
        engine.measure(ROUND, slot=SLOT)
        return tried

    engine = engine_of()
    need = need_of(engine.evaluator, family="rank1")
    shortest = min((engine.evaluator.size(item) for item in engine.items), key=lambda size: size.tokens)
    plenty = forwards(2**40)
    assert max(plenty) > 4
    little = forwards(int((need.fixed + 4.5 * need.of(shortest)) / SHARE["cpu"]))
    if rows_max is not None:  # what a person has chosen is tried
        assert little == plenty == forwards(0)
    else:
        assert max(little) == 4
        assert set(forwards(0)) == {2}


@pytest.mark.parametrize("objective", [{"examples_per_probe": 2}, LABELS])
def test_examples_of_a_probe_are_sorted_by_length_apart_and_nothing_changes(objective: dict[str, Any]) -> None:
    engine = engine_of(dtype=torch.float64, objective=objective, rows_max=8)
    drawn = engine.drawn(ROUND, SLOT, 6)
    batches = list(engine.micro_batches(drawn))
    assert {batch.together for batch in batches} == {1}
    found = sorted(
        (sample, example)
        for batch in batches
        for sample, example in zip(batch.samples.tolist(), batch.examples[:, 0].tolist(), strict=True)
    )
    assert found == sorted((sample, example) for sample in range(6) for example in drawn[sample].tolist())
    measured = engine.measure(ROUND, slot=SLOT)
    for sample in range(6):
        assert measured.plus[sample] == pytest.approx(losses_with_written_out_weights(engine, sample, 1e-3), abs=1e-6)


def test_examples_stay_together_where_apart_costs_more() -> None:
    objective = {"examples_per_probe": 2}
    dense = engine_of(family="dense", objective=objective)
    assert {batch.together for batch in dense.micro_batches(dense.drawn(ROUND, SLOT, 6))} == {2}
    alike = engine_of(objective={"examples_per_probe": 2, "tokens_max": 2})
    assert len(set(alike._lengths.tolist())) == 1
    assert {batch.together for batch in alike.micro_batches(alike.drawn(ROUND, SLOT, 6))} == {2}


class Watched:
    """Stands in an engine's evaluator's place: notes every forward and may change what it returns."""

    def __init__(self, engine: ProbeEngine[TokenSequence], change: Callable[[int, Tensor], Tensor] | None = None):
        self.forwards: list[tuple[int, bool]] = []
        """Examples through the model, and whether the weights were moved."""
        self._losses, self._change = engine.evaluator.losses, change
        engine.evaluator.losses = self.losses  # type: ignore[method-assign]

    def losses(self, items: Any, perturbation: Any = None) -> Tensor:
        losses = self._losses(items, perturbation)
        is_moved = bool(perturbation.steps(MATRIX).any())
        self.forwards.append((losses.numel(), is_moved))
        return losses if self._change is None else self._change(len(self.forwards) - 1, losses)


MATRIX = Parameter(index=0, name="any", shape=(1, 1), dtype="float32")


def test_one_sided_probes_share_the_draw_of_sample_0() -> None:
    engine = engine_of(sides="one", objective={"examples_per_probe": 3})
    drawn = engine.drawn(ROUND, SLOT, 6)
    assert drawn.shape == (6, 3)
    assert (drawn == drawn[0]).all()
    assert np.array_equal(drawn[:1], engine.drawn(ROUND, SLOT, 1))
    assert not np.array_equal(drawn, engine.drawn(ROUND, Slot(3), 6))


def test_one_sided_rounds_go_through_all_the_data() -> None:
    engine = engine_of(sides="one")
    for epoch in range(3):
        seen = [int(engine.drawn(RoundNumber(7 * epoch + number), SLOT, 6)[0, 0]) for number in range(7)]
        assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("rows_max", [None, 2])
def test_the_clean_loss_is_measured_once_and_counted(rows_max: int | None) -> None:
    engine = engine_of(sides="one", objective={"examples_per_probe": 2}, rows_max=rows_max)
    watched = Watched(engine)
    measured = engine.measure(ROUND, slot=SLOT)
    assert [examples for examples, is_moved in watched.forwards if not is_moved] == [2]
    assert sum(examples for examples, _ in watched.forwards) == 2 * (6 + 1)
    assert len(watched.forwards) == (2 if rows_max is None else 7)
    tokens = sum(len(engine.items[index].tokens) for index in engine.drawn(ROUND, SLOT, 1)[0].tolist())
    assert measured.tokens == 7 * tokens
    part = engine.measure(ROUND, slot=SLOT, should_stop=lambda: True)
    assert part.tokens == (len(part.plus) + 1) * tokens
    assert len(part.plus) == (6 if rows_max is None else 2)  # two rows are the longer, then the shorter example of both


def test_two_sided_tokens_are_those_of_both_sides() -> None:
    engine = engine_of(objective={"examples_per_probe": 2})
    tokens = sum(len(engine.items[index].tokens) for index in engine.drawn(ROUND, SLOT, 6).flatten().tolist())
    assert engine.measure(ROUND, slot=SLOT).tokens == 2 * tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_clean_loss_that_is_not_finite_makes_all_codes_void(value: float) -> None:
    engine = engine_of(sides="one")
    Watched(engine, lambda number, losses: losses * value if number == 0 else losses)
    assert (engine.contribute(ROUND, slot=SLOT, scale=0.05).codes == VOID).all()


def test_one_sided_only_the_probe_that_breaks_down_is_void() -> None:
    engine = engine_of(sides="one", rows_max=1)
    whole = engine.contribute(ROUND, slot=SLOT, scale=0.05).codes
    Watched(engine, lambda number, losses: losses * float("nan") if number == 3 else losses)
    codes = engine.contribute(ROUND, slot=SLOT, scale=0.05).codes
    assert codes[2] == VOID
    assert np.array_equal(np.delete(codes, 2), np.delete(whole, 2))


@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama-untied-biased"])
def test_the_clean_loss_is_rounded_as_the_others_are(name: str, dtype: torch.dtype, family: str) -> None:
    """Weights that move by less than rounding shows have the clean loss to the last bit."""
    engine = engine_of(name, dtype=dtype, family=family, sides="one", epsilon=1e-30, rows_max=1)
    measured = engine.measure(ROUND, slot=SLOT)
    assert np.array_equal(measured.plus, measured.reference)


def test_too_few_sequences_are_an_error_at_the_start() -> None:
    with pytest.raises(DataError, match="7 sequences, a probe needs 8"):
        engine_of(objective={"examples_per_probe": 8})
