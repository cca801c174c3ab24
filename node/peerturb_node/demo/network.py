"""The demo's network of real processes: one coordinator, nodes behind counting relays, and what can be done to them.

It starts, kills and stops; when to do what is `peerturb_node.demo.orchestrator`'s business.
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from peerturb_node.demo.events import Peer, Story
from peerturb_node.demo.folder import DemoFolder
from peerturb_node.demo.processes import Child, ChildError, Family
from peerturb_node.demo.proxy import CountingRelay

COORDINATOR_START_S = 60.0
"""How long the coordinator may take to listen; it takes about one second, more on a machine that is busy."""
STOP_S = 30.0
"""How long a process may take to stop in order: a node writes a checkpoint and the model."""
_POLL_S = 0.05


def peerturb(*arguments: str) -> list[str]:
    """Return the command line that runs `peerturb ARGUMENTS` with this Python."""
    return [sys.executable, "-m", "peerturb.cli", *arguments]


class Network:
    """The processes of one demo."""

    def __init__(self, folder: DemoFolder, family: Family, story: Story, tick: Callable[[], None]) -> None:
        """`tick` moves the story's clock on; it is called before an event is told."""
        self._folder = folder
        self._family = family
        self._story = story
        self._tick = tick
        self._nodes: dict[str, Child] = {}
        self._relays: dict[str, CountingRelay] = {}
        self._coordinator: Child | None = None
        self._port = 0

    async def start_coordinator(self) -> None:
        """Start the coordinator, or start it again on the same data and port, and wait until it listens.

        Raises:
            ChildError: it ended, or did not listen in time.
        """
        port_file = self._folder.port_file
        port_file.unlink(missing_ok=True)
        command = peerturb(
            "coordinator", "serve", str(self._folder.run_file), "--json",
            "--listen", f"127.0.0.1:{self._port}",
            "--data-dir", str(self._folder.coordinator),
            "--port-file", str(port_file),
        )  # fmt: skip
        self._coordinator = await self._family.start("coordinator", command)
        try:
            async with asyncio.timeout(COORDINATOR_START_S):
                while not port_file.exists():
                    self._family.raise_for_dead()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise ChildError(
                f"the coordinator did not listen within {COORDINATOR_START_S:.0f} s; see {self._coordinator.log}"
            ) from None
        self._port = int(port_file.read_text(encoding="ascii"))

    async def start_node(
        self, name: str, data: Path, *, held_out: Path | None = None, export: Path | None = None, is_late: bool = False
    ) -> Peer:
        """Start a node behind its own relay; its events go into the story."""
        relay = await CountingRelay.open(self._port)
        self._relays[name] = relay
        command = peerturb(
            "node", "run", "--json", "--verbose",
            "--coordinator", f"127.0.0.1:{relay.port}",
            "--name", name,
            "--data", str(data),
            "--model", str(self._folder.base),
            "--device", "cpu",
            "--state", str(self._folder.nodes / name),
        )  # fmt: skip
        if held_out is not None:
            command += ["--eval", str(held_out)]
        if export is not None:
            command += ["--export", str(export)]
        child = await self._family.start(name, command, on_line=lambda line: self._hear(name, line))
        self._nodes[name] = child
        return self._story.add_peer(name, pid=child.pid, is_late=is_late)

    def _hear(self, name: str, line: str) -> None:
        """Take a line of a node's standard output; what is no JSON object is in its `.out` file for whoever looks."""
        try:
            event = json.loads(line)
        except ValueError:
            return
        if isinstance(event, dict):
            self._tick()
            self._count()
            self._story.take(name, event)

    def _count(self) -> None:
        for name, relay in self._relays.items():
            if name in self._story.peers:
                peer = self._story.peers[name]
                peer.bytes_up, peer.bytes_down = relay.count.up, relay.count.down

    def refresh(self) -> None:
        """Bring the story's byte counts up to date.

        Raises:
            ChildError: a process ended that nobody told to.
        """
        self._count()
        for child in self._nodes.values():
            # At the end of the run nodes leave by themselves.
            if child.code == 0:
                child.is_expected_to_end = True
        self._family.raise_for_dead()

    async def kill_node(self, name: str) -> None:
        """Kill a node with SIGKILL, in the middle of whatever it does."""
        await self._nodes[name].end(signal.SIGKILL, timeout_s=STOP_S)
        self._story.peers[name].state = "killed"

    async def kill_coordinator(self) -> None:
        """Kill the coordinator with SIGKILL."""
        assert self._coordinator is not None
        await self._coordinator.end(signal.SIGKILL, timeout_s=STOP_S)

    @property
    def is_run_over(self) -> bool:
        """Whether a node has left by itself, which it does when the run has no more rounds."""
        return any(child.code == 0 for child in self._nodes.values())

    async def stop_coordinator(self) -> None:
        """Stop the coordinator in order."""
        if self._coordinator is not None and self._coordinator.code is None:
            await self._coordinator.end(signal.SIGTERM, timeout_s=STOP_S)

    async def stop_nodes(self) -> None:
        """Stop all nodes in order; each writes what it has been told to write.

        Raises:
            ChildError: one did not end in order.
        """
        if self.is_run_over:
            # The others are on their way out, writing their model: a signal now would cut them off.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await asyncio.gather(*(child.exited() for child in self._nodes.values()))
        living = [child for child in self._nodes.values() if child.code is None]
        await asyncio.gather(*(child.end(signal.SIGTERM, timeout_s=STOP_S) for child in living))
        for name, child in self._nodes.items():
            if child.code != 0 and self._story.peers[name].state != "killed":
                raise ChildError(child.obituary())
        for name, child in self._nodes.items():
            if child.code == 0:
                self._story.peers[name].state = "stopped"
        self._count()

    async def close(self) -> None:
        """Close the relays."""
        await asyncio.gather(*(relay.close() for relay in self._relays.values()))
