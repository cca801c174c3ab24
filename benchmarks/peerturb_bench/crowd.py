"""A coordinator that serves the page of a finished run of simulated peers, in a thread of this process."""

import asyncio
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerturb.ids import PeerKey, Slot
from peerturb.protocol.records import PeerJoined, RunStarted
from peerturb.spec import RoundSpec, RunSpec
from peerturb.wire.records import RecordDecoder, encode_record
from peerturb_coordinator.events import Events
from peerturb_coordinator.server import Server
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_coordinator.store import Entry, MemoryLogStore
from peerturb_node.logsource import Source
from peerturb_sim.scenario import GroupSpec, LifeSpec, Scenario
from peerturb_sim.simulation import LOG_NAME, simulate

PEERS, ROUNDS = 1_000, 120
NAME = '<img src=x onerror="document.title=1">'
"""What a stranger may call itself."""
_START_S = 60


def crowd(folder: Path) -> tuple[RunSpec, list[bytes]]:
    """Simulate a thousand peers that come and go; return the run's rules and the log, a stranger's name at its end."""
    scenario = Scenario(
        name="a crowd", eval_every=20, round=RoundSpec(count=ROUNDS, probes_max=2, deadline_ms_max=4_000),
        peers=(
            GroupSpec(name="p", count=PEERS - 1, life=LifeSpec(arrive_s=(0, 20), stay_s=60, away_s=10)),
            GroupSpec(name="q", count=1, evaluates=True),
        ),
    )  # fmt: skip
    assert simulate(scenario, folder=folder, out=folder).is_finished
    payloads = list(Source(file=folder / LOG_NAME).payloads())
    decoder = RecordDecoder()
    started, *others = [decoder.decode(payload) for payload in payloads]
    assert isinstance(started, RunStarted)
    free = len({record.slot for record in others if isinstance(record, PeerJoined)})
    assert free > PEERS - 10
    stranger = PeerJoined(slot=Slot(free), key=PeerKey(b"\xff" * 32), name=NAME)
    return started.spec, [*payloads, encode_record(stranger)]


class InThread:
    """A coordinator with a ready log, in a thread with a loop of its own. Its join token is `secret-token`."""

    def __init__(self, spec: RunSpec, payloads: list[bytes]) -> None:
        store = MemoryLogStore()
        store.append([Entry(kind="", round=None, payload=payload) for payload in payloads])
        settings = CoordinatorSettings(listen="127.0.0.1:0", http="127.0.0.1:0", token="secret-token")
        self._stop = asyncio.Event()
        self._stands = threading.Event()

        async def serve() -> None:
            self.server = Server(spec, settings, store, Events(io.StringIO(), as_json=True))
            await self.server.start()
            self.address = f"http://{self.server.introduction['http']}"
            self.loop = asyncio.get_running_loop()
            self._stands.set()
            await self._stop.wait()
            await self.server.stop()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert self._stands.wait(_START_S)

    def call(self, work: Callable[[], Any]) -> Any:
        """Run a function on the loop and return its result."""

        async def there() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(_START_S)

    def stop(self) -> None:
        """End the coordinator and its thread."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_S)
