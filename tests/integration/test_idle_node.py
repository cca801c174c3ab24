"""`peerturb node run --idle` with real processes: it gives way to a real hog and to a battery, and comes back."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from peerturb.protocol.records import LeaveReason, PeerJoined, PeerLeft
from peerturb.runlog.reader import read_records
from peerturb_node.idle.sampling import CpuLoad
from tests.integration.network import assert_digests_agree, network, toy_run
from tests.power_supply import power_supply

pytestmark = pytest.mark.integration

ON_BATTERY = "import sys, psutil._pslinux as p; p.POWER_SUPPLY_PATH = {folder!r}; from peerturb.cli import main; main()"
QUICK = ("--idle-pause-s", "1", "--idle-resume-s", "1")


@contextmanager
def hogs() -> Iterator[None]:
    """Keep every core busy with processes that are none of the run's."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def skip_if_busy() -> None:
    """Skip where this machine does other work than the tests': what a hog begins and ends could not be told from it."""
    load = CpuLoad()
    time.sleep(2)
    if (percent := load.percent()) > 30:
        pytest.skip(f"other work uses {percent:.0f} % of this machine")


def test_a_node_gives_way_to_a_hog_and_comes_back(tmp_path: Path) -> None:
    skip_if_busy()
    # Many probes a round: the node's own work is nearly all there is.
    with network(tmp_path, toy_run(probes=4_096)) as net:
        coordinator = net.start_coordinator()
        node = net.start_node("one", "--idle", "--idle-pause-percent", "50", "--idle-resume-percent", "40", *QUICK)
        node.wait_for(lambda event: event["event"] == "round" and event["own"], what="a round of its own")
        with hogs():
            paused = node.wait_for(lambda event: event["event"] == "paused", what="a pause")
        assert paused["reason"] == "cpu"
        assert paused["why"].startswith("other processes use ")
        try:
            resumed = node.wait_for(lambda event: event["event"] == "resumed", what="the end of the pause")
        except AssertionError:
            skip_if_busy()
            raise
        node.wait_for(
            lambda event: event["event"] == "round" and event["own"] and event["time"] > resumed["time"],
            what="a round of its own after the pause",
        )
        assert node.stop() == coordinator.stop() == 0


@pytest.mark.skipif(not psutil.LINUX, reason="the battery is read from Linux's sysfs")
def test_on_battery_a_node_is_not_missed_and_catches_up_afterwards(tmp_path: Path) -> None:
    supply = tmp_path / "supply"
    power_supply(supply, online=True)
    # A load of a whole machine never pauses this node: only the battery does.
    never = ("--idle-pause-percent", "100", "--idle-resume-percent", "99.9", "--idle-pause-s", "1000")
    entry = ("-c", ON_BATTERY.format(folder=str(supply)))
    with network(tmp_path, toy_run(deadline_ms=60_000, deadline_ms_max=60_000)) as net:
        coordinator = net.start_coordinator()
        stayer = net.start_node("stayer")
        laptop = net.start_node(
            "laptop", "--idle", *never, "--idle-resume-s", "1", "--http", "127.0.0.1:0", entry=entry
        )  # fmt: skip
        laptop.wait_for(lambda event: event["event"] == "round" and event["own"], what="a round of its own")
        power_supply(supply, online=False)
        paused = laptop.wait_for(lambda event: event["event"] == "paused", what="a pause")
        assert (paused["reason"], paused["why"]) == ("battery", "the computer runs on battery")
        # Deadlines are a minute long: rounds go on only because nobody waits for a peer that said goodbye.
        stayer.wait_for_round(stayer.of("round")[-1]["round"] + 3)
        metrics = urllib.request.urlopen(f"http://{laptop.of('monitor')[0]['address']}/metrics").read().decode()
        assert "\npeerturb_paused 1.0" in metrics
        assert '\npeerturb_pauses_total{reason="battery"} 1.0' in metrics
        assert "\npeerturb_disconnects_total 0.0" in metrics
        power_supply(supply, online=True)
        resumed = laptop.wait_for(lambda event: event["event"] == "resumed", what="the end of the pause")
        again = laptop.wait_for(
            lambda event: event["event"] == "round" and event["own"] and event["time"] > resumed["time"],
            what="a round of its own after the pause",
        )
        stayer.wait_for_round(again["round"])
        assert laptop.stop() == stayer.stop() == coordinator.stop() == 0
        records = list(read_records(net.export_log()))
    assert assert_digests_agree(stayer, laptop) > 5
    slots = [event["slot"] for event in laptop.of("joined")]
    assert len(slots) == 2
    assert slots[0] == slots[1]
    assert [record.slot for record in records if isinstance(record, PeerJoined)].count(slots[0]) == 2
    left = [record for record in records if isinstance(record, PeerLeft) and record.slot == slots[0]]
    assert {record.reason for record in left} == {LeaveReason.LEFT}
    assert not [event for event in coordinator.events if event["event"] in ("lagging", "refused")]
    assert not [event for event in laptop.of("refused") if event["code"] != "stale_round"]
    assert not laptop.of("disconnected")


def test_a_paused_node_leaves_at_a_signal(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(probes=4_096)) as net:
        net.start_coordinator()
        node = net.start_node("one", "--idle", "--idle-pause-percent", "50", "--idle-resume-percent", "0", *QUICK)
        node.wait_for_round(1)
        with hogs():
            node.wait_for(lambda event: event["event"] == "paused", what="a pause")
        assert node.stop() == 0
        assert node.of("stop")[0]["why"] == "left"
        assert node.of("checkpoint")
