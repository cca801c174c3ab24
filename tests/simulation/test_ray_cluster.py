"""Workers of Ray, of this process or of a cluster that runs already: the bytes of one process, whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from peerturb.errors import DataError, SpecError
from peerturb.spec import RunSpec
from peerturb_sim.cli import app
from peerturb_sim.cluster import RayError, connect
from peerturb_sim.running import Cluster
from peerturb_sim.scenario import RealSpec, Scenario
from peerturb_sim.simulation import LOG_NAME, simulate
from tests.simulation.real_small import real_section, real_spec_of, scenario_file

PEERS, ROUNDS = 5, 8


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> RealSpec:
    return real_section(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def spec(section: RealSpec) -> RunSpec:
    return real_spec_of(section, count=5, rounds=ROUNDS)


@pytest.fixture(scope="module")
def scenario(section: RealSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenario_file(tmp_path_factory.mktemp("scenario"), section, peers=PEERS, rounds=ROUNDS)


@pytest.fixture(scope="module")
def wanted(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The log as one process writes it."""
    return simulated(scenario, tmp_path_factory.mktemp("here"), Cluster())


def simulated(scenario: Path, out: Path, cluster: Cluster) -> bytes:
    result = simulate(cluster.placed(Scenario.load(scenario)), folder=scenario.parent, out=out)
    assert result.is_finished
    assert max(row.peers for row in result.rounds) == PEERS
    return (out / LOG_NAME).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_log(workers: int, scenario: Path, wanted: bytes, tmp_path: Path) -> None:
    assert simulated(scenario, tmp_path, Cluster(workers=workers)) == wanted


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster with one machine, started as a user would; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    folder = tmp_path_factory.mktemp("r")
    head = [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"]
    subprocess.run(
        [ray, "start", "--head", *head, f"--temp-dir={folder}"], env=environment, check=True, capture_output=True,
        timeout=120,
    )  # fmt: skip
    yield f"127.0.0.1:{port}"
    subprocess.run([ray, "stop", "--force"], env=environment, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_cluster_that_runs_already_gives_the_same_log_and_stays(
    head: str, scenario: Path, wanted: bytes, tmp_path: Path
) -> None:
    for turn in ("first", "second"):
        out = tmp_path / turn
        command = [
            sys.executable, "-m", "peerturb.cli", "sim", "run", str(scenario), "--address", head, "--out", str(out),
            "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["compute"] == "ray"
        assert (out / LOG_NAME).read_bytes() == wanted
    many = [*command, "--workers", "3"]
    done = subprocess.run(many, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "3 workers with 1 threads each are asked for, and the cluster has 2 processors" in done.stderr


@pytest.mark.slow
def test_workers_killed_in_mid_run_change_nothing(scenario: Path, wanted: bytes, tmp_path: Path) -> None:
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not is_over.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    is_worker = "ray::Worker.measure" in " ".join(child.cmdline())
                except psutil.Error:
                    continue
                if is_worker and child.pid not in killed:
                    child.send_signal(signal.SIGKILL)
                    killed.append(child.pid)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        assert simulated(scenario, tmp_path, Cluster(workers=2)) == wanted
    finally:
        is_over.set()
        thread.join()
    assert killed, "nothing was measured for so long that it could be interrupted"


@pytest.mark.slow
def test_what_a_worker_cannot_use_is_said_at_the_start(section: RealSpec, spec: RunSpec) -> None:
    from peerturb_sim.ray_compute import RayCompute, Worker

    class Elsewhere(Worker):
        def __init__(self, section: RealSpec, spec: RunSpec) -> None:
            super().__init__(section.model_copy(update={"data": ("/not/here.jsonl",)}), spec)

    with pytest.raises(DataError, match=r"^cannot read /not/here"):
        RayCompute(section.model_copy(update={"kind": "ray", "workers": 1}), spec, worker=Elsewhere)


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r"pip install 'peerturb\[sim\]'"):
        connect("")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no cluster of Ray at 127.0.0.1:1: Connection refused; is `ray start --head --port=1`"),
        ("ray://127.0.0.1:10001", "give HOST:PORT of the cluster's head"),
        ("somewhere", "'somewhere' is not HOST:PORT, for instance 127.0.0.1:6379, nor auto"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, words: str) -> None:
    with pytest.raises(RayError) as caught:
        connect(address)
    assert words in str(caught.value)


def test_flags_choose_the_cluster(scenario: Path, tmp_path: Path) -> None:
    read = Scenario.load(scenario)
    assert isinstance(read.compute, RealSpec)
    assert read.compute.kind == "torch"
    assert Cluster().placed(read) is read
    placed = Cluster(workers=3, address="auto").placed(read).compute
    assert isinstance(placed, RealSpec)
    assert (placed.kind, placed.workers, placed.address) == ("ray", 3, "auto")
    toy = tmp_path / "toy.toml"
    toy.write_text('name = "toy"\n[[peers]]\nname = "a"\ncount = 1\n', encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(toy), "--workers", "2"])
    assert isinstance(done.exception, SpecError)
    assert "--workers: the scenario 'toy' has a toy objective" in str(done.exception)
