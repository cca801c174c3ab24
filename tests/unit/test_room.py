"""Room for forwards: parts that fit, what a row needs, and evaluations that go on when memory runs out."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peerturb.errors import ModelError
from peerturb.zo import room
from peerturb.zo.batch import Runner, Size
from peerturb.zo.data import Example
from peerturb.zo.evaluate import answers, evaluate
from peerturb.zo.need import Need, cache_width, need_of
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.room import Room, in_parts
from tests.zo_models import byte_tokenizer, manifest_of, small_model, spec_of

LABELS: dict[str, Any] = {"kind": "labels", "labels": {"n": " bad", "y": " good!"}}


def runner_of(**objective: Any) -> Runner:
    model = small_model("llama-tied")
    return Runner(model, manifest_of(model), Objective(spec_of(objective=objective).objective, byte_tokenizer()))


def sequences(count: int) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [TokenSequence(tokens=generator.integers(2, 60, 4 + k % 9, dtype=np.int32), start=1) for k in range(count)]


class Small:
    """Work that runs out of memory beyond so many items."""

    def __init__(self, items_max: int) -> None:
        self.items_max = items_max
        self.tried: list[int] = []

    def __call__(self, items: Sequence[TokenSequence]) -> list[int]:
        self.tried.append(len(items))
        if len(items) > self.items_max:
            raise MemoryError
        return [len(item.tokens) for item in items]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_free(count: int | None) -> None:
        monkeypatch.setattr(room, "free_bytes", lambda device: count)

    return set_free


def test_parts_are_in_order_and_as_large_as_allowed(free: Any) -> None:
    free(None)
    items = sequences(20)
    work = Small(99)
    parts = list(in_parts(runner_of(), items, work, items_max=8))
    assert work.tried == [8, 8, 4]
    assert [tokens for part in parts for tokens in part] == [len(item.tokens) for item in items]
    work = Small(99)
    list(in_parts(runner_of(), items, work, items_max=8, tokens_max=36))
    assert work.tried[0] == 3, "the longest of the next eight has 11 tokens"
    assert sum(work.tried) == 20


def test_parts_are_halved_where_memory_runs_out(free: Any) -> None:
    free(None)
    items, work = sequences(20), Small(3)
    parts = list(in_parts(runner_of(), items, work, items_max=16))
    assert [tokens for part in parts for tokens in part] == [len(item.tokens) for item in items]
    assert work.tried[:3] == [16, 8, 4]
    assert max(work.tried[3:]) <= 3
    with pytest.raises(ModelError, match="smallest forward, 1 row of"):
        list(in_parts(runner_of(), items, Small(0), items_max=16))


def test_what_is_judged_together_is_not_split(free: Any) -> None:
    free(0)
    runner, items = runner_of(), sequences(20)
    assert len(next(iter(in_parts(runner, items, Small(99), items_max=20)))) == 1
    runner.is_whole = True
    assert len(next(iter(in_parts(runner, items, Small(99), items_max=20)))) == 20
    with pytest.raises(ModelError, match="20 rows of 12 tokens"):
        list(in_parts(runner, items, Small(19), items_max=20))


def test_an_evaluation_is_not_judged_together(free: Any) -> None:
    free(None)
    runner = runner_of(**LABELS)
    examples = [Example(prompt="say " * (1 + k % 3), label="y", where="x") for k in range(12)]
    items = runner.objective.encode(examples, source="x")
    found = evaluate(runner, items)
    runner.is_whole = True
    logits, shapes = runner.logits, []

    def small_only(rows: Any, perturbation: Any = None) -> torch.Tensor:
        shapes.append(len(rows.ids))
        if shapes[-1] > 5:
            raise MemoryError
        return logits(rows, perturbation)

    runner.logits = small_only  # type: ignore[method-assign]
    parts = evaluate(runner, items)
    assert found is not None
    assert parts is not None
    assert parts.loss == pytest.approx(found.loss, rel=1e-6)  # a product of other shapes may round otherwise
    assert (parts.accuracy, parts.examples) == (found.accuracy, found.examples)
    assert len(shapes) > 2


def test_free_memory_is_asked_for_once_a_look(free: Any) -> None:
    runner = runner_of()
    place = Room(runner, family="rank1")
    row_bytes = np.array([100, 1000])
    assert place.rows(row_bytes).min() > 1e12
    free(int(5_000 / room.SHARE["cpu"]))
    assert place.rows(row_bytes).min() > 1e12
    place.look()
    assert place.rows(row_bytes).tolist() == [50, 5]
    chosen = Room(runner, is_planned=False)
    chosen.look()
    assert chosen.rows(row_bytes).min() > 1e12


@pytest.mark.parametrize("objective", [{}, LABELS])
def test_an_evaluation_in_parts_gives_the_same_figures(
    objective: dict[str, Any], free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(None)
    examples = [Example(prompt="say " * (1 + k % 3), label="y" if objective else "", where="x") for k in range(12)]
    runner = runner_of(**objective)
    items = runner.objective.encode(examples, source="x")
    whole = evaluate(runner, items)
    said = answers(runner, examples) if objective else None
    logits = runner.logits

    def small_only(rows: Any, perturbation: Any = None) -> torch.Tensor:
        if len(rows.ids) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return logits(rows, perturbation)

    monkeypatch.setattr(runner, "logits", small_only)
    parts = evaluate(runner, items)
    assert whole is not None
    assert parts is not None
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (parts.accuracy, parts.examples) == (whole.accuracy, whole.examples)
    if objective:
        assert answers(runner, examples) == said


def test_a_row_needs_its_widest_place_and_what_it_keeps() -> None:
    need = Need(token=10, pair=2, output=4, held=1, row=7, fixed=99)
    assert need.of(Size(tokens=3, outputs=1)) == 7 + 3 * 10 + 9 * 2
    assert need.of(Size(tokens=3, outputs=100)) == 7 + 400
    assert need.of(Size(tokens=3, outputs=100, held=5)) == 7 + 400 + 5


def test_a_model_needs_more_the_wider_it_is_and_its_vectors_are() -> None:
    runner = runner_of()
    need = need_of(runner, family="rank1")
    widest = runner.model.config.intermediate_size
    assert need.token == 5 * 4 * widest
    assert need.fixed == 0
    assert need.row == 4 * sum(entry.elements for entry, _ in runner.parameters if entry.kind == "vector")
    assert need_of(runner).row == 0
    assert need_of(runner, family="dense").fixed == 5 * max(entry.elements for entry, _ in runner.parameters)
    runner.model.config._attn_implementation = "eager"
    assert need_of(runner).pair == 2 * 4 * runner.model.config.num_attention_heads


def test_the_cache_holds_keys_and_values_of_all_layers() -> None:
    model = small_model("llama-tied")
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    assert cache_width(model) == 2 * config.num_hidden_layers * config.num_key_value_heads * size


def test_a_module_of_ones_own_is_as_wide_as_its_largest_tensor() -> None:
    runner = runner_of()
    bare: Any = SimpleNamespace(parameters=runner.parameters, device=runner.device, dtype=runner.dtype)
    assert need_of(bare).token == 20 * max(max(entry.shape) for entry, _ in runner.parameters)
