"""Scenarios: simulated to logs that the production check accepts, the same bytes for the same seed."""

import re
from pathlib import Path
from typing import Any

import pytest

from peerturb.cli import run
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.verify import verify
from peerturb_sim import liveness
from peerturb_sim.recorder import UNNOTICED, Recorder
from peerturb_sim.result import Result, ResultError
from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import LOG_NAME, RESULT_NAME, build, gather, run_to_end, simulate
from tests.simulation.scenario_small import SMALL, write

CALM = """
name = "calm"
seed = 3
until_s = 600

[round]
count = 12
budget_ms = 500

[[peers]]
name = "home"
count = 6

"""
GUEST = """
[[peers]]
name = "guest"
count = 1
life = { arrive_s = [0, 0], stay_s = 1 }
"""


def simulated(folder: Path, text: str = SMALL) -> Result:
    folder.mkdir(exist_ok=True)
    return simulate(Scenario.load(write(folder, text)), folder=folder, out=folder)


def test_a_scenario_gives_a_log_that_verifies_and_a_result_that_agrees_with_it(tmp_path: Path) -> None:
    result = simulated(tmp_path)
    verified = verify(tmp_path / LOG_NAME)
    assert result.is_finished
    assert not result.broken
    assert verified.chain.hex() == result.log.chain
    assert verified.size == result.log.bytes
    assert verified.ledger.probes == sum(row.codes for row in result.rounds) == sum(row.codes for row in result.peers)
    assert [row.round for row in result.rounds] == list(range(12))
    assert {row.kind for row in result.faults} >= {"coordinator_crash", "partition"}
    assert result.bytes_up == sum(row.bytes_up for row in result.peers) >= verified.ledger.probes
    assert result.rounds[-1].loss is not None
    assert result.rounds[0].loss is not None
    assert result.rounds[-1].loss < result.rounds[0].loss


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    one, two = (simulated(tmp_path / name) for name in ("one", "two"))
    other = simulated(tmp_path / "other", SMALL.replace("seed = 3", "seed = 4"))
    logs = [(tmp_path / name / LOG_NAME).read_bytes() for name in ("one", "two", "other")]
    assert logs[0] == logs[1] != logs[2]
    assert one.to_json() == two.to_json() != other.to_json()


def test_one_more_fault_leaves_what_was_before_it_as_it_was(tmp_path: Path) -> None:
    plain = simulated(tmp_path / "plain")
    more = simulated(tmp_path / "more", SMALL + '\n[[faults]]\nkind = "corruption"\nat_s = 8\nshare = 0.1\n')
    early = [row for row in plain.rounds if row.sealed_s < 8]
    assert early
    assert more.rounds[1 : len(early)] == early[1:]
    assert [row.probes_per_s for row in plain.peers] == [row.probes_per_s for row in more.peers]


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = simulated(tmp_path)
    text = result.to_json()
    assert Result.from_json(text, source="here").to_json() == text
    with pytest.raises(ResultError, match="version 99"):
        Result.from_json(text.replace('"version": 1', '"version": 99'), source="here")
    with pytest.raises(ResultError, match="not a result"):
        Result.from_json("{}", source="here")
    for old, new, complaint in (
        ('"void_codes"', '"viod_codes"', r"here is not a whole result: rounds\.0\.void_codes: .*; simulate again"),
        ('"reason": "everyone"', '"reason": 3', r"rounds\.\d+\.reason: "),
        ('"rounds": [', '"rounds": 3, "rest": [', "rounds: "),
    ):
        assert old in text
        with pytest.raises(ResultError, match=complaint):
            Result.from_json(text.replace(old, new), source="here")


def test_a_trace_says_who_is_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("peer,join_s,leave_s\n0,0,\n1,0,2\n1,4,\n2,3,\n")
    text = """
name = "traced"
[round]
count = 10
budget_ms = 500
[[peers]]
name = "p"
count = 3
life = { trace = "t.csv" }
"""
    result = simulated(tmp_path, text)
    there = [row.present_s for row in result.peers]
    assert there[0] == pytest.approx(result.virtual_s, abs=1)
    assert there[1] == pytest.approx(there[0] - 2, abs=1)
    assert there[2] == pytest.approx(there[0] - 3, abs=1)


