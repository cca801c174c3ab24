"""One coordinator and a few nodes as real processes, on the toy compute: joining, leaving, rejoining, refusals."""

import signal
import time
from pathlib import Path

import pytest

from peerturb.protocol.records import LeaveReason, PeerJoined, PeerLeft, RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from tests.integration.network import assert_digests_agree, network, toy_run

pytestmark = pytest.mark.integration


def test_a_run_goes_from_start_to_end(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=60)) as net:
        coordinator = net.start_coordinator()
        nodes = [net.start_node(f"node{i}") for i in range(3)]
        assert [node.wait() for node in nodes] == [0, 0, 0]
        assert coordinator.stop() == 0
        log = net.export_log()
        verified = verify(log)
        assert verified.ledger.is_finished
        assert assert_digests_agree(*nodes) >= 30
        stops = [node.of("stop")[0] for node in nodes]
        assert {stop["round"] for stop in stops} == {60}
        assert len({stop["digest"] for stop in stops}) == 1
        evaluations = nodes[0].of("eval")
        assert evaluations[-1]["loss"] < evaluations[0]["loss"]
        for index in range(3):
            # A node's local log is the beginning of the coordinator's, byte for byte.
            assert log.read_bytes().startswith(net.local_log(f"node{index}").read_bytes())


