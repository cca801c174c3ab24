"""The demo's course: set up, train, break things in mid-run, stop, check, write. One coroutine from start to summary.

It decides when what happens; processes are `network`'s, figures `events`', pages `summary`'s and `report`'s.
"""

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from peerturb.spec import RunSpec
from peerturb_node.demo import BASE_MODEL_FOLDER, RUN_FILE
from peerturb_node.demo.checks import are_same_models
from peerturb_node.demo.events import Story
from peerturb_node.demo.examples import Answer, Verdict, choose
from peerturb_node.demo.folder import DemoFolder
from peerturb_node.demo.network import Network, peerturb
from peerturb_node.demo.processes import Child, ChildError, Family
from peerturb_node.demo.report import write_report
from peerturb_node.demo.summary import Summary, summarize
from peerturb_node.demo.task import TaskFiles, write_task

KILL_AT, RESTART_AT = 0.25, 0.6
"""Shares of the run after which a node, and the coordinator, are killed."""
SURVIVE_ROUNDS = 2
"""Rounds that must be sealed after a blow before the next one."""
PROGRESS_EXAMPLES = 120
"""Held-out examples of the evaluations in mid-run; all are used before and after."""
EXAMPLES_SHOWN = 6
STEP_TIMEOUT_S = 120.0
"""Longest silence (no new round while training, no end of a tool) that is not a failure."""
_TICK_S = 0.25
"""Time between two pictures."""
_POLL_S = 0.02


class View(Protocol):
    """Whatever shows the story."""

    def update(self) -> None:
        """Show what is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chose."""

    out: Path
    nodes: int = 4
    seconds: float = 125.0
    """Longest training; the run ends earlier when the RunSpec's rounds are done."""
    has_chaos: bool = True
    keeps_all: bool = False
    """Keep the state folders of all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the closing page needs."""

    summary: Summary
    examples: list[tuple[Answer, Answer]]
    commands: list[tuple[str, str]]


