"""`peerturb bench suite`: every benchmark has its turn, whatever happens to the others; one file holds all."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import peerturb
from peerturb import cli
from peerturb.errors import DataError
from peerturb_bench import machine, suite
from peerturb_bench.registry import SUITE
from peerturb_bench.rows import Row


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the benchmarks: `padding` lacks data, `replay` has a bug; collects the names in order."""
    calls: list[str] = []

    def measure(name: str, *, quick: bool, out: Path) -> list[Row]:
        calls.append(name)
        assert quick
        assert out.is_dir()
        if name == "padding":
            raise DataError("no data folder")
        if name == "replay":
            raise ZeroDivisionError("division by zero")
        if name == "memory":
            return [Row(name="broken", value=float("nan"), unit="s")]
        return [Row(name=f"{name} row", value=1.5, unit="s")]

    monkeypatch.setattr(suite, "measure", measure)
    return calls


def test_failures_are_named_and_the_others_run(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "suite", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert asked == list(SUITE)
    shown = capsys.readouterr()
    assert "target row" in shown.out
    assert "[6/6] target" in shown.err
    assert "3 of 6 benchmarks failed" in shown.err
    assert "padding: no data folder" in shown.err
    assert "ZeroDivisionError: division by zero" in shown.err
    document = json.loads((tmp_path / "out" / "suite.json").read_text(encoding="utf-8"))
    assert document["quick"] is True
    assert list(document["benchmarks"]) == list(SUITE)
    assert document["benchmarks"]["padding"]["error"] == "no data folder"
    assert "JSON" in document["benchmarks"]["memory"]["error"]
    assert document["benchmarks"]["step"]["rows"][0]["value"] == 1.5
    assert set(suite.failures(document)) == {"padding", "replay", "memory"}


def test_json_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "measure", lambda name, **_: [Row(name=name, value=1.0, unit="s")])
    assert cli.run(["bench", "suite", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))
    assert printed["quick"] is False


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, **_: Any) -> list[Row]:
        if name == "memory":
            raise KeyboardInterrupt
        return [Row(name=name, value=1.0, unit="s")]

    monkeypatch.setattr(suite, "measure", measure)
    assert cli.run(["bench", "suite", "--out", str(tmp_path)]) == 130
    document = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))
    assert list(document["benchmarks"]) == ["step", "update"]


def test_the_machine_is_described_without_naming_it() -> None:
    found = machine.describe()
    assert found["peerturb"] == peerturb.__version__
    assert found["threads"] >= 1
    assert set(found["instructions"]) <= set(machine.INSTRUCTIONS)
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path(peerturb.__file__).parent) not in text


def test_flags_are_read_from_the_kernels_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_bf16\n\n", encoding="ascii")
    monkeypatch.setattr(machine, "_CPU_INFO", listed)
    found = machine.describe()
    assert found["cpu"] == "Some CPU"
    assert found["instructions"] == ["avx2", "amx_bf16"]
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "none")
    assert machine.describe()["instructions"] == []


def test_a_commit_is_that_of_the_files_own_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    ours, foreign = tmp_path / "ours.py", tmp_path / "foreign.py"
    ours.write_text("1\n", encoding="utf-8")
    assert machine.commit(ours) is None  # no repository
    git("init", "--quiet")
    git("add", "ours.py")
    git("commit", "--quiet", "--no-gpg-sign", "--message", "x")
    foreign.write_text("2\n", encoding="utf-8")
    assert machine.commit(ours) == git("rev-parse", "HEAD")
    assert machine.commit(foreign) is None  # installed within somebody else's checkout
    ours.write_text("3\n", encoding="utf-8")
    assert machine.commit(ours) == git("rev-parse", "HEAD") + "-dirty"
