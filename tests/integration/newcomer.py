"""Two machines for tests of the guides: two folders of this one, each with a clone (of links) and a home of its own.

Command lines are run as a reader types them, in a shell. Only what a page tells its reader to replace is replaced:
addresses, and the fingerprint and token that the coordinator prints. It knows no page.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tests.conftest import REPOSITORY

Found = TypeVar("Found")

PATIENCE_S = 200.0


class Machine:
    """One of the two computers: a clone, a home, what runs there."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.clone = folder / name / "peerturb"
        self.home = folder / name / "home"
        self.home.mkdir(parents=True)
        self.clone.mkdir()
        for entry in REPOSITORY.iterdir():
            if not entry.name.startswith(".") and entry.name not in ("peerturb-keys", "peerturb-coordinator"):
                (self.clone / entry.name).symlink_to(entry)
        programs = self.clone / ".venv" / "bin"
        programs.mkdir(parents=True)
        # What `make setup-node` leaves behind: the command, for the interpreter that runs this test.
        (programs / "peerturb").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m peerturb.cli "$@"\n')
        (programs / "peerturb").chmod(0o755)
        self.outputs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def type(self, line: str) -> Path:
        """Run a command line in a shell, in a terminal of its own; return the file of what it prints."""
        output = self.home / f"terminal-{len(self.outputs)}"
        self.outputs.append(output)
        with output.open("wb") as out:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {line}"],
                cwd=self.clone,
                env=self._environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return output

    def run(self, line: str) -> "subprocess.CompletedProcess[str]":
        """Run a command line to its end."""
        return subprocess.run(
            ["sh", "-c", line], cwd=self.clone, env=self._environment(), capture_output=True, text=True, check=False
        )

    def said(self) -> str:
        """Return everything that its terminals show."""
        return "\n".join(output.read_text(encoding="utf-8", errors="replace") for output in self.outputs)

    def close(self) -> None:
        """Press Ctrl-C in every terminal; kill what does not heed it."""
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(REPOSITORY / part) for part in (".", "node", "coordinator", "sim", "benchmarks")])
        return os.environ | {
            "HOME": str(self.home), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "PATH": f"{self.clone / '.venv' / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[dict[str, Machine]]:
    machines = {name: Machine(name, folder) for name in ("A", "B")}
    try:
        yield machines
    finally:
        for machine in machines.values():
            machine.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def fill_in(line: str, *, port: int, join: str | None) -> str:
    """Put in what the page says is the reader's own."""
    line = line.replace("0.0.0.0:7470", f"127.0.0.1:{port}").replace("192.0.2.2:7470", f"127.0.0.1:{port}")
    line = line.replace("192.0.2.2", "127.0.0.1")
    if join is not None:
        for flag in ("--fingerprint", "--token"):
            ours = re.search(rf"{flag} (\S+)", join)
            assert ours, f"the coordinator's line has no {flag}: {join}"
            line = re.sub(rf"{flag} \S+\.\.\.\S+", f"{flag} {ours[1]}", line)
    assert "..." not in line, f"nobody says what stands for the dots in {line}"
    return line


def join_line(machine: Machine) -> str | None:
    """Return what the coordinator says that volunteers type, once it has."""
    found = re.search(r"^ *(peerturb node run .*)\n", machine.said(), re.MULTILINE)
    return found and found[1]


def wait_for(look: Callable[[], Found | None], machine: Machine) -> Found:
    """Return what a look finds at last; fail with what the machine's terminals show."""
    end_s = time.monotonic() + PATIENCE_S
    while (found := look()) is None:
        ended = [process.returncode for process in machine.processes if process.poll() not in (None, 0)]
        assert not ended, f"{machine.name}: a command ended with {ended}:\n{machine.said()[-3000:]}"
        assert time.monotonic() < end_s, f"{machine.name} never got there:\n{machine.said()[-3000:]}"
        time.sleep(0.2)
    return found