class Demo:
    """One demo from empty folder to report."""

    def __init__(self, options: Options, story: Story, view: View) -> None:
        self._options = options
        self._story = story
        self._view = view
        self._started_s = time.monotonic()
        self._training_s = 0.0
        """When training began, seconds since the start."""
        self._chores: list[asyncio.Task[Verdict]] = []

    async def run(self) -> Result:
        """Play the whole demo. All child processes have ended when this returns or raises.

        Raises:
            PeerturbError: something failed; the message says what, and quotes the log of a process that died.
        """
        folder = DemoFolder.prepare(self._options.out)
        async with Family(folder.logs, child_environment(self._options.nodes)) as family:
            network = Network(folder, family, self._story, self._tick)
            play = asyncio.create_task(self._play(folder, family, network))
            watch = asyncio.create_task(self._watch(network))
            try:
                await asyncio.wait((play, watch), return_when=asyncio.FIRST_COMPLETED)
                return watch.result() if watch.done() else play.result()
            finally:
                tasks = (play, watch, *self._chores)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await network.close()

    async def _watch(self, network: Network) -> Result:
        """Keep clock, byte counts and view going; raise when a process dies that should not."""
        while True:
            self._tick()
            network.refresh()
            self._view.update()
            await asyncio.sleep(_TICK_S)

    def _tick(self) -> None:
        self._story.at_s = time.monotonic() - self._started_s

    # --- the acts -----------------------------------------------------------------------------------------------------

    async def _play(self, folder: DemoFolder, family: Family, network: Network) -> Result:
        story, options = self._story, self._options
        spec = RunSpec.from_toml(RUN_FILE)
        story.rounds_planned, story.seconds_planned = spec.round.count, options.seconds
        story.say("cutting private data for every node from this Python's own files")
        files = await self._write_data(folder)
        story.say("starting the coordinator")
        await network.start_coordinator()
        judge = await self._start_judge(family, "examples-before", folder.base, folder, files)
        story.say(f"starting {options.nodes} nodes: the same base model, private data for each")
        for index in range(options.nodes):
            is_first = index == 0
            await network.start_node(
                node_name(index),
                files.train[index],
                held_out=folder.data / "progress.jsonl" if is_first else None,
                export=folder.model if is_first else None,
            )
        before = asyncio.create_task(self._first_verdict(judge))
        self._chores.append(before)
        await self._until(lambda: story.round >= 1)
        self._training_s = story.at_s
        story.say(
            f"training: each node measures up to {spec.round.probes_max} probes a round, one byte each",
            tone="good",
        )
        if options.has_chaos:
            await self._break_things(network, files)
        await self._until(lambda: self._seconds_left <= 0 or network.is_run_over)
        return await self._finish(folder, family, network, files, await before)

    async def _break_things(self, network: Network, files: TaskFiles) -> None:
        """Kill a node, let another join, kill the coordinator: each waits until the one before has been survived."""
        story, options = self._story, self._options
        victim, newcomer = node_name(options.nodes - 1), node_name(options.nodes)
        if not await self._reached(KILL_AT, network):
            return
        await network.kill_node(victim)
        killed_after = story.round
        story.killed += 1
        story.mark("kill", f"{victim} killed")
        story.say(f"{victim} killed with SIGKILL; the round seals without it", tone="act")
        await self._until(lambda: story.round >= killed_after + SURVIVE_ROUNDS or network.is_run_over)
        story.say(f"{newcomer} starts as a new process, with the base weights only", tone="act")
        peer = await network.start_node(newcomer, files.train[options.nodes], is_late=True)
        await self._until(lambda: peer.rounds_part >= 1 or network.is_run_over)
        if not peer.rounds_part:
            story.say(f"the run ended before {newcomer} was ready", tone="bad", is_phase=False)
            return
        story.joined += 1
        story.mark("join", f"{newcomer} joined")
        seconds = "" if peer.join_s is None else f" in {peer.join_s:.1f} s"
        story.say(f"{newcomer} replayed {peer.replayed} rounds{seconds} and trains with the others", tone="good")
        if not await self._reached(RESTART_AT, network):
            return
        await self._restart_coordinator(network)

    async def _restart_coordinator(self, network: Network) -> None:
        story = self._story
        await network.kill_coordinator()
        announced = story.round
        story.mark("restart", "coordinator restarted")
        story.say(f"coordinator killed with SIGKILL after round {announced}; the nodes wait for it", tone="act")
        await network.start_coordinator()
        story.coordinator_restarts += 1
        story.say("the coordinator is back on its log; the nodes come back by themselves")
        await self._until(lambda: story.round >= announced + SURVIVE_ROUNDS or network.is_run_over)
        lost = sum(peer.disorder for peer in story.peers.values())
        if lost:
            story.say(f"{lost} rounds were lost or seen twice", tone="bad")
        else:
            story.say(f"round {announced + 1} followed round {announced}: no sealed round was lost", tone="good")

    async def _finish(
        self, folder: DemoFolder, family: Family, network: Network, files: TaskFiles, before: Verdict
    ) -> Result:
        story = self._story
        training_s = story.at_s - self._training_s
        story.say(f"training is done after {story.round} rounds; the processes stop in order")
        # The coordinator first: nodes then hold every sealed round, and none is sealed behind a stopping node's back.
        await network.stop_coordinator()
        await network.stop_nodes()
        story.say("replaying the log on the base weights, to compare it with a live node's model")
        await self._tool(family, "log-export", "export", str(folder.coordinator), "--out", str(folder.log))
        judge = await self._start_judge(family, "examples-after", folder.model, folder, files)
        verified = json.loads(await self._tool(family, "log-verify", "verify", str(folder.log), "--json"))
        to_model = ("--model", str(folder.base), "--out", str(folder.replayed), "--device", "cpu")
        await self._tool(family, "log-replay", "export", str(folder.log), *to_model)
        is_equal = are_same_models(folder.model, folder.replayed)
        if is_equal:
            story.say("base weights + log = the live node's model, byte for byte", tone="good")
        else:
            story.say("replaying the log does NOT give the live node's model", tone="bad")
        after = await self._verdict(judge)
        self._tick()
        story.say(f"held-out accuracy {100 * before.accuracy:.1f} % → {100 * after.accuracy:.1f} %", tone="good")
        summary = summarize(
            story,
            before,
            after,
            nodes=self._options.nodes,
            rounds_logged=verified["rounds"],
            probes_logged=verified["probes"],
            seconds=story.at_s,
            training_seconds=training_s,
            is_replay_equal=is_equal,
            model_dir=folder.model,
            log_file=folder.log,
            report_file=folder.report,
        )
        return self._write(folder, summary, choose(before, after, EXAMPLES_SHOWN))

    def _write(self, folder: DemoFolder, summary: Summary, examples: list[tuple[Answer, Answer]]) -> Result:
        commands = next_steps(folder)
        when = f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC"
        write_report(folder.report, self._story, summary, examples, commands, when=when)
        summary.write(folder.summary)
        if not self._options.keeps_all:
            folder.tidy()
        self._view.update()
        return Result(summary=summary, examples=examples, commands=commands)

    # --- helpers ------------------------------------------------------------------------------------------------------

    async def _write_data(self, folder: DemoFolder) -> TaskFiles:
        """Write RunSpec and data; one private part more than nodes, for the one that joins late."""
        shutil.copyfile(RUN_FILE, folder.run_file)
        shutil.copytree(BASE_MODEL_FOLDER, folder.base)
        files = await asyncio.to_thread(write_task, folder.data, nodes=self._options.nodes + 1)
        lines = files.heldout.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder.data / "progress.jsonl").write_text("".join(lines[:PROGRESS_EXAMPLES]), encoding="utf-8")
        return files

    async def _start_judge(self, family: Family, name: str, model: Path, folder: DemoFolder, files: TaskFiles) -> Child:
        arguments = ("--model", str(model), "--spec", str(folder.run_file), "--data", str(files.heldout))
        return await family.start(name, [sys.executable, "-m", "peerturb_node.demo.examples", *arguments], is_tool=True)

    async def _tool(self, family: Family, name: str, *arguments: str) -> str:
        """Run `peerturb log ARGUMENTS` and return what it printed."""
        child = await family.start(name, peerturb("log", *arguments), is_tool=True)
        await self._finished(child)
        return child.output()

    async def _verdict(self, judge: Child) -> Verdict:
        await self._finished(judge)
        return Verdict.from_json(judge.output())

    async def _first_verdict(self, judge: Child) -> Verdict:
        verdict = await self._verdict(judge)
        right = f"{100 * verdict.accuracy:.1f} % right on held-out text"
        self._story.say(f"the base model only guesses: {right}", is_phase=False)
        return verdict

    async def _finished(self, child: Child) -> None:
        if await child.wait(timeout_s=STEP_TIMEOUT_S) != 0:
            raise ChildError(child.obituary())

    async def _reached(self, share: float, network: Network) -> bool:
        """Wait for a share of the run; False if the run is over first."""
        await self._until(lambda: self._progress >= share or network.is_run_over)
        return not network.is_run_over

    @property
    def _progress(self) -> float:
        """Share of the run that is over, by rounds or by time, whichever is further."""
        story = self._story
        by_rounds = story.round / story.rounds_planned if story.rounds_planned else 0.0
        return max(by_rounds, (story.at_s - self._training_s) / self._options.seconds)

    @property
    def _seconds_left(self) -> float:
        return self._training_s + self._options.seconds - self._story.at_s

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that comes with new rounds.

        Raises:
            ChildError: no round was sealed for too long.
        """
        seen, since_s = self._story.round, time.monotonic()
        while not is_so():
            if self._story.round != seen:
                seen, since_s = self._story.round, time.monotonic()
            if time.monotonic() - since_s > STEP_TIMEOUT_S:
                raise ChildError(
                    f"no round was sealed for {STEP_TIMEOUT_S:.0f} s after round {seen}; "
                    f"the logs of all processes are in {self._options.out / 'logs'}"
                )
            await asyncio.sleep(_POLL_S)
        self._tick()


def node_name(index: int) -> str:
    """Return the display name of the node with this index: node-1 is the first."""
    return f"node-{index + 1}"


def next_steps(folder: DemoFolder) -> list[tuple[str, str]]:
    """Return what a person can do with the results."""
    log, base, model = folder.log, folder.base, folder.model / "model.safetensors"
    program = command_name()
    return [
        ("verify", f"{program} log verify {log}"),
        ("replay", f"{program} log export {log} --model {base} --out replayed"),
        ("compare", f"cmp replayed/model.safetensors {model}"),
    ]


def command_name() -> str:
    """Return how `peerturb` is called from here: by its path where it is not on the user's PATH."""
    if shutil.which("peerturb"):
        return "peerturb"
    script = Path(sys.executable).with_name("peerturb")
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def child_environment(nodes: int) -> dict[str, str]:
    """Return the variables children get: no hub, no proxy on the way to loopback, and cores shared fairly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // nodes)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": "127.0.0.1,localhost",
    }
