"""`peerturb bench`: the list, the table, the JSON, the folder for files."""

import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import pytest

from peerturb import cli
from peerturb_bench.registry import BENCHMARKS, SUITE
from peerturb_bench.rows import Row, to_json

ROWS = [
    Row(name="rank1 512x512", value=349.5, unit="G/s", reference=0.19, ratio=1839.47),
    Row(name="join", value=12.25, unit="s", ratio=1.5, low=1.25, high=1.75),
]
PLAIN = {"low": None, "high": None, "note": ""}


Asked = list[tuple[bool, Path | None]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Replace the benchmark `update`; collects the `quick` and `out` it was asked with."""
    calls: Asked = []

    def run(quick: bool, out: Path | None) -> list[Row]:
        calls.append((quick, out))
        return ROWS

    module = types.ModuleType("peerturb_bench.update")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)


def test_json_is_a_list_of_rows(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "update", "--json", "--quick"]) == 0
    assert asked == [(True, None)]
    assert json.loads(capsys.readouterr().out) == [
        {**PLAIN, "name": "rank1 512x512", "value": 349.5, "unit": "G/s", "reference": 0.19, "ratio": 1839.47},
        {"name": "join", "value": 12.25, "unit": "s", "reference": None, "ratio": 1.5, "low": 1.25, "high": 1.75,
         "note": ""},
    ]  # fmt: skip


def test_people_get_a_table(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "update"]) == 0
    assert asked == [(False, None)]
    text = capsys.readouterr().out
    assert "349.5" in text
    assert "1,839" in text
    assert "1.25 to 1.75" in text
    assert "None" not in text


def test_a_row_without_a_figure_says_why(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    ROWS.append(Row(name="left out", value=None, unit="", note="no such model"))
    try:
        assert cli.run(["bench", "update"]) == 0
    finally:
        ROWS.pop()
    text = capsys.readouterr().out
    assert "left out: no such model" in text
    assert "None" not in text


def test_a_benchmark_that_draws_gets_a_folder(asked: Asked, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert cli.run(["bench", "update", "--out", str(folder)]) == 0
    assert asked == [(False, folder)]
    assert folder.is_dir()


def test_a_folder_is_refused_where_it_serves_nothing_or_cannot_be(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "wire", "--out", str(tmp_path)]) == 2
    assert "leave --out away; there are plots of step, update" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.run(["bench", "update", "--out", str(tmp_path / "file")]) == 2
    assert "name a folder" in capsys.readouterr().err
    assert asked == []


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "updat"]) == 2
    assert "did you mean 'update'?" in capsys.readouterr().err
    assert cli.run(["bench", "qqq"]) == 2
    assert "overhead" in capsys.readouterr().err


def test_json_refuses_figures_that_json_cannot_carry() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json([Row(name="x", value=float("nan"), unit="s")])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_listed_benchmark_can_be_run(name: str) -> None:
    run = importlib.import_module(f"peerturb_bench.{name}").run
    assert list(inspect.signature(run).parameters) == (["quick", "out"] if BENCHMARKS[name].is_drawn else ["quick"])


def test_the_suite_draws_everything_it_runs() -> None:
    assert all(BENCHMARKS[name].is_drawn for name in SUITE)