def test_a_peer_whose_time_is_over_while_it_is_down_does_not_come_back(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("peer,join_s,leave_s\n0,0,\n1,0,3\n")
    text = """
name = "gone"
[round]
count = 12
budget_ms = 500
[[peers]]
name = "p"
count = 2
life = { trace = "t.csv" }
[[faults]]
kind = "peer_crash"
at_s = 2
for_s = 2
"""
    result = simulated(tmp_path, text)
    assert result.is_finished
    assert [row.crashes for row in result.peers] == [1, 1]
    assert result.peers[1].present_s == pytest.approx(2)
    assert result.peers[0].present_s == pytest.approx(result.virtual_s - 2, abs=1)


@pytest.mark.parametrize("kind", ["coordinator_crash", "store_refuses"])
def test_of_outages_that_overlap_the_longest_counts(tmp_path: Path, kind: str) -> None:
    outage = '\n[[faults]]\nkind = "{}"\nat_s = {}\nfor_s = {}\ntorn = false\n'
    result = simulated(tmp_path, CALM + outage.format(kind, 2, 60) + outage.format(kind, 10, 5))
    assert result.is_finished
    assert not [row for row in result.rounds if 2.001 < row.sealed_s < 62]


def test_the_command_writes_log_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["sim", "run", str(write(tmp_path)), "--seed", "9", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / RESULT_NAME).read_text()
    assert Result.from_json(printed, source="stdout").seed == 9
    assert run(["log", "verify", str(out / LOG_NAME)]) == 0


def test_an_interrupted_run_leaves_a_log_that_verifies_and_a_result_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["sim", "run", str(write(tmp_path)), "--out", str(out)]) == 0
    sealed, calls = RoundSealed, [0]

    def impatient(self: Recorder, record: Record) -> None:
        announced(self, record)
        calls[0] += isinstance(record, sealed)
        if calls[0] == 5:
            raise KeyboardInterrupt

    announced = Recorder.announced
    monkeypatch.setattr(Recorder, "announced", impatient)
    capsys.readouterr()
    assert run(["sim", "run", str(write(tmp_path)), "--out", str(out)]) == 130
    assert "not finished, 5 rounds" in capsys.readouterr().out
    result = Result.read(out / RESULT_NAME)
    assert result.is_interrupted
    assert not result.is_finished
    assert "awaiting" in result.waiting_for or "have" in result.waiting_for
    assert len(result.rounds) == 5
    assert verify(out / LOG_NAME).ledger.sealed_rounds == 5


def test_a_run_that_is_out_of_time_fails_and_says_what_it_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "short.toml", tmp_path / "out"
    path.write_text(SMALL.replace("until_s = 600", "until_s = 2"), encoding="utf-8")
    assert run(["sim", "run", str(path), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "of 12 rounds are sealed" in said
    assert "Raise until_s" in said
    assert (out / RESULT_NAME).exists()
    assert run(["log", "verify", str(out / LOG_NAME)]) == 0


def test_a_flipped_bit_lasts_until_it_is_noticed(tmp_path: Path) -> None:
    result = simulated(tmp_path, CALM + '\n[[faults]]\nkind = "corruption"\nat_s = 2\nshare = 0.3\n')
    rows = [row for row in result.faults if row.kind == "corruption"]
    assert len(rows) == 2
    for row in rows:
        assert row.until_s is not None
        assert 2 < row.until_s < result.virtual_s
        assert not row.text
    assert sum(row.rebuilds for row in result.peers) == 2


def test_a_bit_flipped_after_the_last_digest_is_seen_from_outside(tmp_path: Path) -> None:
    """While it applies the last round: no record follows that could tell it."""
    scenario = Scenario.load(write(tmp_path, CALM))
    world = build(scenario, folder=tmp_path, out=tmp_path)
    victim = world.peers[2]
    world.run(until_s=600, done=lambda: world.is_finished)
    world.run(until_s=600, done=lambda: victim.rounds == scenario.round.count)
    victim.corrupt()
    run_to_end(world, until_s=600)
    result = gather(world, scenario, [])
    assert [(row.who, row.text, row.until_s) for row in result.faults] == [("home-2", UNNOTICED, None)]


def deaf(self: Any, session: Any, slot: Any, message: Any) -> Any:
    """Take no notice of contributions from round 3 on."""
    return [] if message.round >= 3 else CONTRIBUTION(self, session, slot, message)


CONTRIBUTION = CoordinatorMachine._contribution


def test_a_run_that_does_not_go_on_though_nothing_hinders_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoordinatorMachine, "_contribution", deaf)
    result = simulated(tmp_path, CALM.replace("until_s = 600", "until_s = 9_000"))
    assert [row.name for row in result.broken] == ["goes_on"]
    assert re.search(
        r"3 of 12 rounds .* 900 s .* 6 peers were undisturbed; the coordinator: have 0", result.broken[0].text
    )
    assert result.broken[0].at_s < 1_200
    assert not result.is_finished


@pytest.mark.parametrize(
    "hindrance",
    [
        "min_peers = 7",  # and the seventh is not there for long enough
        '[[faults]]\nkind = "store_refuses"\nat_s = 2\nfor_s = 400\n',
        '[[faults]]\nkind = "coordinator_crash"\nat_s = 2\nfor_s = 400\n',
        '[[faults]]\nkind = "partition"\nat_s = 2\nfor_s = 400\n',
    ],
)
def test_a_run_that_is_hindered_is_not_called_broken(
    tmp_path: Path, hindrance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "GOES_ON_S", 100.0)
    text = CALM.replace("until_s = 600", "until_s = 300")
    if hindrance.startswith("min_peers"):
        text = text.replace("[round]", f"[round]\n{hindrance}") + GUEST
    else:
        text += hindrance
    result = simulated(tmp_path, text)
    assert not result.broken
    assert not result.is_finished
    assert result.waiting_for
