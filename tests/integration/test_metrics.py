"""Metrics of real processes: everything documented is there with sane values, through a kill and a restart."""

import math
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.network import Network, Program, network, toy_run
from tests.integration.scraping import Figures, await_figures, get, prometheus, scraping, until

pytestmark = pytest.mark.integration


def documented(section: str) -> set[str]:
    """Return the names that docs/metrics.md has for coordinator or node."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([a-z_]+)` \|", part, re.MULTILINE))


def shown(figures: Figures) -> set[str]:
    """Return the metrics' names, those of histograms without their endings."""
    names = {name.partition("{")[0] for name in figures if not name.partition("{")[0].endswith("_created")}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def serving(run: Network, *, address: str = "127.0.0.1:0") -> str:
    coordinator = run.start_coordinator("--http", address)
    return str(coordinator.wait_for(lambda event: event["event"] == "serving")["http"])


def monitored(run: Network, name: str) -> tuple[Program, str]:
    node = run.start_node(name, "--http", "127.0.0.1:0")
    return node, str(node.wait_for(lambda event: event["event"] == "monitor")["address"])


def test_a_run_of_three_has_every_documented_figure_and_survives_kills(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(deadline_ms=400, deadline_ms_max=800, lease_ms=60_000)) as run:
        coordinator = serving(run)
        ann, at_ann = monitored(run, "ann")
        for name in ("bob", "cid"):
            monitored(run, name)
        before = await_figures(
            coordinator, lambda f: f["peerturb_round"] > 30 and f['peerturb_peers{state="connected"}'] == 3
        )
        assert shown(before) == documented("Coordinator")
        assert get(coordinator, "/readyz") == (200, "ready\n")
        _is_sane(before)
        node = await_figures(at_ann, lambda f: f["peerturb_round"] > 30)
        assert shown(node) == documented("Node")
        assert get(at_ann, "/readyz") == (200, "ready\n")
        assert node["peerturb_training"] == node["peerturb_connected"] == 1
        assert node["peerturb_apply_seconds_count"] >= 30
        assert node['peerturb_rounds_applied_total{own="yes"}'] > 10
        assert node["peerturb_probes_total"] >= 16 * node['peerturb_rounds_applied_total{own="yes"}']
        assert node["peerturb_loss"] < 1

        ann.kill()
        away = await_figures(coordinator, lambda f: f['peerturb_peers{state="away"}'] == 1)
        assert away["peerturb_sessions"] == 2
        _never_falls(before, away)
        ann, at_ann = monitored(run, "ann")
        back = await_figures(coordinator, lambda f: f['peerturb_peers{state="connected"}'] == 3)
        assert back['peerturb_peers{state="away"}'] == 0
        _never_falls(away, back)

        assert run.coordinator is not None
        run.coordinator.kill()
        at_ann_lost = await_figures(at_ann, lambda f: f["peerturb_connected"] == 0)
        assert at_ann_lost["peerturb_disconnects_total"] >= 1
        status, why = get(at_ann, "/readyz")
        assert status == 503
        assert why.startswith("not connected: ")
        coordinator = serving(run)
        again = await_figures(
            coordinator,
            lambda f: f["peerturb_round"] > back["peerturb_round"] + 5 and f['peerturb_peers{state="connected"}'] == 3,
        )
        for name in ("peerturb_round", "peerturb_probes_total", "peerturb_log_records"):
            assert again[name] > back[name], "what follows from the log goes on"
        assert (
            sum(again[f'peerturb_seal_total{{reason="{reason}"}}'] for reason in ("everyone", "deadline"))
            < (again["peerturb_round"])
        ), "what a process counts begins anew"
        _is_sane(again)
        await_figures(at_ann, lambda f: f["peerturb_training"] == 1)


