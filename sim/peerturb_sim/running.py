"""What `peerturb sim run` does: read the scenario, simulate it, write the log and `result.json`, say how it went."""

from pathlib import Path

from peerturb.errors import PeerturbError
from peerturb_sim.scenario import Scenario


def run_scenario(path: Path, *, seed: int | None, out: Path, as_json: bool) -> None:
    """Simulate a scenario file.

    Raises:
        SpecError: the scenario cannot be used.
    """
    scenario = Scenario.load(path)
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    raise PeerturbError(f"{path} is a valid scenario of {scenario.total_peers} peers; the world is not built yet")
