"""When peers come, go, crash and pause, and what else goes wrong: a scenario's chances turned into events.

Every chance of every peer has its own random stream, so that a scenario with one more fault is otherwise the same.
"""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from peerturb.errors import SpecError
from peerturb_sim.events import START_US, exponential_us, stream
from peerturb_sim.peer import Peer
from peerturb_sim.scenario import FaultSpec, Scenario
from peerturb_sim.world import World

HOUR_S = 3_600.0
TRACE_COLUMNS = ["peer", "join_s", "leave_s"]
TIME_S_MAX = 366 * 86_400
"""Of a trace, as of a scenario."""

Stay = tuple[float, float | None]
"""Seconds at which a peer comes and goes; None: it stays to the end."""


def populate(world: World, scenario: Scenario, *, folder: Path) -> None:
    """Put a scenario's peers into the world and schedule their lives and the scenario's faults.

    Args:
        world: without peers.
        scenario: what shall happen.
        folder: where its traces lie.

    Raises:
        SpecError: a trace cannot be used.
    """
    for group in scenario.peers:
        trace = read_trace(folder / group.life.trace, group.count) if group.life.trace else None
        for number in range(group.count):
            Life(world, world.add(group), None if trace is None else trace[number])
    for number, fault in enumerate(scenario.faults):
        world.events.at(_us(fault.at_s), partial(_strike, world, fault, number))


