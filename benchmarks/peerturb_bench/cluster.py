"""A run of real processes on loopback for benchmarks: one coordinator, some nodes that compute nothing.

The processes are the product's own commands; only the nodes' compute is a stub. It measures nothing itself.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from peerturb.errors import UnreachableError
from peerturb.wire.channel import Security, open_channel
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

START_TIMEOUT_S = 60.0
_POLL_S = 0.02
_BASE_DIGEST = "5a" * 32
"""The stub takes the RunSpec's word for its weights."""


class Cluster:
    """Processes of one run; `cluster` starts and ends them."""

    def __init__(self, folder: Path, *, probes: int) -> None:
        """Prepare a run in `folder`; every contribution has `probes` codes."""
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._spec_file = folder / "run.toml"
        self._spec_file.write_text(
            f'name = "benchmark"\n[model]\nname = "stub"\ndigest = "{_BASE_DIGEST}"\n'
            f"[round]\nprobes_max = {probes}\ndeadline_ms_min = 10000\n[objective]\neval_every = 0\n"
        )
        self.port = 0
        self.page = ""
        """Address of page and metrics, if there are any."""

    @property
    def coordinator(self) -> "subprocess.Popen[bytes]":
        """The coordinator's process."""
        return self._processes[0]

    @property
    def address(self) -> str:
        """The coordinator's HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    async def start_coordinator(self, *, has_page: bool = False) -> None:
        """Start it, with page and metrics if so wished, and wait for its port.

        Raises:
            UnreachableError: it ended, or did not begin in time.
        """
        port_file = self._folder / "port"
        flags = ["--listen", "127.0.0.1:0", "--data-dir", str(self._folder / "data"), "--port-file", str(port_file)]
        flags += ["--http", "127.0.0.1:0"] if has_page else []
        self._start("coordinator", ["coordinator", "serve", str(self._spec_file), "--json", *flags])
        end_s = time.monotonic() + START_TIMEOUT_S
        while not port_file.exists():
            self.check()
            if time.monotonic() > end_s:
                raise UnreachableError("the benchmark's coordinator did not start")
            await asyncio.sleep(_POLL_S)
        self.port = int(port_file.read_text())
        while has_page and not self.page:
            self.check()
            said = [json.loads(line) for line in (self._folder / "coordinator.out").read_text().splitlines()]
            self.page = next((f"http://{event['http']}" for event in said if event["event"] == "serving"), "")
            await asyncio.sleep(_POLL_S)

    def start_node(self, address: str) -> None:
        """Start a node that joins at `address`."""
        number = len(self._processes)
        state = str(self._folder / f"node-{number}")
        flags = ["--coordinator", address, "--state", state, "--name", f"node-{number}", "--compute", "stub", "--json"]
        self._start(f"node-{number}", ["node", "run", *flags])

    async def until(self, stub: "CoordinatorAsyncStub", *, round_: int, peers: int) -> pb.RunStatus:
        """Wait until `round_` rounds are sealed and `peers` peers are at work (in one of the last two rounds)."""
        while True:
            self.check()
            status = await stub.Status(pb.StatusRequest())
            at_work = [peer for peer in status.peers if peer.probes and peer.last_round + 2 >= status.round]
            if status.round >= round_ and len(at_work) == peers:
                return status
            await asyncio.sleep(_POLL_S)

    def check(self) -> None:
        """Raise UnreachableError if a process has ended, with the last it said."""
        for process in self._processes:
            if process.poll() is not None:
                said = "\n".join(path.read_text()[-2_000:] for path in sorted(self._folder.glob("*.err")))
                raise UnreachableError(f"a process of the benchmark ended with {process.returncode}: {said}")

    def end(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _start(self, name: str, arguments: list[str]) -> None:
        with (self._folder / f"{name}.out").open("wb") as out, (self._folder / f"{name}.err").open("wb") as err:
            command = [sys.executable, "-m", "peerturb.cli", *arguments]
            self._processes.append(subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL))


@contextlib.asynccontextmanager
async def cluster(*, probes: int, has_page: bool = False) -> AsyncIterator[Cluster]:
    """Run a coordinator in a temporary folder for as long as the block runs; processes inherit our processor cores."""
    with tempfile.TemporaryDirectory(prefix="peerturb-bench-") as folder:
        made = Cluster(Path(folder), probes=probes)
        try:
            await made.start_coordinator(has_page=has_page)
            yield made
        finally:
            made.end()


@contextlib.asynccontextmanager
async def stub_for(address: str) -> "AsyncIterator[CoordinatorAsyncStub]":
    """Open a plaintext channel for as long as the block runs."""
    async with await open_channel(address, Security(insecure=True)) as channel:
        stub: CoordinatorAsyncStub = CoordinatorStub(channel)
        yield stub
