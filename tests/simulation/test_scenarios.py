"""Scenarios: read strictly, simulated to logs that the production check accepts, the same bytes for the same seed."""

import re
from pathlib import Path
from typing import Any

import pytest

from peerturb.cli import run
from peerturb.errors import SpecError
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.verify import verify
from peerturb_sim import liveness
from peerturb_sim.life import read_trace
from peerturb_sim.recorder import UNNOTICED, Recorder
from peerturb_sim.result import Result, ResultError
from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import LOG_NAME, RESULT_NAME, build, gather, run_to_end, simulate

SMALL = """
name = "small"
seed = 3
until_s = 600

[round]
count = 12
probes_max = 16
deadline_ms_max = 5_000
lease_ms = 2_000

[[peers]]
name = "home"
count = 6
evaluates = true
crashes_per_hour = 60
disk_losses = 0.5
pauses_per_hour = 60
pause_s = 1
down_s = 2
drift_ppm = 1_000

[[faults]]
kind = "coordinator_crash"
at_s = 3
for_s = 1

[[faults]]
kind = "partition"
at_s = 6
for_s = 3
share = 0.5
"""


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


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


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


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("lease_ms", "leese_ms", r"round.leese_ms \(line 10\): there is no such key"),
        ("count = 6", "count = 70_000", r"peers.0.count \(line 14\): .* 70,000 peers, .* 65,536 slots of a run: lower"),
        ('kind = "partition"', 'kind = "flood"', r"faults.1.kind.*partition"),
        ("count = 12", "count = 0", r"round.count \(line 7\): 0 is a run without an end: give"),
        ("count = 12", "cuont = 12", r"round.cuont \(line 7\): there is no such key: did you mean 'count'"),
        ("down_s = 2", "colour = 2", r"peers.0.colour \(line 20\): .* leave it out, or take one of apply_ms, count"),
        ("down_s = 2", "life = { arive_s = [0, 1] }", r"life.arive_s \(line 20\): .* did you mean 'arrive_s'"),
        ("down_s = 2", "line = { latencyms = 1 }", r"latencyms \(line 20\): .* did you mean 'latency_ms'"),
        ("down_s = 2", 'lie = "randm"', r"peers.0.lie \(line 20\): Input should be 'random', "),
        ("at_s = 3\n", "", r"faults.0.at_s \(line 23\): Field required"),
        ('name = "home"', 'name = "home"\nline = "copper"', "there is no line 'copper'; there are home, fibre"),
        ("share = 0.5", 'group = "office"', r"faults.1.group \(line 32\): there is no group 'office'; there are home"),
        ("drift_ppm = 1_000", "probes_per_s = [9, 3]", "not a range of positive speeds"),
    ],
)
def test_a_wrong_scenario_is_refused_by_file_line_and_remedy(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    assert old in SMALL
    with pytest.raises(SpecError, match=complaint) as refused:
        Scenario.load(write(tmp_path, SMALL.replace(old, new)))
    assert "small.toml" in str(refused.value)
    assert "at least 1 item" not in str(refused.value), "what is wrong is said once"


def test_more_peers_than_slots_in_all_are_refused(tmp_path: Path) -> None:
    crowd = SMALL.replace("count = 6", "count = 60_000") + '\n[[peers]]\nname = "more"\ncount = 10_000\n'
    with pytest.raises(SpecError, match=r"peers.1.count \(line 36\): .* 70,000 peers, more than the 65,536"):
        Scenario.load(write(tmp_path, crowd))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("0,5,3", r"t.csv: line 2: peer 0 leaves at 3 s before it joins at 5 s"),
        ("0,1,4\n0,2,5", "line 3: peer 0 joins at 2.0 s while it is still there"),
        ("7,0,1", "line 2: peer 7 is not one of the group's 2"),
        ("0,soon,1", "line 2: '0,soon,1' is not three numbers"),
        ("0,1,2,3", "line 2: '0,1,2,3' is not three numbers"),
        ("0,1", "line 2: '0,1' is not three numbers"),
        ("0,1,nan", "line 2: a time is not between 0 and"),
        ("0,inf,", "line 2: a time is not between 0 and"),
        ("", "nobody comes: write a row"),
    ],
)
def test_a_wrong_trace_is_refused_by_its_line(tmp_path: Path, rows: str, complaint: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"peer,join_s,leave_s\n{rows}\n")
    with pytest.raises(SpecError, match=complaint):
        read_trace(path, 2)


@pytest.mark.parametrize("content", [b"", b"a,b\n0,1\n", b"\xff\xfe", None])
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"t\.csv.*(line 1: the columns must be|not a CSV file|correct its name)"):
        read_trace(path, 2)


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


def test_the_command_writes_log_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["sim", "run", str(write(tmp_path)), "--seed", "9", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / RESULT_NAME).read_text()
    assert Result.from_json(printed, source="stdout").seed == 9
    assert run(["log", "verify", str(out / LOG_NAME)]) == 0


def test_what_is_no_scenario_and_what_cannot_be_written_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = write(tmp_path)
    for arguments, complaint in (
        ([str(tmp_path)], "is a folder: name a scenario, a .toml file"),
        ([str(tmp_path / "none.toml")], "cannot read"),
        ([str(scenario), "--out", str(scenario)], "File exists; name a folder that can be written to"),
        ([str(scenario), "--out", str(scenario / "below")], "Not a directory; name a folder"),
        ([str(scenario), "--sed", "3"], "No such option: --sed (Possible options: --seed)"),
    ):
        assert run(["sim", "run", *arguments]) == 2, arguments
        assert complaint in " ".join(capsys.readouterr().err.split()), arguments


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
        "min_peers = 7",
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
    text = text + hindrance if hindrance.startswith("[[") else text.replace("[round]", f"[round]\n{hindrance}")
    result = simulated(tmp_path, text)
    assert not result.broken
    assert not result.is_finished
    assert result.waiting_for
