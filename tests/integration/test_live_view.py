"""The node's live view in a real terminal: it follows the size, and gives the terminal back. Plain lines elsewhere."""

from pathlib import Path

import pytest

from tests.integration.network import network, toy_run
from tests.pty_process import PtyProcess

pytestmark = pytest.mark.integration

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""The alternate screen, and the cursor."""


def test_the_view_follows_the_terminal_and_gives_it_back(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(probes=4_096)) as net:
        net.start_coordinator()
        line = ["node", "run", "--coordinator", net.address, "--state", str(tmp_path / "me"), "--compute", "toy"]
        with PtyProcess(line, folder=tmp_path, columns=80, rows=24) as terminal:
            terminal.wait_for("no end set")
            terminal.wait_for(r"╭[^\r\n]{78}╮")
            terminal.resize(120, 40)
            terminal.wait_for(r"╭[^\r\n]{118}╮")
            terminal.resize(60, 12)
            terminal.wait_for(r"╭[^\r\n]{58}╮")
            assert LEAVE not in terminal.shown
            terminal.interrupt()
            assert terminal.end() == 0, terminal.shown[-2_000:]
            shown = terminal.shown
            assert terminal.settings == terminal.before
    assert shown.count(ENTER) == shown.count(LEAVE) == 1
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    # The last picture stays on the screen that the terminal had before.
    assert "leaving: asked to stop (SIGINT)" in shown[shown.rindex(LEAVE) :]
    assert shown.endswith("╯\r\n")


def test_an_error_gives_the_terminal_back_too(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        line = ["node", "run", "--coordinator", net.address, "--state", str(tmp_path / "me"), "--data", "nothing.jsonl"]
        with PtyProcess(line, folder=tmp_path) as terminal:
            assert terminal.end() == 2
            shown = terminal.shown
            assert terminal.settings == terminal.before
    assert shown.count(ENTER) == shown.count(LEAVE) == 1
    assert "there is no data file nothing.jsonl" in shown[shown.rindex(LEAVE) :]


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=20)) as net:
        net.start_coordinator()
        done = net.run("node", "run", "--coordinator", net.address, "--state", str(tmp_path / "me"), "--compute", "toy")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "stopped after 20 rounds: the run is finished after 20 rounds" in done.stdout.splitlines()
    assert done.stderr == ""