def read_trace(path: Path, count: int) -> list[list[Stay]]:
    """Read when each of `count` peers is there: a CSV file with the columns peer, join_s, leave_s.

    Raises:
        SpecError: unreadable, or a row that cannot be; names file and line.
    """
    stays: list[list[Stay]] = [[] for _ in range(count)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if (columns := next(rows, [])) != TRACE_COLUMNS:
                said = ",".join(columns) or "nothing"
                raise SpecError(f"{path}: line 1: the columns must be {','.join(TRACE_COLUMNS)}, not {said}")
            for row in rows:
                if row:
                    _take_stay(stays, row, f"{path}: line {rows.line_num}")
    except OSError as error:
        raise SpecError(
            f"cannot read {path}, the trace of a group: {error.strerror or error}; correct its name"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{path}, the trace of a group, is not a CSV file: {error}") from error
    if not any(stays):
        raise SpecError(f"{path}: nobody comes: write a row for each stay below the first line")
    return stays


def _take_stay(stays: list[list[Stay]], row: list[str], where: str) -> None:
    try:
        peer_text, join_text, leave_text = row
        peer, join_s = int(peer_text), float(join_text)
        leave_s = float(leave_text) if leave_text.strip() else None
    except ValueError:
        said = ",".join(row)
        raise SpecError(f"{where}: {said!r} is not three numbers: peer,join_s,leave_s (leave_s may be empty)") from None
    if not (0 <= join_s <= TIME_S_MAX and (leave_s is None or abs(leave_s) <= TIME_S_MAX)):
        raise SpecError(f"{where}: a time is not between 0 and {TIME_S_MAX:,} seconds: {join_text},{leave_text}")
    if not 0 <= peer < len(stays):
        raise SpecError(f"{where}: peer {peer} is not one of the group's {len(stays)}: raise count, or drop the row")
    if leave_s == join_s:
        raise SpecError(f"{where}: peer {peer} leaves at {leave_text} s, when it joins: drop the row, or correct it")
    if leave_s is not None and leave_s < join_s:
        raise SpecError(f"{where}: peer {peer} leaves at {leave_text} s before it joins at {join_text} s: swap them")
    before = stays[peer][-1] if stays[peer] else None
    if before is not None and (before[1] is None or join_s < before[1]):
        raise SpecError(f"{where}: peer {peer} joins at {join_s} s while it is still there: order its rows by time")
    stays[peer].append((join_s, leave_s))


class Life:
    """One peer's comings and goings. It comes back after a crash only while it would be there."""

    def __init__(self, world: World, peer: Peer, trace: Sequence[Stay] | None) -> None:
        self._world, self._peer = world, peer
        self._draws = {
            purpose: stream(world.seed, purpose, peer.index) for purpose, rate in _purposes(peer).items() if rate
        }
        self._visit = 0
        life, events = peer.group.life, world.events
        arrivals = stream(world.seed, "arrival", peer.index)
        if trace is not None:
            for join_s, leave_s in trace:
                events.at(_us(join_s), self._arrive)
                if leave_s is not None:
                    events.at(_us(leave_s), self._leave)
        elif life.day_s:
            begins_s = arrivals.uniform(-life.day_s, 0.0)
            events.at(_us(max(0.0, begins_s)), self._wake, begins_s)
        else:
            events.at(_us(arrivals.uniform(*life.arrive_s)), self._arrive)

    def _arrive(self) -> None:
        self._visit += 1
        self._peer.start()
        life, group = self._peer.group.life, self._peer.group
        if life.stay_s:
            self._after("stay", life.stay_s, self._leave)
        for purpose, rate, action in (
            ("crash", group.crashes_per_hour, self._crash),
            ("pause", group.pauses_per_hour, self._pause),
            ("cut", group.line_spec.cuts_per_hour, self._cut),
        ):
            if rate:
                self._after(purpose, HOUR_S / rate, action)

    def _leave(self) -> None:
        self._visit += 1
        self._peer.leave()
        if self._peer.group.life.away_s:
            self._after("away", self._peer.group.life.away_s, self._arrive)

    def _wake(self, begins_s: float) -> None:
        """An evening of the diurnal pattern that began then, perhaps before the world did."""
        life = self._peer.group.life
        ends_s = begins_s + life.day_s * life.awake
        if ends_s > 0:
            self._arrive()
            self._world.events.at(_us(ends_s), self._leave)
        self._world.events.at(_us(begins_s + life.day_s), self._wake, begins_s + life.day_s)

    def _crash(self) -> None:
        group, draws = self._peer.group, self._draws["crash"]
        is_disk, is_power = draws.random() < group.disk_losses, draws.random() < 0.3
        down_us = exponential_us(draws, group.down_s)
        if self._peer.is_running:
            kind = "disk_loss" if is_disk else "peer_crash"
            self._world.recorder.fault(kind, self._peer.name, for_s=down_us / 1e6)
            self._peer.crash(power=is_power, disk=is_disk)
            self._world.events.after(down_us, self._return, self._visit)
        self._after("crash", HOUR_S / group.crashes_per_hour, self._crash)

    def _return(self, visit: int) -> None:
        if visit == self._visit:
            self._peer.restart()

    def _pause(self) -> None:
        group = self._peer.group
        pause_us = exponential_us(self._draws["pause"], group.pause_s)
        if self._peer.is_running:
            self._world.recorder.fault("pause", self._peer.name, for_s=pause_us / 1e6)
            self._peer.resumes_us = self._world.events.now_us + pause_us
        self._after("pause", HOUR_S / group.pauses_per_hour, self._pause)

    def _cut(self) -> None:
        if self._peer.line is not None:
            self._world.recorder.fault("cut", self._peer.name)
            self._world.cut(self._peer.line)
        self._after("cut", HOUR_S / self._peer.group.line_spec.cuts_per_hour, self._cut)

    def _after(self, purpose: str, mean_s: float, action: Callable[[], None]) -> None:
        """Do it after a random time, if the peer is then in the same visit (or away, for its return)."""
        self._world.events.after(exponential_us(self._draws[purpose], mean_s), self._if_same, self._visit, action)

    def _if_same(self, visit: int, action: Callable[[], None]) -> None:
        if visit == self._visit and not self._world.is_calm:
            action()


def _purposes(peer: Peer) -> dict[str, float]:
    """Return a peer's chances by their names."""
    group = peer.group
    return {
        "stay": group.life.stay_s,
        "away": group.life.away_s,
        "crash": group.crashes_per_hour,
        "pause": group.pauses_per_hour,
        "cut": group.line_spec.cuts_per_hour,
    }


def _strike(world: World, fault: FaultSpec, number: int) -> None:
    """Make a scenario's fault happen now."""
    if world.is_calm:
        return
    draws = stream(world.seed, "fault", number)
    for_us = round(fault.for_s * 1e6)
    events, coordinator = world.events, world.coordinator
    if fault.kind == "coordinator_crash":
        world.recorder.fault(fault.kind, "coordinator", for_s=fault.for_s)
        tear_at = draws.random() if fault.torn else None
        coordinator.crash(tear_at=tear_at)
        coordinator.down_until_us = max(coordinator.down_until_us, events.now_us + for_us)
        events.after(for_us, _restart, world)
        return
    if fault.kind == "store_refuses":
        world.recorder.fault(fault.kind, "coordinator", for_s=fault.for_s)
        coordinator.disk.refuses = True
        coordinator.refuses_until_us = max(coordinator.refuses_until_us, events.now_us + for_us)
        events.after(for_us, _accept, world)
        return
    peers = _choose(world, fault, draws.sample)
    if fault.kind != "corruption":  # each of those is recorded by itself: peers notice them one by one
        who = peers[0].name if len(peers) == 1 else f"{len(peers)} peers"
        world.recorder.fault(fault.kind, who, for_s=fault.for_s)
    if fault.kind == "partition":
        world.partition(peers, for_us)
    for peer in peers:
        if fault.kind == "corruption" and peer.is_running:
            peer.corrupt()
        elif fault.kind == "peer_crash" and peer.is_running:
            peer.crash()
            events.after(for_us, peer.restart)


def _choose(world: World, fault: FaultSpec, sample: Callable[[Sequence[Peer], int], list[Peer]]) -> list[Peer]:
    """Draw whom a fault hits."""
    group = [peer for peer in world.peers if not fault.group or peer.group.name == fault.group]
    return sample(group, max(1, round(fault.share * len(group))))


def _restart(world: World) -> None:
    if world.is_calm or world.events.now_us < world.coordinator.down_until_us:
        return
    world.coordinator.crash()  # if nothing was written since, it has not died yet
    world.coordinator.start()


def _accept(world: World) -> None:
    if world.events.now_us >= world.coordinator.refuses_until_us:
        world.coordinator.disk.refuses = False


def _us(time_s: float) -> int:
    return START_US + round(time_s * 1e6)
