"""A coordinator's life drawn from a seed, traced; the trace and the same compute give the same log bytes again.

The production runner runs on a clock of the test. Peers come, go, contribute late, twice, too much or to no open round;
the store refuses, the process dies before or after a write and is started again.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.messages import Contribution, Evaluation, Hello, Leave, Proof, Welcome
from peerturb.protocol.outputs import SessionId
from peerturb.protocol.records import Evaluated, PeerLeft, RoundSealed
from peerturb.runlog.chain import CHAIN_START
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec, StepSpec
from peerturb.wire.records import RecordDecoder
from peerturb_coordinator.events import Events
from peerturb_coordinator.recovery import recover
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.store import Entry, MemoryLogStore, StoreFault
from peerturb_coordinator.trace import Trace as TraceWriter
from peerturb_coordinator.watching import Watchers
from peerturb_sim.compute import Request
from peerturb_sim.reproduction import Reproduction
from peerturb_sim.scenario import ToySpec
from peerturb_sim.toy import ToyCompute, base_digest
from peerturb_sim.trace import Trace, TraceError

SEED = 5
SPEC = RunSpec(
    name="traced",
    model=ModelSpec(name="toy", digest=base_digest(SEED).hex()),
    step=StepSpec(learning_rate=0.05),
    round=RoundSpec(probes_max=6, min_peers=2, deadline_ms_min=100, deadline_ms_max=900, lease_ms=700),
    objective=ObjectiveSpec(eval_every=2),
)
PEERS = 5


class KilledError(BaseException):
    """The process is gone."""


class Store(MemoryLogStore):
    """Refuses or dies when told."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses = False
        self.dies: str | None = None

    def append(self, entries: Sequence[Entry]) -> None:
        if self.refuses:
            raise StoreFault("full")
        if self.dies == "before":
            raise KilledError
        super().append(entries)
        if self.dies == "after":
            raise KilledError


class Stream:
    """What a runner sees of a session."""

    def __init__(self, number: SessionId, peer: int) -> None:
        self.id = number
        self.peer = peer
        self.slot: Slot | None = None

    def send(self, message: Any) -> None:
        if isinstance(message, Welcome):
            self.slot = message.slot

    def refuse(self, code: RejectCode, why: str, *, closes: bool) -> None:
        pass


