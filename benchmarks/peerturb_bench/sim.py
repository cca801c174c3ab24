"""What the simulator of a real model spends its time on: 256 peers with 4 probes each, on Ray's workers and in process.

value: part of the workers' time (workers x wall-clock seconds of the measured rounds) inside perturbed forward passes,
their signs and losses included; reference: 0.85, the least that is wanted; ratio: value / reference. The rows below
say where the rest goes, in the same unit. Start-up and the first rounds are not measured. It knows nothing of how the
figures come about; `peerturb_sim` is run as it is, with a stopwatch around four calls.
"""

import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peerturb.spec import RunSpec
from peerturb_bench.rows import Row
from peerturb_bench.simulated import FOREVER_S, crowd, model_folder, text_files
from peerturb_sim.fidelity import specified
from peerturb_sim.ray_compute import RayCompute, Worker
from peerturb_sim.real import RealModel
from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import populated
from peerturb_sim.torch_compute import TorchCompute
from peerturb_sim.world import World

WANTED = 0.85
PEERS, PROBES, RATE = 256, 4, 1e-3
WARM_ROUNDS, ROUNDS = 2, 6
"""Rounds before the clock starts, and measured ones."""
PARTS = {
    "forward": "forward passes",
    "probe": "drawing examples, batching, encoding bytes",
    "update": "updates",
    "digest": "digests",
}


class Stopwatch:
    """Seconds inside some calls; what a call spends in another one counts there."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside: list[str] = []
        self._since_s = 0.0

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call with its time counted under a name."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._inside.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._inside.pop()

        return timed

    def _turn(self) -> None:
        now_s = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now_s - self._since_s
        self._since_s = now_s

    @classmethod
    def on(cls, model: RealModel) -> "Stopwatch":
        """Put a stopwatch around a model's calls."""
        watch = cls()
        for owner, call, name in (
            (model.runner, "losses", "forward"), (model, "measure", "probe"), (model, "go", "update"),
            (model, "digest", "digest"),
        ):  # fmt: skip
            setattr(owner, call, watch.around(name, getattr(owner, call)))
        return watch


class TimedWorker(Worker):
    """A worker that says what it spends its time on."""

    def ready(self) -> int:
        """Put the stopwatch on the loaded model."""
        number = super().ready()
        self._watch = Stopwatch.on(self.model)
        return number

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far."""
        return dict(self._watch.seconds)


def run(quick: bool) -> list[Row]:
    """Measure both fidelities."""
    peers, warm, rounds = (12, 1, 2) if quick else (PEERS, WARM_ROUNDS, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, model = text_files(folder), model_folder("stories3m")
        scenario = crowd(model, files, peers=peers, probes=PROBES, rounds=warm + rounds, rate=RATE)
        return [*_on_ray(scenario, folder, warm), *_in_process(scenario, folder, warm)]


def _on_ray(scenario: Scenario, folder: Path, warm: int) -> list[Row]:
    spec, section = specified(scenario, folder=folder)
    compute = RayCompute(section.model_copy(update={"kind": "ray"}), spec, worker=TimedWorker)
    try:
        workers = len(compute.actors)

        def seconds() -> dict[str, float]:
            found = compute.ray.get([actor.seconds.remote() for actor in compute.actors])
            return {name: sum(one[name] for one in found) for name in PARTS}

        noun = "worker" if workers == 1 else "workers"
        return _measured(scenario, spec, compute, folder, f"ray, {workers} {noun}", workers, warm, seconds)
    finally:
        compute.close()


def _in_process(scenario: Scenario, folder: Path, warm: int) -> list[Row]:
    spec, section = specified(scenario, folder=folder)
    compute = TorchCompute(section, spec)
    watch = Stopwatch.on(compute.model)
    return _measured(scenario, spec, compute, folder, "torch, in process", 1, warm, lambda: dict(watch.seconds))


def _measured(
    scenario: Scenario, spec: RunSpec, compute: TorchCompute, folder: Path, name: str, workers: int, warm: int,
    seconds: Callable[[], dict[str, float]],
) -> list[Row]:  # fmt: skip
    """Simulate; return the share of each part in the workers' time between round `warm` and the last."""
    world = populated(scenario, spec, compute, folder=folder, out=folder)
    _to_round(world, warm)
    before, began_s = seconds(), time.perf_counter()
    _to_round(world, scenario.round.count)
    wall_s, after = time.perf_counter() - began_s, seconds()
    shares = {part: (after[part] - before[part]) / (workers * wall_s) for part in PARTS}
    return _rows(name, scenario, shares, wall_s / (scenario.round.count - warm))


def _rows(name: str, scenario: Scenario, shares: dict[str, float], round_s: float) -> list[Row]:
    head = Row(
        name=f"{name}: {PARTS['forward']}", value=shares["forward"], unit="of the time", reference=WANTED,
        ratio=shares["forward"] / WANTED,
        note=f"{scenario.total_peers} peers x {scenario.round.probes_max} probes, {round_s:.2f} s a round",
    )  # fmt: skip
    rest = [Row(name=f"{name}: {PARTS[part]}", value=shares[part], unit="of the time") for part in list(PARTS)[1:]]
    waits = Row(
        name=f"{name}: events, transport, waiting", value=1 - sum(shares.values()), unit="of the time"
    )  # fmt: skip
    return [head, *rest, waits]


def _to_round(world: World, number: int) -> None:
    world.run(until_s=FOREVER_S, done=lambda: world.log.ledger.sealed_rounds >= number)
