"""Backup while the coordinator runs, its disk lost, a restore: the run goes on from the newest log there is."""

import shutil
from pathlib import Path

import pytest

from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from tests.integration.network import Network, Program, assert_digests_agree, network, toy_run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def backed_up(net: Network, nodes: list[Program]) -> Path:
    """Back up in mid-run, let the run go on, then kill the coordinator and lose its disk."""
    coordinator = net.start_coordinator()
    nodes += [net.start_node(f"node{index}") for index in range(2)]
    for node in nodes:
        node.wait_for_round(20)
    backup = net.folder / "backup.runlog"
    done = net.run("log", "export", str(net.data_dir), "--out", str(backup))
    assert done.returncode == 0, done.stderr
    for node in nodes:
        node.wait_for_round(verify(backup).ledger.sealed_rounds + 20)
    coordinator.kill()
    shutil.rmtree(net.data_dir)
    return backup


def test_a_nodes_log_brings_back_what_the_backup_lacks(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        nodes: list[Program] = []
        backup = backed_up(net, nodes)
        logs = [str(backup), *(str(net.local_log(node.label)) for node in nodes)]
        done = net.run("coordinator", "restore", *logs, "--data-dir", str(net.data_dir))
        assert done.returncode == 0, done.stderr
        assert "peerturb coordinator serve RUN.toml --data-dir" in done.stdout
        before = max(max(node.digests()) for node in nodes)
        net.start_coordinator()
        for node in nodes:
            node.wait_for_round(before + 20)
        late = net.start_node("late")
        late.wait_for_round(before + 20)
        assert [node.stop() for node in (*nodes, late)] == [0, 0, 0]
        assert net.coordinator is not None
        assert net.coordinator.stop() == 0
        whole = net.export_log()
        verify(whole)
        old, new = list(read_records(backup)), list(read_records(whole))
        assert new[: len(old)] == old
        assert assert_digests_agree(*nodes, late) > 40


def test_from_the_backup_alone_the_run_goes_on_at_its_last_round(tmp_path: Path) -> None:
    """What came after the backup is lost; nodes notice, keep their logs aside, and make their weights anew."""
    with network(tmp_path, toy_run()) as net:
        nodes: list[Program] = []
        backup = backed_up(net, nodes)
        rounds = verify(backup).ledger.sealed_rounds
        before = nodes[0].digests()
        assert max(before) > rounds
        done = net.run("coordinator", "restore", str(backup), "--data-dir", str(net.data_dir))
        assert done.returncode == 0, done.stderr
        again = net.run("coordinator", "restore", str(backup), "--data-dir", str(net.data_dir))
        assert again.returncode == 3
        assert "holds a run already" in again.stderr
        net.start_coordinator()
        for node in nodes:
            notice = node.wait_for(lambda e: e.get("code") == "log_set_aside", what="its log set aside")
            assert "restored from an older copy" in notice["text"]
        # Their round events of before and after carry the same numbers: what follows is told by programs started anew.
        assert [node.stop() for node in nodes] == [0, 0]
        nodes = [net.start_node(node.label) for node in nodes] + [net.start_node("fresh")]
        for node in nodes:
            node.wait_for_round(rounds + 20)
        assert assert_digests_agree(*nodes) > 5
        assert [node.stop() for node in nodes] == [0, 0, 0]
        assert net.coordinator is not None
        assert net.coordinator.stop() == 0
        whole, old = list(read_records(net.export_log())), list(read_records(backup))
        assert whole[: len(old)] == old
        for node in nodes[:2]:
            (kept,) = (net.folder / node.label).glob("run-*/local.runlog.bad-1")
            assert verify(kept).ledger.sealed_rounds > rounds
