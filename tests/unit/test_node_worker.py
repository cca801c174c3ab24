"""The worker's queue: order, cancelling, digests left out inside a burst, errors that reach the event loop."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.outputs import Apply, Evaluate, Measure, Rebuild
from peerturb.protocol.records import RoundSealed
from peerturb.spec import ModelSpec, RunSpec
from peerturb_node.compute.base import HeldOut, Measured
from peerturb_node.compute.stub import StubCompute
from peerturb_node.compute.toy import ToyCompute
from peerturb_node.worker import Done, Failed, Worker

SPEC = RunSpec(name="worker", model=ModelSpec(name="none", digest="0" * 64))


def sealed(number: int, codes: bytes = b"\x05\xfb") -> RoundSealed:
    return RoundSealed(
        round=RoundNumber(number), alpha=0.5, loss=1.0, digest=0, slots=(Slot(0),), counts=(len(codes),), codes=codes
    )


class SlowCompute(StubCompute):
    """Blocks in `measure` until told, or cancelled."""

    is_blocking = True

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.is_measuring = threading.Event()
        self.go_on = threading.Event()
        self.thread = ""

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        self.thread = threading.current_thread().name
        self.is_measuring.set()
        while not self.go_on.wait(0.01):
            if is_cancelled():
                return Measured(codes=b"", loss=float("nan"))
        return super().measure(work, slot, is_cancelled)

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        raise RuntimeError("the device is on fire")


async def collect(reports: "asyncio.Queue[Done | Failed]", count: int) -> list[Done | Failed]:
    return [await asyncio.wait_for(reports.get(), 20) for _ in range(count)]


def measure(number: int, count: int = 4) -> Measure:
    return Measure(round=RoundNumber(number), scale=0.05, count=count)


async def test_jobs_run_in_order_on_one_thread_and_a_burst_has_one_digest() -> None:
    reports: asyncio.Queue[Done | Failed] = asyncio.Queue()
    compute = SlowCompute()
    worker = Worker(compute, report=reports.put_nowait, replay=lambda _: None)
    worker.submit(measure(0), slot=Slot(0))
    await asyncio.to_thread(compute.is_measuring.wait, 20)
    for number in range(3):
        worker.submit(Apply(sealed=sealed(number)), slot=None)
    compute.go_on.set()
    done = await collect(reports, 4)
    assert [type(item.work) for item in done] == [Measure, Apply, Apply, Apply]
    results = [item.result for item in done if isinstance(item, Done)]
    assert isinstance(results[0], Measured)
    assert results[1:3] == [None, None]
    assert results[3] == compute.digest()
    assert compute.rounds == 3
    assert compute.thread.startswith("compute")
    await worker.close()


async def test_a_cancelled_measurement_ends_and_later_ones_do_not() -> None:
    reports: asyncio.Queue[Done | Failed] = asyncio.Queue()
    compute = SlowCompute()
    worker = Worker(compute, report=reports.put_nowait, replay=lambda _: None)
    worker.submit(measure(7), slot=Slot(0))
    await asyncio.to_thread(compute.is_measuring.wait, 20)
    worker.cancel(RoundNumber(7))
    (cancelled,) = await collect(reports, 1)
    assert isinstance(cancelled, Done)
    assert isinstance(cancelled.result, Measured)
    assert cancelled.result.codes == b""
    compute.go_on.set()
    worker.submit(measure(8), slot=Slot(0))
    (whole,) = await collect(reports, 1)
    assert isinstance(whole, Done)
    assert isinstance(whole.result, Measured)
    assert len(whole.result.codes) == 4
    await worker.close()


async def test_closing_cancels_what_runs() -> None:
    compute = SlowCompute()
    worker = Worker(compute, report=lambda _: None, replay=lambda _: None)
    worker.submit(measure(0), slot=Slot(0))
    await asyncio.to_thread(compute.is_measuring.wait, 20)
    await asyncio.wait_for(worker.close(), 20)


async def test_an_error_reaches_the_event_loop() -> None:
    reports: asyncio.Queue[Done | Failed] = asyncio.Queue()
    worker = Worker(SlowCompute(), report=reports.put_nowait, replay=lambda _: None)
    worker.submit(Evaluate(round=RoundNumber(0)), slot=None)
    (failed,) = await collect(reports, 1)
    assert isinstance(failed, Failed)
    assert "on fire" in str(failed.error)
    await worker.close()


async def test_a_rebuild_starts_from_the_base_weights() -> None:
    reports: list[Done | Failed] = []
    compute = StubCompute(SPEC)

    def replay(target: object) -> None:
        assert target is compute
        compute.apply(sealed(0, b"\x01"))

    worker = Worker(compute, report=reports.append, replay=replay)
    for number in range(3):
        worker.submit(Apply(sealed=sealed(number)), slot=None)
    worker.submit(Rebuild(why="test"), slot=None)
    fresh = StubCompute(SPEC)
    fresh.apply(sealed(0, b"\x01"))
    assert isinstance(reports[-1], Done)
    assert reports[-1].result == fresh.digest()
    assert compute.rounds == 1
    await worker.close()


@pytest.mark.parametrize("kind", [StubCompute, ToyCompute])
def test_a_checkpoint_restores_the_same_weights(tmp_path: Path, kind: type[StubCompute] | type[ToyCompute]) -> None:
    compute = kind(SPEC)
    for number in range(5):
        compute.apply(sealed(number))
    path = tmp_path / compute.checkpoint_name
    compute.save(path, position=9, chain=b"")
    other = kind(SPEC)
    assert other.restore(path) == 5
    assert other.digest() == compute.digest()
    other.apply(sealed(5))
    assert other.digest() != compute.digest()


@pytest.mark.parametrize("sides", ["two", "one"])
def test_the_toy_learns_and_ignores_void_codes(sides: Literal["two", "one"]) -> None:
    rules = SPEC.perturbation.model_copy(update={"sides": sides})
    compute = ToyCompute(SPEC.model_copy(update={"perturbation": rules}))
    before = compute.evaluate(lambda: False)
    measured = compute.measure(measure(0, 256), Slot(0), lambda: False)
    record = RoundSealed(
        round=RoundNumber(0), alpha=2e-5, loss=0.0, digest=0, slots=(Slot(0),), counts=(256,), codes=measured.codes
    )
    compute.apply(record)
    after = compute.evaluate(lambda: False)
    assert before is not None
    assert after is not None
    assert after.loss < before.loss
    void = ToyCompute(SPEC)
    start = void._weights.copy()
    void.apply(sealed(0, b"\x80" * 8))
    assert (void._weights == start).all()
