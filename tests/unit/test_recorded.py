"""Recordings of forwards: what is not a card's runs as it is. On a card: tests/gpu/test_recorded_cuda.py."""

import pytest
import torch
from torch import Tensor

from peerturb.zo.perturbation import Perturbation
from peerturb.zo.recorded import SEEN_BEFORE, Recorder
from peerturb.zo.rows import Rows


def rows_of(value: int) -> Rows:
    numbers = torch.full((2, 3), value)
    return Rows(ids=numbers, positions=None, targets=numbers, is_scored=numbers > 0, answers=numbers[:, 0], tokens=6)


def has_failed(recorder: Recorder) -> bool:
    return recorder.failure is not None


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    """On a CPU nothing can: the first attempt fails, and is the last one."""
    calls = []

    def work(rows: Rows, perturbation: Perturbation | None) -> Tensor:
        calls.append(rows)
        return rows.ids.sum(1)

    recorder = Recorder(work, [torch.ones(1)])
    for value in range(SEEN_BEFORE):
        assert recorder.losses(rows_of(value), None).tolist() == [3 * value] * 2
    assert not has_failed(recorder)
    assert recorder.losses(rows_of(7), None).tolist() == [21, 21]
    assert has_failed(recorder)
    assert recorder.losses(rows_of(8), None).tolist() == [24, 24]


def test_an_error_of_the_forward_is_not_swallowed() -> None:
    def work(rows: Rows, perturbation: Perturbation | None) -> Tensor:
        raise ValueError("the model's own")

    recorder = Recorder(work, [])
    for _ in range(SEEN_BEFORE + 2):
        with pytest.raises(ValueError, match="the model's own"):
            recorder.losses(rows_of(1), None)
