"""Tokens and losses: pieces, continuations, labels of several tokens, against sums written out here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerturb.errors import DataError
from peerturb.spec import ObjectiveSpec
from peerturb.zo.batch import Runner
from peerturb.zo.data import Example
from peerturb.zo.objective import Objective, TokenSequence
from tests.zo_models import byte_tokenizer, manifest_of, one_thread, small_model

__all__ = ["one_thread"]


def objective(*, begins_with_bos: bool = True, positions_max: int | None = 64, **fields: Any) -> Objective:
    spec = ObjectiveSpec.model_validate({"tokens_max": 16, **fields})
    return Objective(spec, byte_tokenizer(begins_with_bos=begins_with_bos), positions_max=positions_max)


def runner_of(bound: Objective) -> Runner:
    model = small_model("llama-tied")
    return Runner(model, manifest_of(model), bound)


def token_losses(runner: Runner, tokens: np.ndarray[Any, Any], start: int) -> torch.Tensor:
    """Negative log-probabilities of tokens[start:], one sequence at a time, no padding."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    logits = runner.model(input_ids=ids, use_cache=False).logits[0].double()
    chosen = torch.log_softmax(logits, 1)[torch.arange(len(tokens) - 1), ids[0, 1:]]
    return -chosen[start - 1 :]


LABELS: dict[str, Any] = {"kind": "labels", "labels": {"n": " bad", "y": " good!"}}


def test_texts_are_cut_into_pieces_that_hold_every_token() -> None:
    bound = objective(tokens_max=8)
    pieces = bound.encode([Example(prompt="abcdefghijklmnop", where="x")], source="x")
    joined = np.concatenate([piece.tokens for piece in pieces]).tolist()
    assert joined == bound.tokenizer("abcdefghijklmnop")["input_ids"][:16]  # the 17th stands alone: nothing predicts it
    assert [len(piece.tokens) for piece in pieces] == [8, 8]
    assert all(piece.start == 1 for piece in pieces)


def test_long_texts_are_tokenised_in_blocks_without_loss(tmp_path: Path) -> None:
    text = "".join(f"line {number} of many\n" for number in range(12_000))
    (tmp_path / "long.txt").write_text(text)
    bound = objective(begins_with_bos=False)
    joined = np.concatenate([piece.tokens for piece in bound.load(tmp_path / "long.txt")])
    assert bound.tokenizer.decode(joined.tolist()) == text


def test_a_text_of_one_token_cannot_be_learnt() -> None:
    with pytest.raises(DataError, match="two tokens or more"):
        objective(begins_with_bos=False).encode([Example(prompt="a", where="x")], source="x")


def test_losses_of_padded_batches_equal_single_sequences() -> None:
    bound = objective()
    runner = runner_of(bound)
    sequences = bound.encode([Example(prompt=text, where="x") for text in ("hello there", "hm", "abc def")], source="x")
    found = runner.losses(sequences)
    truth = torch.stack([token_losses(runner, s.tokens, s.start).mean() for s in sequences])
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


def test_only_the_completion_counts() -> None:
    bound = objective(kind="completion", template="{q}", completion="{a}")
    runner = runner_of(bound)
    sequences = bound.encode(
        [Example(prompt="2+2=", completion=" four", where="x"), Example(prompt="x", completion="y", where="y")],
        source="x",
    )
    assert [bound.tokenizer.decode(s.tokens[s.start :].tolist()) for s in sequences] == [" four", "y"]
    truth = torch.stack([token_losses(runner, s.tokens, s.start).mean() for s in sequences])
    torch.testing.assert_close(runner.losses(sequences), truth, rtol=1e-6, atol=1e-6)


def test_long_prompts_lose_their_beginning_but_not_the_first_token() -> None:
    bound = objective(kind="completion", template="{q}", completion="{a}", tokens_max=8)
    (sequence,) = bound.encode([Example(prompt="0123456789", completion="abc", where="x")], source="x")
    assert sequence.tokens[0] == 0
    assert bound.tokenizer.decode(sequence.tokens[1:].tolist()) == "6789abc"
    with pytest.raises(DataError, match=r"data:7.*too long"):
        bound.encode([Example(prompt="x", completion="12345678", where="data:7")], source="data")


def test_labels_have_the_tokens_they_have_in_a_text() -> None:
    bound = objective(**LABELS)
    assert [bound.tokenizer.decode(tokens.tolist()) for tokens in bound.label_tokens] == [" bad", " good!"]
    assert not bound.is_single_token
    assert objective(kind="labels", labels={"0": " a", "1": " b"}).is_single_token


def test_labels_of_several_tokens_are_scored_by_their_total() -> None:
    bound = objective(**LABELS)
    runner = runner_of(bound)
    sequences = bound.encode(
        [Example(prompt="fine", label="y", where="x"), Example(prompt="not so fine", label="n", where="x")], source="x"
    )
    totals = torch.stack(
        [
            torch.stack(
                [-token_losses(runner, np.concatenate([s.tokens, tail]), s.start).sum() for tail in bound.label_tokens]
            )
            for s in sequences
        ]
    )
    rows = bound.rows(sequences)
    torch.testing.assert_close(bound.scores(runner.logits(rows), rows).double(), totals, rtol=1e-5, atol=1e-5)
    truth = -torch.log_softmax(totals, 1)[[0, 1], [1, 0]]
    torch.testing.assert_close(runner.losses(sequences), truth, rtol=1e-5, atol=1e-5)


def test_labels_of_one_token_share_a_row() -> None:
    bound = objective(kind="labels", labels={"0": " a", "1": " b"})
    runner = runner_of(bound)
    sequences = bound.encode([Example(prompt=text, label="1", where="x") for text in ("abc", "d")], source="x")
    rows = bound.rows(sequences)
    assert len(rows.ids) == 2
    totals = torch.stack(
        [
            torch.stack(
                [-token_losses(runner, np.concatenate([s.tokens, tail]), s.start).sum() for tail in bound.label_tokens]
            )
            for s in sequences
        ]
    )
    torch.testing.assert_close(runner.losses(sequences), -torch.log_softmax(totals, 1)[:, 1], rtol=1e-5, atol=1e-5)


def test_labels_that_turn_into_nothing_or_the_same_are_errors() -> None:
    # Words that differ, but not to the tokenizer: here past the checks of the RunSpec.
    spec = ObjectiveSpec(kind="labels", labels={"0": " a", "1": " b"}, tokens_max=16)
    for words, said in (("", "'1' turn into no tokens"), (" a", "the same tokens")):
        with pytest.raises(DataError, match=said):
            Objective(spec.model_copy(update={"labels": {"0": " a", "1": words}}), byte_tokenizer())


def test_sequences_longer_than_the_model_are_refused_at_the_start() -> None:
    with pytest.raises(DataError, match="512, but the model has only 64 positions"):
        objective(tokens_max=512)


def test_empty_prompts_are_named() -> None:
    bound = objective(begins_with_bos=False, kind="labels", labels={"0": " a", "1": " b"})
    with pytest.raises(DataError, match="file:9: the prompt turns into no tokens"):
        bound.encode([Example(prompt="", label="0", where="file:9")], source="file")


def test_gpt2_style_positions_run_out_at_the_start_not_in_training() -> None:
    tokens = np.zeros(4, dtype=np.int32)
    rows = objective().rows([TokenSequence(tokens=tokens, start=1)])
    assert rows.ids.shape == (1, 3)  # the last token is a target only
    assert rows.positions is None
