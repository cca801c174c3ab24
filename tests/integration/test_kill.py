"""`kill -9` of anything at any moment: rounds go on, nothing announced is lost, nothing is applied twice."""

import random
import time
from pathlib import Path

import pytest

from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from tests.integration.network import Network, Program, assert_digests_agree, network, toy_run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DEADLINE_MS = 2_000
KILLS = 100
NODES = 3


def test_a_killed_node_costs_one_deadline_at_most(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(deadline_ms=DEADLINE_MS, lease_ms=3_600_000)) as net:
        net.start_coordinator()
        nodes = [net.start_node(f"node{index}") for index in range(NODES)]
        for node in nodes:
            node.wait_for(lambda e: e["event"] == "round" and e["own"])
        rng = random.Random(5)
        for attempt in range(6):
            victim = nodes[1 + attempt % (NODES - 1)]
            time.sleep(rng.uniform(0.0, 0.05))
            victim.kill()
            before = max(nodes[0].digests())
            # A dead peer's session ends with its connection, so rounds go on without waiting for its lease.
            nodes[0].wait_for_round(before + 20, timeout_s=DEADLINE_MS / 1e3 + 20)
            nodes[1 + attempt % (NODES - 1)] = again = net.start_node(victim.label)
            again.wait_for(lambda e: e["event"] == "round" and e["own"])
        assert _stop_all(net, nodes) == [0] * NODES
        _check(net, nodes, [program for program in net.programs if program is not net.coordinator])


def test_a_frozen_node_costs_its_deadline_only(tmp_path: Path) -> None:
    """A node that hangs keeps its connection: the round seals without it, at the deadline."""
    with network(tmp_path, toy_run(deadline_ms=500, deadline_ms_max=500)) as net:
        net.start_coordinator()
        nodes = [net.start_node(f"node{index}") for index in range(NODES)]
        for node in nodes:
            node.wait_for(lambda e: e["event"] == "round" and e["own"])
        frozen = nodes[-1]
        frozen.process.send_signal(19)  # SIGSTOP
        before = max(nodes[0].digests())
        nodes[0].wait_for_round(before + 10)
        frozen.process.send_signal(18)  # SIGCONT
        frozen.wait_for(lambda e: e["event"] == "round" and e["own"] and e["round"] > before + 10)
        assert _stop_all(net, nodes) == [0] * NODES
        _check(net, nodes, nodes)


@pytest.mark.timeout(1_200)
def test_the_coordinator_is_killed_a_hundred_times(tmp_path: Path) -> None:
    rng = random.Random(20_261_123)
    with network(tmp_path, toy_run(deadline_ms=DEADLINE_MS)) as net:
        nodes: list[Program] = []
        for kill in range(KILLS):
            coordinator = net.start_coordinator()
            if not nodes:
                nodes = [net.start_node(f"node{index}") for index in range(NODES)]
            # Some kills hit the start, most the running network.
            if kill % 4:
                sealed = _sealed(nodes)
                nodes[kill % NODES].wait_for_round(sealed + 1)
            time.sleep(rng.uniform(0.0, 0.15))
            coordinator.kill()
            assert all(node.process.poll() is None for node in nodes), "a node died of its coordinator's death"
        coordinator = net.start_coordinator()
        end = _sealed(nodes) + 10
        for node in nodes:
            node.wait_for_round(end)
        assert _stop_all(net, nodes) == [0] * NODES
        _check(net, nodes, nodes)
        assert all(node.of("stop")[0]["round"] > KILLS // 2 for node in nodes)


def _sealed(nodes: list[Program]) -> int:
    """Return the newest round that any node has seen."""
    return max((number for node in nodes for number in node.digests()), default=0)


def _stop_all(net: Network, nodes: list[Program]) -> list[int]:
    codes = [node.stop() for node in nodes]
    assert net.coordinator is not None
    assert net.coordinator.stop() == 0
    return codes


def _check(net: Network, nodes: list[Program], everybody: list[Program]) -> None:
    """Compare what nodes saw with what the coordinator kept.

    The log is legal (so no round stands twice), every node's local log is its beginning (so nothing announced is lost),
    every node applied each round once, in order, and all reported equal weights.
    """
    path = net.export_log()
    verify(path)
    sealed = [record.round for record in read_records(path) if isinstance(record, RoundSealed)]
    assert sealed == list(range(len(sealed)))
    for node in nodes:
        assert path.read_bytes().startswith(net.local_log(node.label).read_bytes()), node.label
    for program in everybody:
        applied = [event["round"] for event in program.of("round")]
        assert applied == list(range(applied[0], applied[0] + len(applied))), program.label
        assert max(program.digests()) <= len(sealed)
    programs = [program for program in everybody if program.of("round")]
    assert assert_digests_agree(*programs) > 10
