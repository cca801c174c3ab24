"""`peerturb bench`: the list, the table, the JSON."""

import importlib
import inspect
import json
import sys
import types

import pytest

from peerturb import cli
from peerturb_bench.cli import BENCHMARKS
from peerturb_bench.rows import Row, to_json

ROWS = [
    Row(name="rank1 512x512", value=349.5, unit="G/s", reference=0.19, ratio=1839.47),
    Row(name="join", value=12.25, unit="s"),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replace the benchmark `update`; collects the `quick` it was asked with."""
    calls: list[bool] = []

    def run(quick: bool) -> list[Row]:
        calls.append(quick)
        return ROWS

    module = types.ModuleType("peerturb_bench.update")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)


def test_json_is_a_list_of_rows(asked: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "update", "--json", "--quick"]) == 0
    assert asked == [True]
    assert json.loads(capsys.readouterr().out) == [
        {"name": "rank1 512x512", "value": 349.5, "unit": "G/s", "reference": 0.19, "ratio": 1839.47},
        {"name": "join", "value": 12.25, "unit": "s", "reference": None, "ratio": None},
    ]


def test_people_get_a_table(asked: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "update"]) == 0
    assert asked == [False]
    text = capsys.readouterr().out
    assert "349.5" in text
    assert "1,839" in text
    assert "None" not in text


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
    assert list(inspect.signature(run).parameters) == ["quick"]
