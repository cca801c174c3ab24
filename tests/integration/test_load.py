"""The benchmark of a coordinator's load drives real sessions: rounds go on, and what it counts is the coordinator's."""

import asyncio

import pytest

from peerturb_bench import load

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def test_peers_train_while_the_coordinator_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MEASURE_S", 0.05)
    memory, processor, rounds = asyncio.run(load._run(3, 3.0))
    assert memory.value is not None
    assert processor.value is not None
    assert rounds.value is not None
    assert 30 < memory.value < 1_000
    assert processor.value > 0
    assert rounds.value > 1
