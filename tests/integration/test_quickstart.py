"""A newcomer who types the quick start's commands, and only those, has two nodes training: at most five commands."""

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import read_records
from scripts import setup
from tests.conftest import REPOSITORY
from tests.integration.newcomer import Machine, fill_in, free_port, join_line, two_machines, wait_for
from tests.unit.test_docs import check_command

pytestmark = [pytest.mark.slow, pytest.mark.integration]

PAGE = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
ROUNDS = 5
"""In which both nodes' measurements are, before the test believes that two nodes are training."""


def lines_of(block: str) -> list[str]:
    """Return a block's command lines, continued ones joined."""
    joined = re.sub(r" *\\\n *", " ", block)
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def steps() -> list[tuple[str, str]]:
    """Return (machine, command line) in the order of the page; a command for both machines counts twice."""
    found = []
    for heading, body in re.findall(r"^## (\d.*?)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        machines = re.findall(r"\bOn ([AB])\b|\bon ([AB])\b", heading)
        for block in re.findall(r"^```sh\n(.*?)^```$", body, re.MULTILINE | re.DOTALL):
            found += [(first or second, line) for line in lines_of(block) for first, second in machines]
    return found


def test_there_are_five_commands_at_most_and_no_others_on_the_page() -> None:
    assert 0 < len(steps()) <= 5
    assert {machine for machine, _ in steps()} == {"A", "B"}
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert {line for _, line in steps()} == {line for block in blocks for line in lines_of(block)}


def install(line: str) -> None:
    """Run the command where it changes nothing: in a checkout whose environment, this test's, is up to date.

    Elsewhere it would install gigabytes, or rewrite the environment under the tests; make then only says what it would.
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
