"""Starts coordinator and nodes by the very commands of deploy/: paths, ports and host names put in place, nothing else.

A site knows one way of deployment: `systemd`, `compose` or `kubernetes`.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from peerturb_coordinator.keys import make_keys
from tests.conftest import REPOSITORY
from tests.deploy.reading import KUBERNETES, Started, container, manifests, service, services, unit
from tests.integration.network import Program

MODEL = REPOSITORY / "node" / "peerturb_node" / "demo" / "assets" / "base"


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Site:
    """One way of deployment, in a folder.

    Args:
        way: systemd, compose or kubernetes.
        folder: an empty one; everything lies below it.
        nodes: their names.
    """

    def __init__(self, way: str, folder: Path, nodes: list[str]) -> None:
        self.way, self.folder = way, folder
        self.programs: list[Program] = []
        self.grpc, self.http = free_port(), free_port()
        self.node_http = {name: free_port() for name in nodes}
        (folder / "config").mkdir()
        text = (REPOSITORY / "examples" / "code-or-doc.toml").read_text(encoding="utf-8")
        endless, times = re.subn(r"^count = 120$", "count = 100_000", text, flags=re.MULTILINE)
        assert times == 1
        (folder / "config" / "RUN.toml").write_text(endless, encoding="utf-8")
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        getattr(self, f"_prepare_{way}")()

    @property
    def data_dir(self) -> Path:
        """The coordinator's."""
        return self.folder / "coordinator" / ("peerturb-coordinator" if self.way == "systemd" else "run")

    def start(self, name: str) -> Program:
        """Start `coordinator` or a node."""
        started = self.command(name)
        program = Program(started.words, folder=self.folder, label=name, variables=started.environment)
        self.programs.append(program)
        return program

    def command(self, name: str) -> Started:
        """Return what the way of deployment starts, in its place here."""
        kind = name.partition("-")[0]
        if self.way == "systemd":
            found = unit(kind)
        elif self.way == "compose":
            found = service(name)
        else:
            found, _ = container(kind)
        places = self._places(name)
        words = [_placed(word, places) for word in found.words]
        environment = {key: _placed(value, places) for key, value in found.environment.items()}
        environment.pop("NUMBA_CACHE_DIR", None)  # compiled loops: a minute's work for each folder
        return Started(words, environment)

    def _places(self, name: str) -> Mapping[str, str]:
        """Return what stands for what."""
        own = str(self.folder / name)
        return {
            "peerturb-coordinator:7470": f"127.0.0.1:{self.grpc}",
            "coordinator:7470": f"127.0.0.1:{self.grpc}",
            "7470": str(self.grpc),
            "7471": str(self.http),
            "7472": str(self.node_http.get(name, 0)),
            "/data": own,
            "%S": own,
            "%C": own,
            "%d": str(self.folder / "keys"),
            "/keys": str(self.folder / "keys"),
            "/etc/peerturb": str(self.folder / "config"),
            "/config": str(self.folder / "config"),
            "/inputs": str(self.inputs),
            "/examples": str(self.inputs),
            "/model": str(MODEL),
        }

    def _prepare_systemd(self) -> None:
        """Keys by the documented command, and a node's settings."""
        made = make_keys(self.folder / "keys", ["127.0.0.1"])
        self._run_script(services()["data"]["entrypoint"])
        settings = {
            "coordinator": f"127.0.0.1:{self.grpc}",
            "fingerprint": made.fingerprint,
            "model": str(MODEL),
            "data": str(self.inputs / "train-0.jsonl"),
            "eval": str(self.inputs / "heldout.jsonl"),
        }
        lines = [f'{key} = "{value}"' for key, value in settings.items()]
        (self.folder / "config" / "node.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _prepare_compose(self) -> None:
        """The service `data`, twice: it keeps what is there."""
        self._run_script(services()["data"]["entrypoint"])
        before = {path.name: path.read_bytes() for path in self.inputs.iterdir()}
        (self.inputs / "heldout.jsonl").rename(self.inputs / "kept.jsonl")
        self._run_script(services()["data"]["entrypoint"])
        (self.inputs / "kept.jsonl").rename(self.inputs / "heldout.jsonl")
        assert {path.name: path.read_bytes() for path in self.inputs.iterdir()} == before

    def _prepare_kubernetes(self) -> None:
        """The initial container; TLS by the certificate that Secrets hand to the nodes."""
        make_keys(self.folder / "keys", ["peerturb-coordinator", "127.0.0.1"])
        (patch,) = manifests(KUBERNETES / "example" / "inputs.yaml")
        (initial,) = patch["spec"]["template"]["spec"]["initContainers"]
        self._run_script(initial["command"])
        # What components/own-data makes of it for node 0.
        component = yaml.safe_load((KUBERNETES / "components" / "own-data" / "kustomization.yaml").read_text("utf-8"))
        assert "value: /inputs/train-$(POD_INDEX).jsonl" in component["patches"][0]["patch"]
        (self.inputs / "train-0.jsonl").rename(self.inputs / "train.jsonl")

    def _run_script(self, command: list[str]) -> None:
        """Run `python -c SCRIPT` of a container."""
        program, flag, script = command
        assert (program, flag) == ("python", "-c")
        for place, here in self._places("").items():
            script = script.replace(f'"{place}', f'"{here}')
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=os.environ)

    def close(self) -> None:
        """Kill whatever is left."""
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()


def _placed(text: str, places: Mapping[str, str]) -> str:
    """Put folders, ports and hosts in place; fail if an absolute path, a port or a specifier is left."""
    pattern = rf"(?<![\w./-])(?:{'|'.join(re.escape(place) for place in places)})(?![\w.-])"
    left = re.sub(pattern, "HERE", text)
    assert not re.search(r"(?:^|=)/|%|747\d", left), f"{text}: what stands for it here?"
    return re.sub(pattern, lambda found: places[found.group()], text)


@contextmanager
def site(way: str, folder: Path, nodes: list[str]) -> Iterator[Site]:
    """Give a site whose processes all end with the block."""
    made = Site(way, folder, nodes)
    try:
        yield made
    finally:
        made.close()
