"""The swarm finds nothing in what we ship, and finds what is broken on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerturb.cli import run
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.replica import Replica
from peerturb_sim import swarm
from peerturb_sim.disk import Disk
from peerturb_sim.toy import ToyCompute

SEEDS = 50
BOX_S = 200.0
"""Real time after which the remaining seeds are left to the next run."""


@pytest.mark.slow
def test_no_seed_breaks_an_invariant() -> None:
    outcomes = swarm.run_swarm(first=0, seeds=SEEDS, seconds=BOX_S)
    assert outcomes
    assert [outcome.broken for outcome in outcomes if outcome.broken] == []
    assert sum(outcome.crashes for outcome in outcomes) > len(outcomes), "hardly anything went wrong"


def test_a_few_seeds_hold_and_the_same_seed_gives_the_same_world(tmp_path: Path) -> None:
    logs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert swarm.run_seed(4, tmp_path / name).broken is None
        logs.append((tmp_path / name / "run.log").read_bytes())
    assert logs[0] == logs[1]


def forgets_on_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store loses the last record whenever the coordinator restarts, announced or not."""
    recover = Disk.recover

    def forgetful(disk: Disk) -> int:
        return max(0, recover(disk) - 1)

    monkeypatch.setattr(Disk, "recover", forgetful)


def invents_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator changes a code of every contribution."""
    contribution = CoordinatorMachine._contribution

    def inventive(self: Any, session: Any, slot: Any, message: Any) -> Any:
        from dataclasses import replace

        changed = bytes([message.codes[0] ^ 1, *message.codes[1:]])
        return contribution(self, session, slot, replace(message, codes=changed))

    monkeypatch.setattr(CoordinatorMachine, "_contribution", inventive)


def depends_on_the_asker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas come to different weights: every third update is a bit off."""
    apply, calls = ToyCompute.apply, [0]

    def careless(self: Any, weights: Any, sealed: Any) -> Any:
        calls[0] += 1
        after = apply(self, weights, sealed)
        return self.corrupt(after) if calls[0] % 3 == 0 else after

    monkeypatch.setattr(ToyCompute, "apply", careless)


def applies_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's machine hands a round out again."""
    hand_out = Replica.hand_out

    def eager(self: Any) -> Any:
        return hand_out(self) * 2

    monkeypatch.setattr(Replica, "hand_out", eager)


def stops_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    """From round 20 on the coordinator takes no notice of contributions."""
    contribution = CoordinatorMachine._contribution

    def deaf(self: Any, session: Any, slot: Any, message: Any) -> Any:
        return [] if message.round >= 20 else contribution(self, session, slot, message)

    monkeypatch.setattr(CoordinatorMachine, "_contribution", deaf)


@pytest.mark.parametrize(
    ("mutation", "names"),
    [
        (forgets_on_crash, {"announced_stays"}),
        (invents_codes, {"contributions_once"}),
        (depends_on_the_asker, {"replicas_agree"}),
        (applies_twice, {"applied_once", "exception"}),
        (stops_listening, {"goes_on"}),
    ],
)
def test_what_is_broken_is_found_within_a_few_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mutation: Callable[[pytest.MonkeyPatch], None], names: set[str]
) -> None:
    mutation(monkeypatch)
    found = set()
    for seed in range(12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if (broken := swarm.run_seed(seed, folder).broken) is not None:
            found.add(broken.name)
            break
    assert found <= names
    assert found, "no seed noticed"


def test_the_command_names_the_seed_and_what_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sim", "swarm", "--seeds", "1", "--first", "4"]) == 0
    assert "1 of 1 seeds" in capsys.readouterr().out
    invents_codes(monkeypatch)
    assert run(["sim", "swarm", "--seeds", "1", "--first", "4"]) == 1
    printed = capsys.readouterr()
    assert "1 broken" in printed.out
    assert "contributions_once: peerturb sim swarm --first 4 --seeds 1" in printed.err
