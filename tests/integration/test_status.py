"""`peerturb status` in a script: whole words in a pipe, JSON, and an exit code for each way it can go."""

import json
from pathlib import Path

import pytest

from tests.integration.network import network, toy_run

pytestmark = pytest.mark.integration

NAME = "n" * 64


def test_scripts_get_whole_words_and_exit_codes(tmp_path: Path) -> None:
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text("open-sesame\n")
    wrong.write_text("shut-sesame\n")
    with network(tmp_path, toy_run()) as net:
        assert net.run("status", "--coordinator", "127.0.0.1:9").returncode == 5
        assert net.run("status", "--coordinator", "nonsense").returncode == 2
        net.start_coordinator("--token", str(token))
        node = net.start_node(NAME, "--token-file", str(token))
        node.wait_for_round(3)
        ask = ["status", "--coordinator", net.address]
        assert net.run(*ask, "--token-file", str(wrong)).returncode == 4
        shown = net.run(*ask, columns=80)
        assert shown.returncode == 0, shown.stderr
        (row,) = (line.split() for line in shown.stdout.splitlines() if NAME in line)
        assert row[:2] == ["0", NAME]
        assert row[3] == "connected"
        assert "\x1b" not in shown.stdout
        answer = json.loads(net.run(*ask, "--json").stdout)
        assert (answer["run"], answer["finished"], answer["fault"]) == ("toy", False, "")
        assert answer["round"] >= 3
        (peer,) = answer["peers"]
        assert (peer["slot"], peer["name"], peer["state"]) == (0, NAME, "connected")
        assert node.stop() == 0


def test_who_forgets_the_fingerprint_is_told_to_give_it(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        coordinator = net.start_coordinator("--keys", str(tmp_path / "keys"))
        asked = net.run("status", "--coordinator", net.address)
        join = ["node", "run", "--coordinator", net.address, "--compute", "toy"]
        joined = net.run(*join, "--state", str(tmp_path / "n"), "--wait-s", "1")
        assert coordinator.stop() == 0
    assert coordinator.errors == "", "handshakes that fail are no lines beside the log"
    for refused in (asked, joined):
        assert refused.returncode == 5
        assert "TLS" in refused.stderr
        assert "--fingerprint of its join command" in refused.stderr
