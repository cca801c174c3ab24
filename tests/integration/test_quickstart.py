"""A newcomer who types the quick start's commands, and only those, has two nodes training: at most five commands.

The two machines are two folders of this one: each has a clone (of links) and a home of its own. Only what a reader is
told to replace is replaced: A's address and port, and the fingerprint and token that the coordinator prints.
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
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import read_records
from scripts import setup
from tests.conftest import REPOSITORY
from tests.unit.test_docs import check_command

pytestmark = [pytest.mark.slow, pytest.mark.integration]

Found = TypeVar("Found")

PAGE = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
PATIENCE_S = 200.0
ROUNDS = 5
"""In which both nodes' measurements are, before the test believes that two nodes are training."""


def steps() -> list[tuple[str, str]]:
    """Return (machine, command line) in the order of the page; a command for both machines counts twice."""
    found = []
    for heading, body in re.findall(r"^## (\d.*?)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        machines = re.findall(r"\bOn ([AB])\b|\bon ([AB])\b", heading)
        for block in re.findall(r"^```sh\n(.*?)^```$", body, re.MULTILINE | re.DOTALL):
            lines = [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
            found += [(first or second, line) for line in lines for first, second in machines]
    return found


def test_there_are_five_commands_at_most_and_no_others_on_the_page() -> None:
    assert 0 < len(steps()) <= 5
    assert {machine for machine, _ in steps()} == {"A", "B"}
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert {line for _, line in steps()} == {line for block in blocks for line in block.strip().splitlines()}


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
        path = os.pathsep.join([str(REPOSITORY / part) for part in (".", "node", "coordinator", "sim", "benchmarks")])
        environment = os.environ | {
            "HOME": str(self.home), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with output.open("wb") as out:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {line}"], cwd=self.clone, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return output

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


def install(line: str) -> None:
    """Run the command where it changes nothing: in a checkout whose environment, this test's, is up to date.

    Elsewhere it would install gigabytes, or rewrite the environment under the tests: there make only says what it would.
    """
    environment = REPOSITORY / ".venv"
    is_current = Path(sys.prefix) == environment and any(
        setup.read(environment / f".ready-{extra}") == setup.fingerprint(environment) for extra in setup.EXTRAS
    )
    words = shlex.split(line)
    command = words if is_current else [words[0], "--dry-run", *words[1:]]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)


def joined_rounds(machine: Machine) -> list[RoundSealed]:
    """Return the sealed rounds with two contributions in the log that a machine's node keeps."""
    logs = list(machine.home.glob(".peerturb/node/run-*/local.runlog"))
    records = read_records(logs[0]) if logs else iter(())
    return [record for record in records if isinstance(record, RoundSealed) and len(record.slots) == 2]


def has_joined_rounds(machine: Machine) -> bool | None:
    return len(joined_rounds(machine)) >= ROUNDS or None


def join_line(machine: Machine) -> str | None:
    """Return what the coordinator says that volunteers type, once it has."""
    found = re.search(r"^ *(peerturb node run .*)\n", machine.said(), re.MULTILINE)
    return found and found[1]


def test_the_commands_of_the_quick_start_train_on_two_machines(tmp_path: Path) -> None:
    port, join = free_port(), None
    with two_machines(tmp_path) as machines:
        for name, line in steps():
            if line.startswith("make "):
                install(line)
                continue
            check_command(shlex.split(line)[1:], is_whole=True)
            machines[name].type(fill_in(line, port=port, join=join))
            if " serve " in line:
                join = wait_for(partial(join_line, machines[name]), machines[name])
                # The line is the one that the page lets both type.
                typed = [other.replace(".venv/bin/", "") for _, other in steps() if " node run " in other]
                shapes = {re.sub(r"(--fingerprint|--token|--data|--coordinator) \S+", r"\1 _", text) for text in typed}
                assert shapes == {re.sub(r"(--\S+) \S+", r"\1 _", join.strip())}
        for machine in machines.values():
            wait_for(partial(has_joined_rounds, machine), machine)
        one, two = (joined_rounds(machine) for machine in machines.values())
        assert one[:ROUNDS] == two[:ROUNDS]
        assert all(min(record.counts) > 0 for record in one)
        digests = [dict(re.findall(r"^round +(\d+) .* digest (\w+)", m.said(), re.M)) for m in machines.values()]
        both = digests[0].keys() & digests[1].keys()
        assert all(digests[0][number] == digests[1][number] for number in both)


def wait_for(look: Callable[[], Found | None], machine: Machine) -> Found:
    """Return what a look finds at last; fail with what the machine's terminals show."""
    end_s = time.monotonic() + PATIENCE_S
    while (found := look()) is None:
        ended = [process.returncode for process in machine.processes if process.poll() not in (None, 0)]
        assert not ended, f"{machine.name}: a command ended with {ended}:\n{machine.said()[-3000:]}"
        assert time.monotonic() < end_s, f"{machine.name} never got there:\n{machine.said()[-3000:]}"
        time.sleep(0.2)
    return found
