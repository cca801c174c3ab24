"""A simulated run and one of real processes are told alike what passed over the wire."""

from pathlib import Path

import pytest

from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import build, run_to_end
from tests.integration.network import network, toy_run
from tests.integration.scraping import Figures, await_figures

pytestmark = [pytest.mark.slow, pytest.mark.integration]

ROUNDS = 60
SCENARIO = f"""
name = "toy"
eval_every = 10
[step]
learning_rate = 0.05
[round]
count = {ROUNDS}
probes_max = 16
deadline_ms_min = 2_000
deadline_ms_max = 5_000
lease_ms = 60_000
[[peers]]
name = "n"
count = 1
evaluates = true
line = {{ latency_ms = 0.1, jitter_ms = 0, loss = 0 }}
"""


def total(figures: Figures, direction: str) -> float:
    """Return the bytes of all kinds."""
    name = f'peerturb_bytes_total{{direction="{direction}"'
    return sum(value for key, value in figures.items() if key.startswith(name))


def test_a_simulated_run_counts_the_bytes_that_a_real_coordinator_counts(tmp_path: Path) -> None:
    """The same spec, one peer of a name as long: the same messages but for a few numbers of other lengths."""
    with network(tmp_path, toy_run(count=ROUNDS)) as run:
        coordinator = run.start_coordinator("--http", "127.0.0.1:0")
        at = str(coordinator.wait_for(lambda event: event["event"] == "serving")["http"])
        node = run.start_node("n-0")
        assert node.wait() == 0
        real = await_figures(at, lambda figures: figures["peerturb_finished"] == 1)
    (tmp_path / "toy.toml").write_text(SCENARIO, encoding="utf-8")
    world = build(Scenario.load(tmp_path / "toy.toml"), folder=tmp_path, out=tmp_path)
    run_to_end(world, until_s=1_000)
    assert world.is_finished
    assert world.up_bytes == pytest.approx(total(real, "up"), rel=0.01)
    assert world.down_bytes == pytest.approx(total(real, "down"), rel=0.01)
