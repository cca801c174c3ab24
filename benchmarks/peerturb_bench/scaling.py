"""How many rounds do more peers save? Simulated runs of 1 to 256 peers, a few probes each, to one held-out loss.

Every run is the simulator's, with a real model in process: production machines, engine, bytes and update. Each number
of peers gets the learning rate that serves it best: that of half as many peers, doubled as long as that takes fewer
rounds, then a step of the square root of two to either side; the median of the seeds decides. A run that is not there
after its most rounds, or after half as many again as the best rate's median took, is given up. value: rounds until the
target, median of the seeds; reference: the ideal, the rounds of one peer over the peers; ratio: reference / value, 1 if
every peer counted in full.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from peerturb_bench import plots
from peerturb_bench.rows import Row
from peerturb_bench.simulated import FOREVER_S, crowd, model_folder, text_files
from peerturb_sim.compute import Evaluation
from peerturb_sim.scenario import Scenario
from peerturb_sim.simulation import build

MODEL, PROBES = "stories260k", 4
WORKERS = 2
"""Processes of one thread each; a run's figures do not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Size of the experiment."""

    peers: Sequence[int]
    seeds: Sequence[int]
    target: float
    """Held-out loss, nats."""
    rate: float
    """The first that the fewest peers try."""
    rounds_max: int
    """Of the fewest peers; more of them get as many times fewer, but at least `rounds_least`."""
    rounds_least: int = 100
    patience: float = 1.5
    """Times the best rate's median, after which a run at another rate is given up."""

    def limit(self, peers: int) -> int:
        """Return the rounds after which so many peers give up."""
        return max(self.rounds_least, self.rounds_max * self.peers[0] // peers)

    def patient(self, peers: int, best: float) -> int:
        """Return the rounds after which a run of so many peers gives up, `best` being the fewest so far."""
        return min(self.limit(peers), math.ceil(self.patience * best)) if math.isfinite(best) else self.limit(peers)

    def every(self, peers: int) -> int:
        """Return the rounds between evaluations: a two-hundredth of the most that are allowed."""
        return max(1, self.limit(peers) // 200)


FULL = Plan(peers=(1, 2, 4, 8, 16, 32, 64, 128, 256), seeds=(0, 1, 2), target=4.0, rate=5e-4, rounds_max=2_000)
QUICK = Plan(peers=(1, 4), seeds=(0,), target=4.95, rate=2e-3, rounds_max=200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learnt: a base model and its data."""

    name: str
    model: Path
    files: tuple[Path, Path]
    objective: dict[str, object] | None = None


Rounds = list[float | None]
"""Of runs to the target, by seed; None: given up."""


@dataclass(slots=True, kw_only=True)
class Count:
    """What became of one number of peers."""

    peers: int
    limit: int
    tried: dict[float, Rounds] = field(default_factory=dict)
    """By learning rate."""

    @property
    def rate(self) -> float:
        """The rate with the fewest rounds, the lower one of equals."""
        return min(sorted(self.tried), key=lambda rate: _median(self.tried[rate]))

    @property
    def rounds(self) -> Rounds:
        """What the best rate took."""
        return self.tried[self.rate]

    @property
    def median(self) -> float:
        """Rounds to the target; infinite if most runs were given up."""
        return _median(self.rounds) if self.tried else math.inf


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure all numbers of peers; `out` gets `scaling.json` and `scaling.png`."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = Task(name=f"{MODEL} on tinyshakespeare", model=model_folder(MODEL), files=text_files(folder))
        counts = measure(plan, task, say=_say)
    if out is not None:
        document = {"task": task.name, "target": plan.target, "probes": PROBES, "counts": list(map(_as_json, counts))}
        (out / "scaling.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        plots.curves(out / "scaling.png", [[panel(plan, task.name, counts)]])
    return rows(plan, task.name, counts)


def measure(plan: Plan, task: Task, *, say: Callable[[str], None] = lambda line: None) -> list[Count]:
    """Return the rounds of every number of peers.

    Args:
        plan: how many, and to which loss.
        task: what is learnt.
        say: is told what has come out.
    """
    counts: list[Count] = []
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for peers in plan.peers:
            count = Count(peers=peers, limit=plan.limit(peers))
            _search(count, partial(_rounds_of, pool, plan, task, count), counts[-1].rate if counts else plan.rate)
            say(f"{peers} peers, lr {count.rate:g}: {count.rounds} rounds; tried {count.tried}")
            counts.append(count)
    return counts


def _search(count: Count, rounds: Callable[[float], Rounds], start: float) -> None:
    """Try `start`, then doubled rates as long as they are better, then those on either side of the best."""

    def attempt(rate: float) -> None:
        count.tried[rate] = rounds(rate)

    attempt(start)
    attempt(2 * start)
    while math.isclose(count.rate, highest := max(count.tried)) and math.isfinite(count.median):
        attempt(2 * highest)
    middle = count.rate
    attempt(middle * math.sqrt(2))
    attempt(middle / math.sqrt(2))


def _median(rounds: Rounds) -> float:
    return statistics.median(math.inf if number is None else number for number in rounds)


def _rounds_of(pool: ProcessPoolExecutor, plan: Plan, task: Task, count: Count, rate: float) -> Rounds:
    jobs = [
        pool.submit(
            rounds_to, task, peers=count.peers, rate=rate, seed=seed, target=plan.target,
            limit=plan.patient(count.peers, count.median), every=plan.every(count.peers),
        )
        for seed in plan.seeds
    ]  # fmt: skip
    return [job.result() for job in jobs]


def rounds_to(task: Task, *, peers: int, rate: float, seed: int, target: float, limit: int, every: int) -> float | None:
    """Simulate a run to a held-out loss; return its rounds, between evaluations linearly, None if it is given up.

    Args:
        task: what is learnt.
        peers: each with `PROBES` probes in every round.
        rate: learning rate.
        seed: of perturbations, draws and lines.
        target: the loss, in nats.
        limit: rounds after which it is given up.
        every: rounds between evaluations.
    """
    scenario = crowd(
        task.model, task.files, peers=peers, probes=PROBES, rounds=limit, rate=rate, seed=seed, eval_every=every,
        objective=task.objective,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        return _followed(scenario, Path(name), target)


def _followed(scenario: Scenario, folder: Path, target: float) -> float | None:
    world = build(scenario, folder=folder, out=folder)
    found = world.recorder.evaluations
    try:
        base: Evaluation = world.compute.evaluate(world.compute.base)
        world.run(
            until_s=FOREVER_S, done=lambda: world.is_finished or bool(found and _is_over(found[-1].loss, target, base))
        )
    finally:
        world.compute.close()
    points = [(0.0, base.loss), *((float(row.round), math.inf if row.loss is None else row.loss) for row in found)]
    for (before, higher), (after, lower) in pairwise(points):
        if lower <= target < higher:
            return round(before + (after - before) * (higher - target) / (higher - lower), 2)
    return None


def _is_over(loss: float | None, target: float, base: Evaluation) -> bool:
    """Say whether a run is there, or broken: a loss far above the base model's does not come back."""
    return loss is None or loss <= target or loss > 1.5 * base.loss


def rows(plan: Plan, name: str, counts: Sequence[Count]) -> list[Row]:
    """Return a row for each number of peers."""
    first = counts[0]
    made = []
    for count in counts:
        is_there, is_comparable = math.isfinite(count.median), math.isfinite(first.median)
        ideal = first.median * first.peers / count.peers if is_comparable else None
        noun = "peer" if count.peers == 1 else "peers"
        note = f"lr {count.rate:g}; seeds {', '.join('given up' if r is None else f'{r:g}' for r in count.rounds)}"
        made.append(
            Row(
                name=f"{name}, to {plan.target:g}: {count.peers} {noun}",
                value=count.median if is_there else None,
                unit="rounds",
                reference=ideal,
                ratio=ideal / count.median if is_there and ideal is not None else None,
                note=note,
            )
        )
    return made


def panel(plan: Plan, name: str, counts: Sequence[Count]) -> plots.Panel:
    """Return the figure: every seed a dot, their medians a line, the ideal dashed."""
    xs = [float(count.peers) for count in counts]
    medians = [count.median for count in counts]
    ideal = [medians[0] * counts[0].peers / peers for peers in xs]
    dots = [(float(count.peers), rounds) for count in counts for rounds in count.rounds if rounds is not None]
    lines = [
        plots.Line(label="ideal: rounds of one peer ÷ peers", xs=xs, ys=ideal, colour=plots.GREY, dash="--"),
        plots.Line(label="median", xs=xs, ys=medians, colour=plots.BLUE, mark="o"),
        plots.Line(
            label=f"{len(plan.seeds)} seeds", xs=[x for x, _ in dots], ys=[y for _, y in dots], colour=plots.BLUE,
            mark=".", dash="",
        ),
    ]  # fmt: skip
    return plots.Panel(
        title=f"{name}, {PROBES} probes a peer", x="peers", y=f"rounds to loss {plan.target:g}", lines=lines,
        is_log=True, is_log_y=True, ticks=xs,
    )  # fmt: skip


def _as_json(count: Count) -> dict[str, object]:
    tried = {f"{rate:g}": rounds for rate, rounds in sorted(count.tried.items())}
    return {"peers": count.peers, "limit": count.limit, "rate": count.rate, "rounds": count.rounds, "tried": tried}


def _say(line: str) -> None:
    Console(stderr=True).print(f"  {line}", markup=False, highlight=False)
