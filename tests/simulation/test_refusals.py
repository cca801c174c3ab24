"""What is wrong with a scenario or a trace is said with file, line and remedy."""

from pathlib import Path

import pytest

from peerturb.cli import run
from peerturb.errors import SpecError
from peerturb_sim.life import read_trace
from peerturb_sim.scenario import Scenario
from tests.simulation.scenario_small import SMALL, write


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("lease_ms", "leese_ms", r"round.leese_ms \(line 10\): there is no such key"),
        ("count = 6", "count = 70_000", r"peers.0.count \(line 14\): .* 70,000 peers, .* 65,536 slots of a run: lower"),
        ('kind = "partition"', 'kind = "flood"', r"faults.1.kind.*partition"),
        ("count = 12", "count = 0", r"round.count \(line 7\): 0 is a run without an end: give"),
        ("count = 12", "cuont = 12", r"round.cuont \(line 7\): there is no such key: did you mean 'count'"),
        (
            "down_s = 2",
            "colour = 2",
            r"peers.0.colour \(line 20\): .* leave it out, or take one of apply_ms, codes_per_s, count",
        ),
        ("down_s = 2", "life = { arive_s = [0, 1] }", r"life.arive_s \(line 20\): .* did you mean 'arrive_s'"),
        ("down_s = 2", "line = { latencyms = 1 }", r"latencyms \(line 20\): .* did you mean 'latency_ms'"),
        ("down_s = 2", 'lie = "randm"', r"peers.0.lie \(line 20\): Input should be 'random', "),
        ("at_s = 3\n", "", r"faults.0.at_s \(line 23\): Field required"),
        ('name = "home"', 'name = "home"\nline = "copper"', "there is no line 'copper'; there are home, fibre"),
        ("share = 0.5", 'group = "office"', r"faults.1.group \(line 32\): there is no group 'office'; there are home"),
        ("drift_ppm = 1_000", "probes_per_s = [9, 3]", "not a range of positive speeds"),
        (
            "drift_ppm = 1_000",
            "probes_per_s = [9]",
            r"probes_per_s.1 \(line 21\): a number is missing: write two, \[low",
        ),
        (
            "drift_ppm = 1_000",
            "probes_per_s = [1, 2, 3]",
            r"probes_per_s \(line 21\): write two numbers, \[low, high\]",
        ),
        ("drift_ppm = 1_000", "life = { arrive_s = [0, inf] }", r"life.arrive_s.1 \(line 21\): .* finite number"),
        ("drift_ppm = 1_000", "life = { arrive_s = 3 }", r"life.arrive_s \(line 21\): write a list, in brackets"),
        (
            "drift_ppm = 1_000",
            "life = 7",
            r"peers.0.life \(line 21\): write a table, \{ key = value, ... \} \(given: 7\)$",
        ),
        (
            "drift_ppm = 1_000",
            "line = 7",
            r"peers.0.line \(line 21\): write a table, or the name of a line \(given: 7\)$",
        ),
        ("[[peers]]", "[peers]", r"peers \(line 12\): it is a list of tables: .* double brackets, \[\[peers\]\]$"),
        (
            "[round]",
            '[compute]\nobjective = "logistic"\n[round]',
            r"compute \(line 6\): say of which kind: kind = 'toy'",
        ),
        (
            "count = 12",
            "count = 12\nmin_peers = 7",
            r"round.min_peers \(line 8\): .* with the 6 peers .*: lower it, or raise",
        ),
        ('name = "small"', "name = 3", r"^[^;]*: name \(line 2\): Input should be a valid string \(given: 3\)$"),
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
        ("0,5,5", r"t.csv: line 2: peer 0 leaves at 5 s, when it joins: drop the row"),
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


def test_what_is_no_scenario_and_what_cannot_be_written_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = write(tmp_path)
    for arguments, complaint in (
        ([str(tmp_path)], "is a folder: name a scenario, a .toml file"),
        ([str(tmp_path / "none.toml")], "cannot read"),
        ([str(scenario), "--out", str(scenario)], "File exists; name a folder that can be written to"),
        ([str(scenario), "--out", str(scenario / "below")], "Not a directory; name a folder"),
        ([str(scenario), "--seed", str(2**63)], "Invalid value for '--seed': Input should be less than or equal to"),
        ([str(scenario), "--sed", "3"], "No such option: --sed (Possible options: --seed)"),
    ):
        assert run(["sim", "run", *arguments]) == 2, arguments
        assert complaint in " ".join(capsys.readouterr().err.split()), arguments
