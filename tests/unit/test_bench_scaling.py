"""`peerturb bench scaling`: a run ends at the target or is given up, rates are searched, peers save rounds."""

import json
import math
from pathlib import Path

import pytest

from peerturb_bench import plots
from peerturb_bench.rows import to_json
from peerturb_bench.scaling import Count, Plan, Task, _search, measure, panel, rounds_to, rows
from peerturb_bench.simulated import crowd
from peerturb_sim.fidelity import compute_of
from tests.simulation.real_small import real_section

OBJECTIVE: dict[str, object] = {"kind": "text", "template": "{text}", "tokens_max": 16}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    section = real_section(tmp_path_factory.mktemp("model"))
    files = (Path(section.data[0]), Path(section.eval))
    return Task(name="a task", model=Path(section.model), files=files, objective=OBJECTIVE)


@pytest.fixture(scope="module")
def base_loss(task: Task, tmp_path_factory: pytest.TempPathFactory) -> float:
    scenario = crowd(
        task.model, task.files, peers=1, probes=4, rounds=1, rate=0.01, eval_every=1, objective=task.objective
    )
    _, compute = compute_of(scenario, folder=tmp_path_factory.mktemp("base"))
    return float(compute.evaluate(compute.base).loss)


def test_a_run_ends_at_the_target_or_when_it_is_given_up(task: Task, base_loss: float) -> None:
    target = base_loss - 0.02
    found = rounds_to(task, peers=4, rate=0.02, seed=0, target=target, limit=60, every=1)
    assert found is not None
    assert 0 < found < 60
    assert rounds_to(task, peers=4, rate=0.02, seed=0, target=target, limit=60, every=1) == found
    assert rounds_to(task, peers=4, rate=0.02, seed=0, target=base_loss - 3, limit=3, every=1) is None
    assert rounds_to(task, peers=4, rate=50.0, seed=0, target=target, limit=30, every=1) is None, "it breaks the model"


def test_rates_are_doubled_as_long_as_that_helps() -> None:
    asked: list[float] = []

    def rounds(rate: float) -> list[float | None]:
        asked.append(rate)
        return [None if rate > 6 else 100 / rate, None if rate > 3 else 110 / rate, 90 / rate]

    count = Count(peers=2, limit=10)
    _search(count, rounds, 0.5)
    assert asked[:5] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert asked[5:] == pytest.approx([5.66, 2.83], abs=0.01)
    assert count.rate == pytest.approx(5.66, abs=0.01), "the median decides, not one seed"
    assert count.rounds == [100 / count.rate, None, 90 / count.rate]
    assert count.median == 100 / count.rate


def test_a_search_ends_where_no_rate_is_there() -> None:
    count = Count(peers=2, limit=10)
    _search(count, lambda rate: [None], 0.5)
    assert (count.rate, count.rounds, len(count.tried)) == (0.5 / 2**0.5, [None], 4)
    assert math.isinf(count.median)


def test_the_whole_gives_rows_a_figure_and_a_file(
    task: Task, base_loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(peers=(1, 4), seeds=(0, 1), target=base_loss - 0.1, rate=0.005, rounds_max=80, rounds_least=40)
    counts = measure(plan, task)
    assert [count.peers for count in counts] == [1, 4]
    assert all(len(count.rounds) == 2 and len(count.tried) >= 2 for count in counts)
    assert counts[1].median < counts[0].median
    found = rows(plan, task.name, counts)
    assert found[0].ratio == 1.0
    assert found[1].reference == counts[0].median / 4
    assert json.loads(to_json(found))
    plots.curves(tmp_path / "scaling.png", [[panel(plan, task.name, counts)]])
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_that_are_given_up_are_said_and_not_averaged_away() -> None:
    plan = Plan(peers=(1, 2, 4), seeds=(0, 1, 2), target=1.0, rate=1.0, rounds_max=100, rounds_least=10)
    counts = [
        Count(peers=1, limit=100, tried={1.0: [80.0, 90.0, None]}),
        Count(peers=2, limit=50, tried={1.0: [None, None, 45.0]}),
    ]
    first, second = rows(plan, "t", counts)
    assert (first.value, first.ratio) == (90.0, 1.0)
    assert "90, given up" in first.note
    assert (second.value, second.reference, second.ratio) == (None, 45.0, None)
    assert math.isinf(counts[1].median)
    assert (plan.limit(4), plan.every(1), plan.every(4)) == (25, 1, 1)
    assert (plan.patient(4, math.inf), plan.patient(4, 10.1), plan.patient(4, 99.0)) == (25, 16, 25)
