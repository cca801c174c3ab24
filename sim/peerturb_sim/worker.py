"""The worker of a simulated peer's process: one piece of work after the other, each as long as its card takes."""

from collections import deque
from typing import TYPE_CHECKING

from peerturb.protocol.outputs import Apply, Evaluate, Measure, Rebuild, Work
from peerturb.protocol.results import Applied, EvaluatedResult, Measured, Rebuilt, Result
from peerturb_sim.compute import Request
from peerturb_sim.events import stream

if TYPE_CHECKING:
    from peerturb_sim.peer import Peer


class Worker:
    """Does a peer's work and hands the results to its machine."""

    def __init__(self, peer: "Peer") -> None:
        self._peer, self._world = peer, peer.world
        self._draws = stream(peer.world.seed, "work", peer.index)
        self._queue: deque[Work] = deque()
        self._number = 0
        self._begun_us = 0
        self._request: Request | None = None
        self._cancelled = -1

    def add(self, work: Work) -> None:
        """Do this when what was there before is done."""
        self._queue.append(work)
        if len(self._queue) == 1:
            self._begin()

    def drop(self) -> None:
        """Forget everything: the process has ended."""
        self._queue.clear()
        self._number += 1
        self._cancelled = -1
        if self._request is not None:
            self._world.compute.forget(self._request)
            self._request = None

    def _begin(self) -> None:
        work = self._queue[0]
        self._number += 1
        self._begun_us = self._world.events.now_us
        self._world.events.after(self._duration_us(work), self._finish, self._number)

    def _duration_us(self, work: Work) -> int:
        match work:
            case Measure(round=round_, count=count):
                if round_ == self._cancelled:
                    self._cancelled = -1
                    return 0
                assert self._peer.machine is not None
                assert self._peer.machine.slot is not None
                self._request = Request(
                    weights=self._peer.weights,
                    slot=self._peer.machine.slot,
                    round=round_,
                    scale=work.scale,
                    count=count,
                    is_exact=self._peer.group.estimator == "exact",
                )
                self._world.compute.expect(self._request)
                seconds = self._peer.group.measuring_s(count, self._peer.probes_per_s)
                return round(seconds * 1e6 * self._draws.uniform(0.97, 1.06))
            case Apply():
                return round(1000 * self._peer.group.apply_ms)
            case Evaluate():
                return round(1000 * self._peer.group.evaluate_ms)
            case Rebuild():
                assert self._peer.machine is not None
                return round(1000 * self._peer.group.apply_ms * self._peer.machine.ledger.sealed_rounds)

    def cancel(self, round_: int) -> None:
        """Stop measuring, or do not begin; there is at most one measurement under way or waiting."""
        if self._request is None:
            self._cancelled = round_
        else:
            self._world.compute.forget(self._request)
            self._request = None
            self._number += 1
            self._world.events.after(0, self._finish, self._number)

    def _finish(self, number: int) -> None:
        if number != self._number or self._peer.waits(self._finish, number):
            return
        assert self._peer.machine is not None
        result = self._result(self._queue.popleft())
        if self._queue:
            self._begin()
        self._peer.perform(self._peer.machine.completed(result, self._peer.now_ms()))

    def _result(self, work: Work) -> Result:
        compute = self._world.compute
        match work:
            case Measure(round=round_, count=count):
                request, self._request = self._request, None
                if request is None:
                    return Measured(round=round_, codes=b"", loss=float("nan"), elapsed_ms=0.0)
                self._world.checks.measured_on(self._peer, round_)
                answer = compute.measure(request)
                self._peer.tally.measured += count
                elapsed_ms = (self._world.events.now_us - self._begun_us) / 1000
                return Measured(round=round_, codes=answer.codes, loss=answer.loss, elapsed_ms=elapsed_ms)
            case Apply(sealed=sealed):
                self._world.checks.applies(self._peer, sealed)
                self._peer.weights = compute.apply(self._peer.weights, sealed)
                self._world.checks.agree(self._peer)
                is_last = not (self._queue and isinstance(self._queue[0], Apply))
                return Applied(round=sealed.round, digest=self._peer.weights.digest if is_last else None)
            case Evaluate(round=round_):
                found = compute.evaluate(self._peer.weights)
                return EvaluatedResult(round=round_, loss=found.loss, accuracy=found.accuracy, examples=found.examples)
            case Rebuild():
                assert self._peer.machine is not None
                self._peer.tally.rebuilds += 1
                self._peer.weights = self._peer.replay(self._peer.machine.ledger.sealed_rounds)
                return Rebuilt(rounds=self._peer.rounds, digest=self._peer.weights.digest)