def _is_sane(figures: Figures) -> None:
    assert figures["peerturb_probes_total"] >= 16 * figures["peerturb_round"]
    sealed = sum(figures[f'peerturb_seal_total{{reason="{reason}"}}'] for reason in ("everyone", "deadline"))
    assert sealed - 1 <= figures["peerturb_round_duration_seconds_count"] <= sealed, "one may be older than the process"
    assert 0 < figures["peerturb_round_duration_seconds_sum"] < 60 * sealed
    assert figures["peerturb_log_records"] >= 2 * figures["peerturb_round"]
    assert figures["peerturb_log_writable"] == 1
    assert figures["peerturb_log_disk_free_bytes"] > 1e6
    assert figures["peerturb_codes_void_total"] == figures["peerturb_digest_mismatch_total"] == 0
    assert figures["peerturb_finished"] == figures["peerturb_diverging"] == figures["peerturb_rounds_wanted"] == 0
    assert 0 <= figures["peerturb_round_open_seconds"] < 60
    assert 0.4 <= figures["peerturb_round_deadline_seconds"] <= 0.8
    assert math.isfinite(figures["peerturb_loss"])
    up = figures['peerturb_bytes_total{direction="up",kind="contribution"}']
    assert up >= figures['peerturb_messages_total{direction="up",kind="contribution"}'] * (16 + 14)
    assert figures['peerturb_bytes_total{direction="down",kind="records"}'] > up / 2
    assert figures["process_resident_memory_bytes"] < 200e6


def _never_falls(before: Figures, after: Figures) -> None:
    for name, value in before.items():
        if re.search(r"_(total|count|bucket)(\{|$)", name):
            assert after[name] >= value, name


@pytest.mark.parametrize("program", ["coordinator", "node"])
def test_an_address_that_is_taken_is_said_before_anything_begins(program: str, tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as run:
        taken = serving(run)
        if program == "node":
            done = run.run("node", "run", "--coordinator", run.address, "--compute", "toy", "--http", taken,
                           "--state", str(tmp_path / "n"))  # fmt: skip
        else:
            done = run.run("coordinator", "serve", str(run.run_file), "--listen", "127.0.0.1:0", "--http", taken,
                           "--data-dir", str(tmp_path / "other"))  # fmt: skip
        assert done.returncode == 5
        assert f"cannot serve HTTP on {taken}" in done.stderr
        assert "choose another --http" in done.stderr


@pytest.mark.slow
def test_a_real_prometheus_understands_it_and_rates_go_on_over_a_kill(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with network(tmp_path, toy_run(deadline_ms=400, deadline_ms_max=800)) as run:
        coordinator = serving(run)
        _, at_node = monitored(run, "ann")
        await_figures(coordinator, lambda f: f["peerturb_round"] > 5)
        with prometheus(tmp_path / "p", scraping({"coordinator": coordinator, "node": at_node})) as ask:
            for address in (coordinator, at_node):
                text = get(address, "/metrics")[1]
                command = ["promtool", "check", "metrics"]
                checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
                assert checked.returncode == 0, checked.stderr
            seals = "sum by (job) (rate(peerturb_seal_total[3s]))"
            until(lambda: ask("up") == {"coordinator": 1, "node": 1} and ask(seals).get("coordinator", 0) > 1)
            before = ask("peerturb_probes_total")
            assert run.coordinator is not None
            run.coordinator.kill()
            until(lambda: ask("up").get("coordinator") == 0 and ask("peerturb_connected").get("node") == 0)
            assert serving(run, address=coordinator) == coordinator
            until(lambda: ask("up").get("coordinator") == 1 and ask(seals).get("coordinator", 0) > 1)
            assert ask("resets(peerturb_probes_total[1m])")["coordinator"] == 0, "it follows from the log"
            assert ask("min by (job) (rate(peerturb_probes_total[1m]))")["coordinator"] > 0
            assert ask("peerturb_probes_total")["coordinator"] > before["coordinator"]
            until(lambda: ask("peerturb_training").get("node") == 1)
