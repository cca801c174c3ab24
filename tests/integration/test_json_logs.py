"""The JSON log of a real run: every line can be read, says what, when and where, and says it once. No secrets in it."""

import json
import time
import urllib.request
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peerturb_coordinator.keys import make_keys
from peerturb_node.events import KINDS
from tests.integration.network import Network, Program, network, toy_run

pytestmark = pytest.mark.integration

FIRST = ["time", "level", "event", "run"]
OF_A_SLOT = {
    "joined", "behind", "training", "eval", "round", "stop", "leaving", "rebuild", "peer_joined", "peer_left",
    "peer_away", "peer_back",
}  # fmt: skip
OF_A_ROUND = {
    "training",
    "eval",
    "round",
    "stop",
    "leaving",
    "checkpoint",
    "peer_joined",
    "peer_left",
    "progress",
    "resumed",
}
FAST_PATH = {"measured", "round_sealed", "connecting"}
"""What happens so often that only `--verbose` or `--log-level debug` shows it."""


class Run:
    """A coordinator with TLS and a token, and nodes without `--verbose`, as an operator starts them."""

    def __init__(self, net: Network, folder: Path) -> None:
        self.net = net
        made = make_keys(folder / "keys", ["127.0.0.1"])
        self.secrets = [made.token, made.key.read_text().splitlines()[1]]
        self.serve = ["--tls-dir", str(folder / "keys"), "--token", str(made.token_file), "--http", "127.0.0.1:0"]
        self.join = ["--fingerprint", made.fingerprint, "--token-file", str(made.token_file), "--http", "127.0.0.1:0"]

    def node(self, name: str) -> Program:
        line = ["node", "run", "--coordinator", self.net.address, "--state", str(self.net.folder / name)]
        return self.net._start([*line, "--name", name, "--compute", "toy", "--json", *self.join], name)


def no_json(constant: str) -> None:
    """NaN and the infinities are Python's own."""
    pytest.fail(f"{constant} is no JSON")


def await_attempts(node: Program, count: int) -> None:
    """Wait until a node has failed to connect so often."""
    address, end_s = node.of("monitor")[0]["address"], time.monotonic() + 60
    while True:
        page = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
        (line,) = (line for line in page.splitlines() if line.startswith("peerturb_disconnects_total"))
        if float(line.split()[1]) >= count:
            return
        assert time.monotonic() < end_s, line
        time.sleep(0.1)


def lines_of(program: Program) -> list[dict[str, Any]]:
    """Every line a program wrote, each checked by itself; standard error must be empty."""
    assert program.errors == ""
    for line in program.lines:
        event = json.loads(line, parse_constant=no_json)
        assert list(event)[:4] == FIRST, line
        assert datetime.fromisoformat(event["time"]).utcoffset() is not None
        assert event["level"] in ("debug", "info", "warning", "error")
        assert event["run"] == "toy" or event["event"] == "monitor", line  # which comes before the run is known
        if event["event"] in OF_A_SLOT:
            assert isinstance(event["slot"], int), line
        if event["event"] in OF_A_ROUND:
            assert isinstance(event["round"], int), line
    assert len(program.lines) == len(program.events)
    return program.events


def test_every_line_of_a_run_with_a_crash_can_be_read(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(deadline_ms=60_000, deadline_ms_max=60_000)) as net:
        run = Run(net, tmp_path)
        first = net.start_coordinator(*run.serve)
        nodes = [run.node("one"), run.node("two")]
        for node in nodes:
            node.wait_for(lambda event: event["event"] == "training", what="training")
            node.wait_for_round(10)
        first.kill()
        for node in nodes:
            node.wait_for(lambda event: event["event"] == "disconnected", what="the crash")
        for node in nodes:
            await_attempts(node, 5)  # which must not all be told
        second = net.start_coordinator(*run.serve)
        for node in nodes:
            node.wait_for(lambda event: event["event"] == "joined" and event["position"] > 5, what="a second session")
            node.wait_for_round(node.of("round")[-1]["round"] + 10)
        assert [node.stop() for node in nodes] == [0, 0]
        assert second.stop() == 0
    for node in nodes:
        events = lines_of(node)
        assert FAST_PATH & {event["event"] for event in events} == set()
        for event in events:
            assert set(KINDS[event["event"]].split()) <= set(event), event
        repeated = Counter(json.dumps({**event, "time": ""}, sort_keys=True) for event in events)
        assert repeated.most_common(1)[0][1] == 1, "the same line twice"
        assert 1 <= sum(event["event"] == "disconnected" for event in events) <= 4
        times = [event["time"] for event in events]
        assert times == sorted(times)
        rounds = [datetime.fromisoformat(event["time"]).timestamp() for event in events if event["event"] == "round"]
        assert all(later - sooner >= 0.999 for sooner, later in pairwise(rounds))
    told = lines_of(first) + lines_of(second)
    assert {event["event"] for event in told} >= {"serving", "peer_joined", "peer_left", "stopping", "stopped"}
    assert sorted(event["name"] for event in told if event["event"] == "peer_back") == ["one", "two"]
    assert not [event for event in told if event["event"] == "peer_away"], "they said goodbye"
    assert FAST_PATH & {event["event"] for event in told} == set()
    everything = "".join(line for program in (first, second, *nodes) for line in program.lines)
    for secret in run.secrets:
        assert secret not in everything


def test_a_killed_node_is_said_to_be_away_and_back(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(deadline_ms=60_000, deadline_ms_max=60_000, lease_ms=60_000)) as net:
        coordinator = net.start_coordinator()
        net.start_node("one").wait_for_round(3)
        two = net.start_node("two")
        two.wait_for_round(two.wait_for(lambda event: event["event"] == "training")["round"] + 2)
        two.kill()
        away = coordinator.wait_for(lambda event: event["event"] == "peer_away")
        assert net.start_node("two").wait_for(lambda event: event["event"] == "behind")["rounds"] > 0
        back = coordinator.wait_for(lambda event: event["event"] == "peer_back")
        assert (away["slot"], away["name"]) == (back["slot"], back["name"]) == (1, "two")
        assert away["lease_s"] == 60
        assert [event["name"] for event in coordinator.of("peer_joined")] == ["one", "two"]


def test_details_are_lines_of_the_same_form(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=12)) as net:
        coordinator = net.start_coordinator("--log-level", "debug")
        node = net.start_node("one")  # with --verbose
        assert node.wait() == 0
        assert coordinator.stop() == 0
    events = lines_of(node)
    assert [event["round"] for event in events if event["event"] == "round"] == list(range(1, 13))
    assert {event["level"] for event in events if event["event"] == "measured"} == {"debug"}
    sealed = [event for event in lines_of(coordinator) if event["event"] == "round_sealed"]
    assert [event["round"] for event in sealed] == list(range(12))


def test_an_error_is_a_line_too(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        node = net._start(
            ["node", "run", "--coordinator", net.address, "--state", str(tmp_path / "s"), "--json"], "no data"
        )  # fmt: skip
        assert node.wait() == 2
    (error,) = node.of("error")
    assert (error["level"], error["run"]) == ("error", "toy")
    assert "--data" in error["message"]