class Life:
    """One coordinator over several processes, and the peers around it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.draw = Random(seed)
        self.now_s = 50.0
        self.store = Store()
        self.compute = ToyCompute(ToySpec(), SPEC, seed=SEED)
        self.streams: list[Stream] = []
        self.kills = 0
        self._begin()

    def _begin(self) -> None:
        events = Events(io.StringIO(), as_json=True)
        trace = TraceWriter(self.path, SPEC, events, records=self.store.head)
        self.streams.clear()
        self.store.dies = None
        self.trace = trace
        self.runner = Runner(
            recover(SPEC, self.store),
            self.store,
            events,
            trace=trace,
            watchers=Watchers(events),
            retry_s=0.2,
            now_s=lambda: self.now_s,
        )
        self.runner._arm = lambda: None  # type: ignore[method-assign]
        self._do(self.runner.start)

    def _do(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except KilledError:
            self.kill()

    def kill(self) -> None:
        self.kills += 1
        self.trace.close()
        self.now_s = self.draw.uniform(1.0, 100.0)  # another clock after a reboot
        self._begin()

    def step(self) -> None:
        draw = self.draw
        self.now_s += draw.choice([0.0, 0.001, 0.01, 0.05, 0.3])
        self.store.refuses = draw.random() < (0.7 if self.store.refuses else 0.03)
        if draw.random() < 0.02:
            self.store.dies = draw.choice(["before", "after"])
        kind = draw.choices(
            ["hello", "contribution", "evaluation", "tick", "leave", "close", "stranger", "proof", "kill"],
            [4, 20, 4, 5, 0.5, 1, 1, 0.1, 0.2],
        )[0]
        getattr(self, f"_{kind}")()

    def _tick(self) -> None:
        self._do(self.runner._tick)

    def _kill(self) -> None:
        self.kill()

    def _open(self, peer: int) -> Stream:
        stream = Stream(self.runner.next_session_id(), peer)
        self.runner.opened(stream)  # type: ignore[arg-type]
        return stream

    def _stranger(self) -> None:
        self._do(self.runner.closed, self._open(0))

    def _hello(self) -> None:
        stream = self._open(self.draw.randrange(PEERS))
        wrong = self.draw.random() < 0.1
        hello = Hello(
            protocol=1, key=PeerKey(bytes([stream.peer + 1]) * 32), name=f'"{stream.peer}" é', token="secret",
            spec_digest=SPEC.digest, base_digest=self.compute.base_digest,
            manifest_digest=bytes(32) if wrong else self.compute.manifest_digest,
            position=Position(self.draw.choice([0, self.store.head])), chain=CHAIN_START,
        )  # fmt: skip
        self.streams.append(stream)
        self._do(self.runner.receive, stream, hello)

    def _say(self, message: Any) -> None:
        if self.streams:
            self._do(self.runner.receive, self.draw.choice(self.streams), message)

    def _contribution(self) -> None:
        if not self.streams:
            return
        stream, ledger = self.draw.choice(self.streams), self._ledger()
        number = max(ledger.sealed_rounds + self.draw.choices([0, -1, 1], [20, 2, 1])[0], 0)
        count = self.draw.choices([1, 3, 6, 7], [3, 3, 3, 1])[0]
        codes, loss, digest = bytes(count), 0.0, 7
        if stream.slot is not None and ledger.open is not None and number == ledger.open.round:
            weights = self._weights()
            request = Request(
                weights=weights, slot=stream.slot, round=RoundNumber(number), scale=ledger.open.scale, count=count
            )
            self.compute.expect(request)
            found = self.compute.measure(request)
            codes, loss, digest = found.codes, found.loss, weights.digest
        message = Contribution(round=RoundNumber(number), codes=codes, loss=loss, digest=digest)
        self._do(self.runner.receive, stream, message)

    def _evaluation(self) -> None:
        number = max(self._ledger().sealed_rounds + self.draw.choices([0, -1, 1], [20, 2, 1])[0], 0)
        found = self.compute.evaluate(self._weights(number))
        self._say(
            Evaluation(round=RoundNumber(number), loss=found.loss, accuracy=found.accuracy, examples=found.examples)
        )

    def _leave(self) -> None:
        self._say(Leave())

    def _proof(self) -> None:
        self._say(Proof(signature=bytes(64)))

    def _close(self) -> None:
        if self.streams:
            stream = self.streams.pop(self.draw.randrange(len(self.streams)))
            self._do(self.runner.closed, stream)

    def _records(self) -> list[Any]:
        decoder = RecordDecoder()
        return [decoder.decode(payload) for payload in self.store.read(Position(0), 2**40)]

    def _ledger(self) -> Ledger:
        return Ledger.fold(self._records())

    def _weights(self, rounds: int | None = None) -> Any:
        weights = self.compute.base
        for record in self._records():
            if isinstance(record, RoundSealed) and (rounds is None or weights.rounds < rounds):
                weights = self.compute.apply(weights, record)
        return weights


async def lived(path: Path, seed: int, steps: int = 250) -> Life:
    life = Life(path, seed)
    for _ in range(steps):
        life.step()
    life.trace.close()
    return life


def again(path: Path) -> list[bytes]:
    made = Reproduction(SPEC, ToyCompute(ToySpec(), SPEC, seed=SEED), Trace(path, SPEC))
    return [payload for payload, _ in made.records()]


@pytest.mark.parametrize("seed", range(24))
async def test_any_traced_life_is_made_again_byte_for_byte(tmp_path: Path, seed: int) -> None:
    life = await lived(tmp_path / "trace", seed)
    wanted = life.store.read(Position(0), 2**40)
    assert again(tmp_path / "trace") == wanted
    assert life._ledger().sealed_rounds >= 3


async def test_the_lives_have_everything_in_them(tmp_path: Path) -> None:
    """Else the test above would say little."""
    text, kinds, kills = "", set(), 0
    for seed in range(24):
        life = await lived(tmp_path / f"trace{seed}", seed)
        kills += life.kills
        kinds |= {type(record) for record in life._records()}
        text += (tmp_path / f"trace{seed}").read_text()
    assert kinds >= {Evaluated, PeerLeft, RoundSealed}
    assert kills > 24
    for word in ("start", "hello", "contribution", "evaluation", "leave", "proof", "disconnected", "tick", "refused"):
        assert f'"do":"{word}"' in text, word


async def test_nothing_that_peers_computed_is_in_the_trace(tmp_path: Path) -> None:
    """Another objective gives other codes: the trace cannot have carried them."""
    life = await lived(tmp_path / "trace", 3)
    other = Reproduction(SPEC, ToyCompute(ToySpec(noise=0.5), SPEC, seed=SEED), Trace(tmp_path / "trace", SPEC))
    made, wanted = [payload for payload, _ in other.records()], life.store.read(Position(0), 2**40)
    first = next(at for at, pair in enumerate(zip(made, wanted, strict=False)) if pair[0] != pair[1])
    assert isinstance(life._records()[first], RoundSealed)
    assert "secret" not in (tmp_path / "trace").read_text()


async def test_a_process_without_trace_leaves_a_gap_that_is_named(tmp_path: Path) -> None:
    life = await lived(tmp_path / "trace", 1, steps=80)
    lines = (tmp_path / "trace").read_text().count("\n")
    head = life.store.head
    life.path = tmp_path / "elsewhere"
    life.kill()
    for _ in range(200):
        life.step()
    assert life.store.head > head
    life.path = tmp_path / "trace"
    life.kill()
    with pytest.raises(
        TraceError, match=rf"trace:{lines + 1}: the coordinator found \d+ records here, .* {head}: it ran"
    ):
        again(tmp_path / "trace")
    life.trace.close()
