"""What deploy/ starts runs: each way's own commands, stopped, killed and started again; the run goes on.

No container and no systemd is involved: the processes are those that they would start.
"""

import functools
import json
from pathlib import Path

import pytest

from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from tests.deploy.reading import health_path
from tests.integration.deployed import MODEL, Site, site
from tests.integration.network import Program, run_command
from tests.integration.scraping import get, scrape, until

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

NODES = {"systemd": ["node-0"], "compose": ["node-0", "node-1"], "kubernetes": ["node-0"]}
STARTS_S = 240.0
"""A node loads torch and a model, and compiles loops where no cache has them."""


@pytest.mark.parametrize("way", NODES)
def test_what_is_deployed_survives_kills_and_stops_in_order(way: str, tmp_path: Path) -> None:
    with site(way, tmp_path, NODES[way]) as here:
        coordinator = _serving(here)
        nodes = {name: here.start(name) for name in NODES[way]}
        first = nodes["node-0"]
        for node in nodes.values():
            node.wait_for_round(3, timeout_s=STARTS_S)
        _answer_to_probes(here)
        if way != "kubernetes":  # of the example, --eval comes with a patch
            figures = scrape(f"127.0.0.1:{here.http}")
            assert 0 < figures['peerturb_eval{metric="accuracy"}'] <= 1

        coordinator.kill()
        seen = max(max(node.digests()) for node in nodes.values())
        coordinator = _serving(here)
        assert coordinator.of("serving")[0]["round"] >= seen, "an announced round is gone"
        first.wait_for_round(seen + 3)

        first.kill()
        again = nodes["node-0"] = here.start("node-0")
        again.wait_for_round(max(first.digests()) + 3, timeout_s=STARTS_S)
        assert again.of("start")[0]["key"] == first.of("start")[0]["key"], "a restart keeps the identity"
        assert again.of("joined")[0]["slot"] == first.of("joined")[0]["slot"]
        assert again.of("restored")[0]["round"] >= max(first.digests())

        assert [node.stop(timeout_s=60) for node in nodes.values()] == [0] * len(nodes)
        assert coordinator.stop() == 0
        _end_in_order(here, coordinator, nodes)
        _agree(here, [first, *nodes.values()])


@pytest.mark.parametrize("way", ["systemd", "kubernetes"])
def test_a_coordinator_without_its_secrets_says_which_is_missing(way: str, tmp_path: Path) -> None:
    with site(way, tmp_path, NODES[way]) as here:
        for name in ("join-token", "coordinator.key"):
            (tmp_path / "keys" / name).rename(tmp_path / name)
            program = here.start("coordinator")
            assert program.wait() == 2
            assert name in program.errors
            assert "peerturb coordinator keys" in program.errors
            (tmp_path / name).rename(tmp_path / "keys" / name)
            program.errors_path.unlink()
        _serving(here)


def _serving(here: Site) -> Program:
    program = here.start("coordinator")
    program.wait_for(lambda event: event["event"] == "serving")
    return program


def _answer_to_probes(here: Site) -> None:
    for kind, address in [("coordinator", here.http), *(("node", port) for port in here.node_http.values())]:
        path = "/" + health_path(kind).partition("/")[2]
        assert get(f"127.0.0.1:{address}", path)[0] == 200
        until(functools.partial(_is_ready, f"127.0.0.1:{address}"))


def _is_ready(address: str) -> bool:
    return get(address, "/readyz")[0] == 200


def _end_in_order(here: Site, coordinator: Program, nodes: dict[str, Program]) -> None:
    assert coordinator.of("stopped"), coordinator.events[-3:]
    for node in nodes.values():
        assert node.of("stop")[0]["why"] == "left"
        assert not node.of("error")
    for program in here.programs:
        assert program.errors == "", program.label
    loud = [event for event in coordinator.events if event["level"] in ("error", "critical")]
    assert loud == []


def _agree(here: Site, programs: list[Program]) -> None:
    """The log is whole, has what nodes saw, and gives the weights that each node had at its end."""
    log = here.folder / "whole.runlog"
    done = run_command("log", "export", str(here.data_dir), "--out", str(log))
    assert done.returncode == 0, done.stderr
    assert verify(log).ledger.sealed_rounds > 6
    sealed = [record for record in read_records(log) if isinstance(record, RoundSealed)]
    for name in here.node_http:
        (local,) = (here.folder / name).rglob("local.runlog")
        assert log.read_bytes().startswith(local.read_bytes())
    seen: dict[int, set[str]] = {}
    for program in programs:
        for number, digest in program.digests().items():
            seen.setdefault(number, set()).add(digest)
    assert all(len(digests) == 1 for digests in seen.values()), seen
    assert max(seen) <= len(sealed)
    at = max(seen)
    done = run_command("log", "replay", str(log), "--model", str(MODEL), "--until", str(at), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"].startswith(next(iter(seen[at])))
