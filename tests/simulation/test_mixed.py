"""Simulated runs of both estimators: the production machines, the same log every time, better than either half."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerturb.errors import SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from peerturb.zo.exact import ExactEngine
from peerturb_sim.compute import Request
from peerturb_sim.real import RealModel
from peerturb_sim.result import Result
from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import LOG_NAME, simulate
from peerturb_sim.torch_compute import TorchCompute
from tests.simulation.real_small import real_section, real_spec_of

RULES: dict[str, Any] = {
    "name": "mixed",
    "eval_every": 10,
    "perturbation": {"estimators": ["spsa", "exact"], "exact": {"examples": 4, "codes": 64}},
    "step": {"learning_rate": 2.0, "half_codes": 512},
    "round": {"count": 30, "probes_max": 48},
}
STATION = {"name": "station", "count": 2, "estimator": "exact", "gradient_ms": 100, "evaluates": True}
LAPTOPS = {"name": "laptop", "count": 6, "probes_per_s": [50, 90], "evaluates": True}


def run(folder: Path, *groups: dict[str, Any], objective: str = "quadratic", noise: float = 2.0) -> Result:
    folder.mkdir()
    compute = {"kind": "toy", "objective": objective, "noise": noise}
    return simulate(Scenario.model_validate({**RULES, "compute": compute, "peers": groups}), folder=folder, out=folder)


@pytest.mark.parametrize("objective", ["quadratic", "logistic"])
def test_both_learn_more_than_either_half(tmp_path: Path, objective: str) -> None:
    both = run(tmp_path / "both", STATION, LAPTOPS, objective=objective)
    halves = [run(tmp_path / str(g["name"]), g, objective=objective) for g in (STATION, LAPTOPS)]
    ends = [result.evaluations[-1].loss for result in (both, *halves)]
    assert ends[0] is not None
    assert all(end is not None and end > ends[0] for end in ends[1:]), ends
    ledger = verify(tmp_path / "both" / LOG_NAME).ledger
    assert 27 * 2 * 64 <= ledger.exact_probes <= 30 * 2 * 64  # not everybody is there in the first rounds
    assert 27 * 6 * 48 <= ledger.probes - ledger.exact_probes <= 30 * 6 * 48
    assert {row.name: row.estimator for row in both.peers}["station-0"] == "exact"


def test_the_same_seed_gives_the_same_log(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, STATION, LAPTOPS) for name in ("a", "b"))
    assert first.log == second.log
    sealed = [record for record in read_records(tmp_path / "a" / LOG_NAME) if isinstance(record, RoundSealed)]
    assert all(len(one.exact) == 2 for one in sealed[3:])


def test_a_round_without_the_exact_peers_moves_little(tmp_path: Path) -> None:
    """Alpha times the noise of a round's sum, per element: the length of a step."""
    run(tmp_path / "both", STATION, LAPTOPS)
    run(tmp_path / "few", {**LAPTOPS, "count": 1})

    def steps(name: str) -> list[float]:
        records = read_records(tmp_path / name / LOG_NAME)
        sealed = [record for record in records if isinstance(record, RoundSealed)][10:]
        codes = [np.frombuffer(one.codes, np.int8).astype(float) for one in sealed]
        return [one.alpha * float(np.sqrt(np.sum(c**2))) for one, c in zip(sealed, codes, strict=True)]

    assert np.median(steps("few")) < 0.75 * np.median(steps("both"))


def test_an_estimator_that_the_run_does_not_allow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('name = "x"\n[[peers]]\nname = "p"\ncount = 1\nestimator = "exact"\n', encoding="utf-8")
    with pytest.raises(SpecError, match=r"wrong.toml.*perturbation.estimators does not allow 'exact'"):
        Scenario.load(path)


def test_real_models_are_projected_by_the_nodes_engine(tmp_path: Path) -> None:
    section = real_section(tmp_path)
    plain = real_spec_of(section, count=5, rounds=3)
    document = plain.model_dump(mode="json") | {
        "perturbation": RULES["perturbation"], "step": {"half_codes": 64}
    }  # fmt: skip
    spec = type(plain).model_validate(document)
    compute = TorchCompute(section, spec)
    request = Request(weights=compute.base, slot=Slot(1), round=RoundNumber(0), scale=0.1, count=40, is_exact=True)
    compute.expect(request)
    found = compute.measure(request)
    model = RealModel(section, spec)
    engine = model._engine(1, True)
    assert isinstance(engine, ExactEngine)
    expected = engine.contribute(RoundNumber(0), slot=Slot(1), scale=0.1, count=40)
    assert found.codes == expected.codes.tobytes()
    probes = Request(weights=compute.base, slot=Slot(1), round=RoundNumber(0), scale=0.1, count=5)
    compute.expect(probes)
    assert compute.measure(probes).codes != found.codes[:5]