def test_sigterm_leaves_in_order_and_a_rejoin_keeps_its_slot(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        stayer = net.start_node("stayer")
        stayer.wait_for_round(3)
        guest = net.start_node("guest")
        slot = guest.wait_for(lambda e: e["event"] == "joined")["slot"]
        here = guest.wait_for(lambda e: e["event"] == "round" and e["own"])["round"]
        assert guest.stop() == 0
        assert guest.of("checkpoint")
        assert guest.of("stop")[0]["why"] == "left"
        stayer.wait_for_round(here + 20)
        again = net.start_node("guest")
        restored = again.wait_for(lambda e: e["event"] == "restored")
        assert restored["checkpoint"] == restored["round"] >= here
        assert again.wait_for(lambda e: e["event"] == "joined")["slot"] == slot
        again.wait_for(lambda e: e["event"] == "round" and e["own"])
        assert again.stop() == stayer.stop() == 0
        assert net.coordinator is not None
        assert net.coordinator.stop() == 0
        assert assert_digests_agree(stayer, guest, again) > 5
        records = list(read_records(net.export_log()))
        joins = [record.slot for record in records if isinstance(record, PeerJoined)]
        assert joins == [0, slot, slot]
        left = [record for record in records if isinstance(record, PeerLeft)]
        assert {record.reason for record in left} == {LeaveReason.LEFT}


def test_a_late_joiner_catches_up(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        first = net.start_node("first")
        first.wait_for_round(300)
        late = net.start_node("late")
        behind = late.wait_for(lambda e: e["event"] == "training")
        assert behind["round"] >= 300
        event = late.wait_for(lambda e: e["event"] == "round" and e["own"])
        first.wait_for_round(event["round"] + 1)
        applied = [event["round"] for event in late.of("round")]
        assert applied == list(range(1, len(applied) + 1))
        assert assert_digests_agree(first, late) > 0


def test_a_torn_or_damaged_local_state_is_made_whole_again(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        stayer = net.start_node("stayer")
        victim = net.start_node("victim", "--checkpoint-rounds", "20")
        victim.wait_for(lambda e: e["event"] == "checkpoint")
        victim.wait_for_round(50)
        victim.kill()
        log = net.local_log("victim")
        log.write_bytes(log.read_bytes()[:-5])
        torn = net.start_node("victim")
        torn.wait_for(lambda e: e["event"] == "notice" and e["code"] == "torn_tail")
        torn.wait_for(lambda e: e["event"] == "round" and e["own"])
        assert torn.stop() == 0
        (log.parent / "checkpoint.bin").write_bytes(b"nonsense")
        damaged = net.start_node("victim")
        damaged.wait_for(lambda e: e["event"] == "notice" and e["code"] == "checkpoint_set_aside")
        damaged.wait_for(lambda e: e["event"] == "round" and e["own"])
        damaged.kill()
        data = bytearray(log.read_bytes())
        data[len(data) // 2] ^= 1
        log.write_bytes(data)
        rebuilt = net.start_node("victim")
        rebuilt.wait_for(lambda e: e["event"] == "notice" and e["code"] == "log_set_aside")
        rebuilt.wait_for(lambda e: e["event"] == "round" and e["own"])
        assert rebuilt.stop() == 0
        assert (log.parent / "local.runlog.bad-1").exists()
        assert assert_digests_agree(stayer, victim, torn, damaged, rebuilt) > 50


def test_a_log_of_another_coordinator_is_set_aside(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        node = net.start_node("node")
        node.wait_for_round(30)
        node.kill()
        assert net.coordinator is not None
        net.coordinator.kill()
        net.data_dir = tmp_path / "another"
        net.start_coordinator()
        again = net.start_node("node")
        notice = again.wait_for(lambda e: e["event"] == "notice" and e["code"] == "log_set_aside")
        assert "fetched again" in notice["text"]
        again.wait_for(lambda e: e["event"] == "joined")
        number = again.wait_for(lambda e: e["event"] == "round" and e["own"] and e["time"] > notice["time"])["round"]
        assert number >= 1
        assert (net.local_log("node").parent / "local.runlog.bad-1").exists()


def test_the_coordinator_may_come_late_and_go(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        coordinator = net.start_coordinator()
        node = net.start_node("node")
        number = node.wait_for_round(5)["round"]
        coordinator.kill()
        node.wait_for(lambda e: e["event"] == "disconnected")
        net.start_coordinator()
        node.wait_for_round(number + 50)
        assert [event["round"] for event in node.of("round")] == list(range(1, len(node.of("round")) + 1))


def test_a_stub_network_exchanges_codes(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=30)) as net:
        coordinator = net.start_coordinator()
        nodes = [net.start_node(f"node{i}", compute="stub") for i in range(2)]
        assert [node.wait() for node in nodes] == [0, 0]
        assert_digests_agree(*nodes)
        assert coordinator.stop() == 0
        sealed = [record for record in read_records(net.export_log()) if isinstance(record, RoundSealed)]
        assert len(sealed) == 30
        assert sum(len(record.codes) for record in sealed) == nodes[0].of("stop")[0]["codes_down"]


SLOW_EXPORT = """
import sys, time
from pathlib import Path
from peerturb import cli
from peerturb_node.compute.toy import ToyCompute

def export(self, folder: Path) -> None:
    (folder / "begun").touch()
    while not (folder / "go-on").exists():
        time.sleep(0.01)
    (folder / "whole").touch()

ToyCompute.export = export
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("rounds", [3, 0], ids=["the run ends", "the node is asked to leave"])
def test_sigterm_during_the_export_waits_for_its_end(tmp_path: Path, rounds: int) -> None:
    script, out = tmp_path / "slow_export.py", tmp_path / "model"
    script.write_text(SLOW_EXPORT, encoding="utf-8")
    out.mkdir()
    with network(tmp_path, toy_run(count=rounds)) as net:
        net.start_coordinator()
        node = net.start_node("node", "--export", str(out), entry=[str(script)])
        node.wait_for_round(3)
        if not rounds:
            node.process.send_signal(signal.SIGTERM)
        end_s = time.monotonic() + 60
        while not (out / "begun").exists():
            assert time.monotonic() < end_s, node.errors
            time.sleep(0.01)
        for count in (1, 2):
            node.process.send_signal(signal.SIGTERM)
            while sum(event.get("code") == "stop_held_off" for event in list(node.events)) < count:
                assert time.monotonic() < end_s, node.errors
                time.sleep(0.01)
        assert node.process.poll() is None
        (out / "go-on").touch()
        assert node.wait() == 0
        assert (out / "whole").exists()
        assert node.of("export")
