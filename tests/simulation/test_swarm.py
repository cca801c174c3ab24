"""The swarm finds nothing in what we ship, and finds what is broken on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerturb.cli import run
from peerturb.protocol.contributions import Contributions
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.replica import Replica
from peerturb_sim import swarm
from peerturb_sim.coordinator import Coordinator
from peerturb_sim.disk import Disk
from peerturb_sim.scenario import GroupSpec
from peerturb_sim.simulation import build
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


def test_after_the_faults_no_liar_comes_back(tmp_path: Path) -> None:
    """Not one that was down then, and would have been started again later."""
    group = GroupSpec(name="liar", count=3, lie="extreme", crashes_per_hour=3_600, down_s=60)
    scenario, chaos = swarm.draw(3)
    honest = scenario.peers[0].model_copy(update={"crashes_per_hour": 0.0})
    world = build(scenario.model_copy(update={"peers": (honest, group)}), folder=tmp_path, out=tmp_path, chaos=chaos)
    world.run(until_s=swarm.SAFETY_S)
    liars = [peer for peer in world.peers if peer.liar is not None]
    assert any(not peer.is_running for peer in liars)
    swarm.heal(world)
    for _ in range(200):
        world.run(until_s=world.events.elapsed_s + 1)
        assert not [peer.name for peer in liars if peer.is_running]


@pytest.mark.slow
def test_contributions_come_twice_and_after_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the swarm would not show that neither matters. A peer says anew what the stream before may still carry."""
    repeated, overtaken = [0], [0]
    contribution, hear = CoordinatorMachine._contribution, Coordinator.hear

    def counting(self: Any, session: Any, slot: Any, message: Any) -> Any:
        known = self._pending.of_slot.get(slot)
        repeated[0] += known is not None and known.contribution == message
        return contribution(self, session, slot, message)

    def watching(self: Any, line: Any, data: bytes) -> None:
        overtaken[0] += line.peer.line is not None and line.peer.line.session > line.session
        hear(self, line, data)

    monkeypatch.setattr(CoordinatorMachine, "_contribution", counting)
    monkeypatch.setattr(Coordinator, "hear", watching)
    for seed in range(30):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert swarm.run_seed(seed, folder).broken is None
    assert repeated[0] > 5
    assert overtaken[0] > 5


def test_a_swarm_without_time_runs_a_seed_all_the_same() -> None:
    assert [outcome.seed for outcome in swarm.run_swarm(first=4, seeds=9, seconds=0)] == [4]


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
        return self.corrupt(after, 0) if calls[0] % 3 == 0 else after

    monkeypatch.setattr(ToyCompute, "apply", careless)


def applies_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's machine hands a round out again."""
    hand_out = Replica.hand_out

    def eager(self: Any) -> Any:
        return hand_out(self) * 2

    monkeypatch.setattr(Replica, "hand_out", eager)


def lets_the_minority_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that fewest have measured on are taken for the right ones."""

    def contrary(self: Any, ledger: Any) -> int:
        digests: list[int] = [pending.contribution.digest for pending in self.of_slot.values()]
        return min(digests, key=digests.count)

    monkeypatch.setattr(Contributions, "canonical_digest", contrary)


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
        (lets_the_minority_hold, {"majority_holds"}),
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
