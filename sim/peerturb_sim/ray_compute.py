"""`ray` fidelity: probes measured by workers of a Ray cluster; this process has the events and no work but them.

Each worker holds a model of its own and moves it along the same states. Ray only computes: an answer depends on its
request alone, answers are taken in the order of events, and a worker that is lost is replaced and asked again.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peerturb.errors import PeerturbError
from peerturb.spec import RunSpec
from peerturb.zo.free import free_bytes
from peerturb_sim.cluster import RayError, connect
from peerturb_sim.compute import Evaluation, Measurement, Request
from peerturb_sim.real import RealModel
from peerturb_sim.scenario import RealSpec
from peerturb_sim.states import State, States, Step
from peerturb_sim.torch_compute import TorchCompute

WORKER_BYTES = 400 * 2**20
"""What a worker takes besides its weights: interpreter, torch, activations."""
COPIES = 6
"""Times the weights that a worker holds: model, base, kept states, a cast copy."""
SHARE = 0.8
"""Part of the free memory that workers may take."""
REPLACED_MAX = 16
"""Workers that may be lost in a row, without an answer between, before it is called a fault of the program."""
START_S = 300.0
"""Time in which workers have to load torch and the model."""
TOGETHER = 4
"""Measurements in one call: enough that calls cost little, few enough that workers finish a round together."""

Ask = tuple[int, int, int, float, int, bool]
"""State, slot, round, scale and count of a measurement, and whether it is of exact projections."""


class Worker:
    """What runs in a worker process."""

    def __init__(self, section: RealSpec, spec: RunSpec) -> None:
        self._section, self._spec = section, spec

    @cached_property
    def model(self) -> RealModel:
        """Loaded with the first call, whose answer can say what is wrong."""
        return RealModel(self._section, self._spec)

    def ready(self) -> int:
        """Load the model; return the process number.

        Raises:
            PeerturbError: model or data cannot be used.
        """
        self.model.go(States.BASE)
        return os.getpid()

    def follow(self, steps: Sequence[Step]) -> None:
        """Hear of states, and move to the last of them: what is asked next will most likely be of it."""
        self._hear(steps)
        self.model.go(steps[-1].number)

    def measure(self, steps: Sequence[Step], asked: Sequence[Ask]) -> list[Measurement]:
        """Hear of states, then measure at some of them."""
        self._hear(steps)
        return [
            self.model.measure(number, slot=slot, round=round_, scale=scale, count=count, is_exact=is_exact)
            for number, slot, round_, scale, count, is_exact in asked
        ]

    def digest(self, steps: Sequence[Step], number: int) -> int:
        """Hear of states, then return the short digest of one."""
        self._hear(steps)
        return self.model.digest(number)

    def evaluate(self, steps: Sequence[Step], number: int) -> Evaluation:
        """Hear of states, then evaluate one."""
        self._hear(steps)
        return self.model.evaluate(number)

    def _hear(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.model.add(step)


@dataclass(slots=True, eq=False)
class _Call:
    """Measurements that a worker was asked for together."""

    requests: list[Request]
    answers: Any


@dataclass(slots=True, eq=False)
class _Crew:
    """A worker as this process sees it."""

    actor: Any
    told: int = 0
    """Steps that it has heard of."""
    calls: "deque[_Call]" = field(default_factory=deque)
    """What it has not answered yet, in order."""


class RayCompute(TorchCompute):
    """Implements `Compute`.

    Args:
        section: workers and the cluster's address are its.
        spec: the run's.
        worker: what runs in a worker process; benchmarks look into theirs.

    Raises:
        RayError: Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self, section: RealSpec, spec: RunSpec, *, worker: type[Worker] = Worker) -> None:
        self._steps: list[Step] = []
        processors = section.workers * section.threads or None
        self.ray = connect(section.address, processors=processors)
        try:
            super().__init__(section, spec)
            self._section, self._spec = section, spec
            self._make = self.ray.remote(num_cpus=section.threads, max_restarts=0)(worker)
            self._crews = [_Crew(self._actor()) for _ in range(self._workers())]
            self._await_workers()
        except BaseException:
            self.ray.shutdown()
            raise
        self._unsent: list[Request] = []
        self._owner: dict[int, _Crew] = {}
        """By identity of the request."""
        self.replaced = 0
        """Workers that were lost and replaced."""

    @property
    def actors(self) -> list[Any]:
        """The workers, as Ray knows them."""
        return [crew.actor for crew in self._crews]

    def expect(self, request: Request) -> None:
        """Send a measurement, with some others, to the worker that has the least to do."""
        self._unsent.append(request)
        if len(self._unsent) >= TOGETHER:
            self._flush()

    def forget(self, request: Request) -> None:
        """Take no answer. Work that has begun is not interrupted: the worker would be lost with it."""
        if request in self._unsent:
            self._unsent.remove(request)
        crew = self._owner.pop(id(request), None)
        if crew is not None and (call := self._call_of(crew, request)) is not None and not self._is_awaited(call):
            crew.calls.remove(call)

    def measure(self, request: Request) -> Measurement:
        """Wait for the answer to a request."""
        if request.answer is None:
            if self._unsent:  # who waits for one answer lets nobody idle
                self._flush()
            self._take(request)
        self.forget(request)
        assert request.answer is not None
        return request.answer

    def leave(self, weights: State) -> None:
        """Workers go where each request is; nothing has to be measured before."""

    def announce(self, step: Step) -> None:
        """Let all workers begin to move to a new state at once, each while the others do."""
        self._steps.append(step)
        for crew in self._crews:
            crew.actor.follow.remote(self._news(crew))

    def digest_at(self, number: int) -> int:
        """Return the short digest of a state, as a worker has it."""
        found: int = self._asked(lambda crew: crew.actor.digest.remote(self._news(crew), number))
        return found

    def evaluate(self, weights: State) -> Evaluation:
        """Evaluate on the held-out file, in a worker."""
        found: Evaluation = self._asked(lambda crew: crew.actor.evaluate.remote(self._news(crew), weights.number))
        return found

    def close(self) -> None:
        """Let the workers go; a cluster that was there before stays."""
        for crew in self._crews:
            self.ray.kill(crew.actor)
        self.ray.shutdown()

    def _workers(self) -> int:
        """As many as were asked for, or as processors and memory allow."""
        processors = int(self.ray.cluster_resources().get("CPU", 1))
        threads = max(1, processors // self._section.threads)
        if self._section.workers > threads:
            raise RayError(
                f"{self._section.workers} workers with {self._section.threads} threads each are asked for, and the "
                f"cluster has {processors} processors: ask for {threads} (--workers, compute.workers)"
            )
        if self._section.workers:
            return self._section.workers
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.weights)
        free = free_bytes(self.model.weights[0].device)
        # On several machines memory is not known from here; each of their processors counts.
        if free is None or len(self.ray.nodes()) > 1:
            return threads
        return max(1, min(threads, int(SHARE * free) // (WORKER_BYTES + COPIES * weights)))

    def _await_workers(self) -> None:
        """Wait until all have loaded their models, so that what is wrong is said now.

        Raises:
            RayError: they do not start.
            PeerturbError: a worker cannot use model or data.
        """
        waiting = [crew.actor.ready.remote() for crew in self._crews]
        started, missing = self.ray.wait(waiting, num_returns=len(waiting), timeout=START_S)
        if missing:
            raise RayError(
                f"{len(missing)} of {len(waiting)} workers of Ray have not started within {START_S:.0f} s: is the "
                "cluster busy with something else? Ask for fewer (--workers, compute.workers)"
            )
        try:
            self.ray.get(started)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PeerturbError):
                raise error.cause from error
            raise error.as_instanceof_cause() from error
        except self.ray.exceptions.RayActorError as error:
            raise RayError(f"a worker of Ray cannot start: {str(error).strip().splitlines()[-1]}") from error

    def _actor(self) -> Any:
        return self._make.remote(self._section, self._spec)

    def _news(self, crew: _Crew) -> list[Step]:
        """Return the steps that a worker has not heard of, and note that it hears of them now."""
        steps, crew.told = self._steps[crew.told :], len(self._steps)
        return steps

    def _freest(self) -> _Crew:
        return min(self._crews, key=lambda crew: len(crew.calls))

    def _flush(self) -> None:
        """Send what waits to be sent."""
        requests, self._unsent = self._unsent, []
        self._send(self._freest(), requests)

    def _send(self, crew: _Crew, requests: list[Request]) -> None:
        asked: list[Ask] = [
            (int(one.weights.number), int(one.slot), int(one.round), one.scale, one.count, one.is_exact)
            for one in requests
        ]
        crew.calls.append(_Call(requests, crew.actor.measure.remote(self._news(crew), asked)))
        for request in requests:
            self._owner[id(request)] = crew

    def _take(self, request: Request) -> None:
        """Take the answers of the call that a request went with, replacing the worker if it is lost."""

        def sent() -> tuple[_Crew, Any]:
            crew = self._owner[id(request)]
            call = self._call_of(crew, request)
            assert call is not None
            return crew, call.answers

        answers = self._got(sent)
        crew = self._owner[id(request)]
        call = self._call_of(crew, request)
        assert call is not None
        crew.calls.remove(call)
        for one, answer in zip(call.requests, answers, strict=True):
            one.answer = answer

    def _call_of(self, crew: _Crew, request: Request) -> _Call | None:
        """Return the call that a request went with, None once its answers are taken."""
        return next((call for call in crew.calls if any(one is request for one in call.requests)), None)

    def _is_awaited(self, call: _Call) -> bool:
        return any(id(request) in self._owner for request in call.requests)

    def _asked(self, ask: Callable[[_Crew], Any]) -> Any:
        """Return what the freest worker answers."""

        def attempt() -> tuple[_Crew, Any]:
            crew = self._freest()
            return crew, ask(crew)

        return self._got(attempt)

    def _got(self, ask: Callable[[], tuple[_Crew, Any]]) -> Any:
        """Return an answer, replacing the worker and asking again if it is lost.

        Raises:
            RayError: workers are lost again and again.
        """
        for _ in range(REPLACED_MAX):
            crew, answer = ask()
            try:
                return self.ray.get(answer)
            except self.ray.exceptions.RayTaskError as error:  # an error of ours: the same anywhere
                raise error.as_instanceof_cause() from error
            except self.ray.exceptions.RayActorError:
                self._replace(crew)
        raise RayError(
            f"{REPLACED_MAX} workers of Ray were lost in a row: most often memory runs out, so ask for fewer "
            "(--workers, compute.workers), or look into Ray's logs"
        )

    def _replace(self, crew: _Crew) -> None:
        """Ask a new worker for all that the lost one still owes and somebody waits for."""
        self.replaced += 1
        calls, crew.actor, crew.told, crew.calls = crew.calls, self._actor(), 0, deque()
        for call in calls:
            owed = [request for request in call.requests if id(request) in self._owner]
            if owed:
                self._send(crew, owed)
