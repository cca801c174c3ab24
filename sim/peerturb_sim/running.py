"""What `peerturb sim run` does: read a scenario, simulate it, write log and `result.json`, say how it goes."""

import dataclasses
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from peerturb.errors import PeerturbError, SpecError
from peerturb_sim.result import Result
from peerturb_sim.scenario import RealSpec, Scenario
from peerturb_sim.simulation import RESULT_NAME, Progress, simulate
from peerturb_sim.swarm import Outcome, run_swarm

SAY_TERMINAL_S, SAY_ELSEWHERE_S = 0.5, 5.0
"""Real time between two lines of progress, where a line replaces the one before and where all stay."""


class BrokenRunError(PeerturbError):
    """A checker saw an invariant broken."""


class UnfinishedRunError(PeerturbError):
    """The scenario's time was over before its rounds were sealed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where Ray's workers are, as flags say it; None: as the scenario does."""

    workers: int | None = None
    address: str | None = None

    def placed(self, scenario: Scenario) -> Scenario:
        """Return the scenario with its probes measured there.

        Raises:
            SpecError: its peers have no real model.
        """
        flags = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if not flags:
            return scenario
        if not isinstance(scenario.compute, RealSpec):
            names = " and ".join(f"--{name}" for name in flags)
            raise SpecError(
                f"{names}: the scenario {scenario.name!r} has a toy objective, which needs no workers; leave that out, "
                "or give the scenario a model (compute.kind torch or ray)"
            )
        return scenario.model_copy(update={"compute": scenario.compute.model_copy(update={**flags, "kind": "ray"})})


def run_scenario(path: Path, *, seed: int | None, out: Path, cluster: Cluster, as_json: bool) -> None:
    """Simulate a scenario file.

    Raises:
        SpecError: the scenario, a trace or `out` cannot be used.
        BrokenRunError: an invariant was broken; log and result are written all the same.
        UnfinishedRunError: the scenario's time was over too soon; likewise.
        KeyboardInterrupt: the user had enough; log and result of what there was are written.
    """
    scenario = cluster.placed(Scenario.load(path))
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT_NAME).unlink(missing_ok=True)  # of an earlier run, whose log goes now
        with Display() as display:
            result = simulate(
                scenario, folder=path.parent, out=out, progress=lambda state: display.show(_progress(state, scenario))
            )
        (out / RESULT_NAME).write_text(result.to_json(), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error
    sys.stdout.write(result.to_json() if as_json else summary(result, out))
    if result.broken:
        row = result.broken[0]
        raise BrokenRunError(
            f"after {row.at_s:.3f} virtual seconds {row.name} was broken: {row.text}; "
            f"again: peerturb sim run {path} --seed {scenario.seed} --out {out}"
        )
    if result.is_interrupted:
        raise KeyboardInterrupt
    if not result.is_finished:
        raise UnfinishedRunError(
            f"after {result.virtual_s:.0f} virtual seconds {len(result.rounds)} of {scenario.round.count} rounds are "
            f"sealed ({result.waiting_for}); log and result are written. Raise until_s if the run only needs longer"
        )


def _progress(state: Progress, scenario: Scenario) -> str:
    loss = "-" if math.isnan(state.loss) else f"{state.loss:.4g}"
    return (
        f"round {state.rounds}/{scenario.round.count}, loss {loss}, {state.running} peers, "
        f"{state.virtual_s:.0f} virtual seconds"
    )


class Display:
    """Progress on standard error: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._said_s = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self, text: str) -> None:
        """Show how far it has come, if the last time was not just now."""
        now_s = time.monotonic()
        if now_s - self._said_s < (SAY_TERMINAL_S if self._is_terminal else SAY_ELSEWHERE_S):
            return
        self._said_s = now_s
        if self._is_terminal:
            self._clear()
            # A line that wraps could not be taken back.
            sys.stderr.write(text[: shutil.get_terminal_size().columns - 1])
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self._clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\033[K")


def run_seeds(*, first: int, seeds: int, seconds: float | None, as_json: bool) -> None:
    """Run a swarm and report.

    Raises:
        BrokenRunError: some seeds broke an invariant.
    """

    done = [0, 0]

    def show(outcome: Outcome) -> None:
        if (broken := outcome.broken) is not None:
            head = f"seed {outcome.seed} ({outcome.mix}): {broken.name} at {broken.at_s:.3f} s"
            display.say(f"{head}\n{broken.text}")
        done[0] += 1
        done[1] += broken is not None
        display.show(f"{done[0]}/{seeds} seeds, {done[1]} broken; seed {outcome.seed}: {outcome.rounds} rounds")

    with Display() as display:
        outcomes = run_swarm(first=first, seeds=seeds, seconds=seconds, show=show)
    broken = [outcome.broken for outcome in outcomes if outcome.broken is not None]
    if as_json:
        sys.stdout.write(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    else:
        crashes, rounds = sum(one.crashes for one in outcomes), sum(one.rounds for one in outcomes)
        unnoticed = sum(len(one.unnoticed) for one in outcomes)
        outvoted = sum(one.outvoted > 0 for one in outcomes)
        sys.stdout.write(
            f"{len(outcomes)} of {seeds} seeds, {rounds} rounds, {crashes} crashes, {unnoticed} bits flipped too late "
            f"to be noticed, {outvoted} seeds in which wrong weights once had the majority: {len(broken)} broken\n"
        )
    if broken:
        again = "\n".join(f"  {one.name}: {one.command}" for one in broken)
        raise BrokenRunError(f"{len(broken)} of {len(outcomes)} seeds broke an invariant; again:\n{again}")


def summary(result: Result, out: Path) -> str:
    """Say in a few lines what became of a run."""
    losses = [row.loss for row in result.rounds if row.loss is not None]
    fell = f"loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else "no finite loss"
    ended = "finished" if result.is_finished else "not finished" if result.is_interrupted else "not finished in time"
    took = sum(row.sealed_s - row.opened_s for row in result.rounds) / max(len(result.rounds), 1)
    gave = sum(1 for row in result.peers if row.contributions)
    seals = ", ".join(f"{count} {reason}" for reason, count in result.seals.items())
    refused = ", ".join(f"{count} {code}" for code, count in result.rejects.items()) or "none"
    return (
        f"{result.name}, seed {result.seed}: {ended}, {len(result.rounds)} rounds in {result.virtual_s:.1f} virtual "
        f"seconds ({took:.2f} s each), {fell}\n"
        f"  peers    {gave} of {len(result.peers)} gave something\n"
        f"  sealed   {seals or 'nothing'}\n"
        + ("" if result.is_finished else f"  waits    {result.waiting_for}\n")
        + f"  refused  {refused}\n"
        f"  bytes    {result.bytes_up:,} up, {result.bytes_down:,} down, log {result.log.bytes:,}\n"
        f"  faults   {len(result.faults)}\n"
        f"  written  {out / result.log.file}, {out / RESULT_NAME}; a page of it: peerturb sim report {out}\n"
    )
