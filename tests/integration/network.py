"""A run made of real processes on loopback: start, watch, kill, restart. Used by the integration tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerturb.runlog.writer import write_log
from peerturb_coordinator.store import SqliteLogStore

Event = dict[str, Any]

TOY_RUN = """
name = "{name}"
[model]
name = "toy"
digest = "{digest}"
[step]
learning_rate = 0.05
[round]
count = {count}
probes_max = {probes}
deadline_ms_min = {deadline_ms}
deadline_ms_max = {deadline_ms_max}
lease_ms = {lease_ms}
[objective]
eval_every = 10
"""


def toy_run(
    *,
    name: str = "toy",
    count: int = 0,
    probes: int = 16,
    deadline_ms: int = 2_000,
    deadline_ms_max: int = 5_000,
    lease_ms: int = 60_000,
) -> str:
    """Return RUN.toml of a run on the toy compute."""
    return TOY_RUN.format(
        name=name,
        digest="0" * 64,
        count=count,
        probes=probes,
        deadline_ms=deadline_ms,
        deadline_ms_max=deadline_ms_max,
        lease_ms=lease_ms,
    )


class Program:
    """One process that prints JSON lines."""

    def __init__(
        self,
        arguments: list[str],
        *,
        folder: Path,
        label: str,
        entry: Sequence[str] = ("-m", "peerturb.cli"),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.label = label
        self.arguments = arguments
        self.events: list[Event] = []
        self.lines: list[str] = []
        """Standard output as it came."""
        self.errors_path = folder / f"{label}.stderr"
        self._news = threading.Condition()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment |= variables or {}
        with self.errors_path.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *entry, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                with self._news:
                    self.lines.append(line)
                    # A killed process may leave half a line behind.
                    with contextlib.suppress(json.JSONDecodeError):
                        self.events.append(json.loads(line))
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, wanted: Callable[[Event], bool], *, timeout_s: float = 60.0, what: str = "an event") -> Event:
        """Return the first event that fits; fail if the process ends or the time is over before."""
        end_s = time.monotonic() + timeout_s
        seen = 0
        with self._news:
            while True:
                for event in self.events[seen:]:
                    if wanted(event):
                        return event
                seen = len(self.events)
                left_s = end_s - time.monotonic()
                if left_s <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    raise AssertionError(f"{self.label} never showed {what}: {self.events[-5:]}\n{self.errors}")
                self._news.wait(min(left_s, 0.5))

    def wait_for_round(self, number: int, *, timeout_s: float = 60.0) -> Event:
        """Return the event of the first applied round with at least this number."""
        return self.wait_for(
            lambda e: e["event"] == "round" and e["round"] >= number, timeout_s=timeout_s, what=f"round {number}"
        )

    def of(self, kind: str) -> list[Event]:
        """Return the events of one kind so far."""
        return [event for event in list(self.events) if event.get("event") == kind]

    def digests(self) -> dict[int, str]:
        """Return round -> digest, as reported."""
        return {event["round"]: event["digest"] for event in self.of("round") if event["digest"] is not None}

    @property
    def errors(self) -> str:
        """What it wrote on standard error."""
        return self.errors_path.read_text(encoding="utf-8", errors="replace")[-4_000:]

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s)

    def wait(self, *, timeout_s: float = 60.0) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code


def run_command(
    *arguments: str, timeout_s: float = 120.0, folder: Path | None = None, columns: int = 200
) -> "subprocess.CompletedProcess[str]":
    """Run `peerturb` to its end, in `folder` or where the tests run, told that lines have so many columns."""
    return subprocess.run(
        [sys.executable, "-m", "peerturb.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": str(columns)},
    )


class Network:
    """A coordinator and its nodes in one folder."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run_file = folder / "RUN.toml"
        self.run_file.write_text(run, encoding="utf-8")
        self.data_dir = folder / "coordinator"
        self.port = 0
        self.programs: list[Program] = []
        self.coordinator: Program | None = None

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        return f"127.0.0.1:{self.port}"

    def start_coordinator(self, *extra: str) -> Program:
        """Start it, on the same port as before, and wait until it listens."""
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        arguments = ["coordinator", "serve", str(self.run_file), "--listen", self.address]
        arguments += ["--data-dir", str(self.data_dir), "--port-file", str(port_file), "--json", *extra]
        self.coordinator = self._start(arguments, "coordinator")
        end_s = time.monotonic() + 30
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < end_s, f"the coordinator does not start: {self.coordinator.errors}"
            assert self.coordinator.process.poll() is None, self.coordinator.errors
            time.sleep(0.01)
        self.port = int(port_file.read_text())
        return self.coordinator

    def start_node(
        self, name: str, *extra: str, compute: str = "toy", entry: Sequence[str] = ("-m", "peerturb.cli")
    ) -> Program:
        """Start a node with its own state folder; `entry` is what Python runs with the command's arguments."""
        arguments = ["node", "run", "--coordinator", self.address, "--state", str(self.folder / name)]
        arguments += ["--name", name, "--compute", compute, "--json", "--verbose", *extra]
        return self._start(arguments, name, entry)

    def run(
        self, *arguments: str, timeout_s: float = 120.0, folder: Path | None = None, columns: int = 200
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; see `run_command`."""
        return run_command(*arguments, timeout_s=timeout_s, folder=folder, columns=columns)

    def export_log(self) -> Path:
        """Return the stopped coordinator's log as a file."""
        store = SqliteLogStore(self.data_dir)
        try:
            payloads = store.read(0, 1 << 40)  # type: ignore[arg-type]
        finally:
            store.close()
        path = self.folder / f"exported-{len(list(self.folder.glob('exported-*')))}.runlog"
        write_log(path, payloads)
        return path

    def local_log(self, name: str) -> Path:
        """Return a node's local log."""
        (found,) = (self.folder / name).glob("run-*/local.runlog")
        return found

    def close(self) -> None:
        """Kill whatever is left."""
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()

    def _start(self, arguments: list[str], label: str, entry: Sequence[str] = ("-m", "peerturb.cli")) -> Program:
        program = Program(arguments, folder=self.folder, label=label, entry=entry)
        self.programs.append(program)
        return program


@contextlib.contextmanager
def network(folder: Path, run: str) -> Iterator[Network]:
    """Give a network whose processes all end with the block."""
    made = Network(folder, run)
    try:
        yield made
    finally:
        made.close()


def assert_digests_agree(*programs: Program) -> int:
    """Compare what nodes reported, round by round; return how many rounds two or more of them reported."""
    merged: dict[int, dict[str, str]] = {}
    for program in programs:
        for number, digest in program.digests().items():
            merged.setdefault(number, {})[program.label] = digest
    for number, reported in merged.items():
        assert len(set(reported.values())) == 1, f"after round {number}: {reported}"
    return sum(len(reported) > 1 for reported in merged.values())
