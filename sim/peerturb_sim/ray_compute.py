"""`ray` fidelity: probes measured by workers of a Ray cluster; weights, digests and evaluations stay in this process.

Each worker holds a model of its own and moves it along the same states. Ray only computes: an answer depends on its
request alone, answers are taken in the order of events, and a worker that is lost is replaced and asked again.
"""

import logging
import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from peerturb.errors import PeerturbError
from peerturb.spec import RunSpec
from peerturb.zo.free import free_bytes
from peerturb_sim.compute import Measurement, Request
from peerturb_sim.real import RealModel
from peerturb_sim.scenario import RealSpec
from peerturb_sim.states import State, Step
from peerturb_sim.torch_compute import TorchCompute

WORKER_BYTES = 400 * 2**20
"""What a worker takes besides its weights: interpreter, torch, activations."""
COPIES = 6
"""Times the weights that a worker holds: model, base, kept states, a cast copy."""
SHARE = 0.8
"""Part of the free memory that workers may take."""
REPLACED_MAX = 16
"""Workers that may be lost in a row, without an answer between, before it is called a fault of the program."""


class RayError(PeerturbError):
    """Ray is missing, its cluster cannot be reached, or its workers die again and again."""


class Worker:
    """What runs in a worker process."""

    def __init__(self, section: RealSpec, spec: RunSpec) -> None:
        self._model = RealModel(section, spec)

    def measure(self, steps: list[Step], number: int, slot: int, round: int, scale: float, count: int) -> Measurement:
        """Hear of states, then measure at one of them."""
        for step in steps:
            self._model.add(step)
        return self._model.measure(number, slot=slot, round=round, scale=scale, count=count)

    def process(self) -> int:
        """Return the worker's process number."""
        return os.getpid()


@dataclass(slots=True, eq=False)
class _Crew:
    """A worker as this process sees it."""

    actor: Any
    told: int = 0
    """Steps that it has heard of."""
    waiting: "deque[tuple[Request, Any]]" = field(default_factory=deque)
    """Requests it was sent and their answers to come, in order."""


class RayCompute(TorchCompute):
    """Implements `Compute`.

    Args:
        section: workers and the cluster's address are its.
        spec: the run's.

    Raises:
        RayError: Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self, section: RealSpec, spec: RunSpec) -> None:
        self._steps: list[Step] = []
        super().__init__(section, spec)
        self._ray = _started(section)
        self._section, self._spec = section, spec
        self._make = self._ray.remote(num_cpus=section.threads, max_restarts=0)(Worker)
        self._crews = [_Crew(self._actor()) for _ in range(self._workers())]
        self._owner: dict[int, _Crew] = {}
        """By identity of the request."""
        self.replaced = 0
        """Workers that were lost and replaced."""

    def expect(self, request: Request) -> None:
        """Send a measurement to the worker that has the least to do."""
        self._send(min(self._crews, key=lambda crew: len(crew.waiting)), request)

    def forget(self, request: Request) -> None:
        """Take no answer. Work that has begun is not interrupted: the worker would be lost with it."""
        crew = self._owner.pop(id(request), None)
        if crew is not None:
            crew.waiting = deque(pair for pair in crew.waiting if pair[0] is not request)

    def measure(self, request: Request) -> Measurement:
        """Wait for the answer to a request."""
        if request.answer is None:
            request.answer = self._taken(request)
        self.forget(request)
        return request.answer

    def leave(self, weights: State) -> None:
        """Workers go where each request is; nothing has to be measured before."""

    def announce(self, step: Step) -> None:
        """Hear of a new state; workers hear of it with the next request."""
        self._steps.append(step)
        super().announce(step)

    def close(self) -> None:
        """Let the workers go; a cluster that was there before stays."""
        for crew in self._crews:
            self._ray.kill(crew.actor)
        self._ray.shutdown()

    def _workers(self) -> int:
        """As many as were asked for, or as processors and memory allow."""
        if self._section.workers:
            return self._section.workers
        threads = max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self._section.threads)
        weights = sum(weight.numel() * weight.element_size() for weight in self._model.weights)
        free = free_bytes(self._model.weights[0].device)
        # On several machines memory is not known from here; each of their processors counts.
        if free is None or len(self._ray.nodes()) > 1:
            return threads
        return max(1, min(threads, int(SHARE * free) // (WORKER_BYTES + COPIES * weights)))

    def _actor(self) -> Any:
        return self._make.remote(self._section, self._spec)

    def _send(self, crew: _Crew, request: Request) -> None:
        steps, crew.told = self._steps[crew.told :], len(self._steps)
        answer = crew.actor.measure.remote(
            steps, request.weights.number, int(request.slot), int(request.round), request.scale, request.count
        )
        crew.waiting.append((request, answer))
        self._owner[id(request)] = crew

    def _taken(self, request: Request) -> Measurement:
        """Return the answer, replacing the worker if it is lost.

        Raises:
            RayError: workers are lost again and again.
        """
        for _ in range(REPLACED_MAX):
            crew = self._owner[id(request)]
            answer = next(answer for asked, answer in crew.waiting if asked is request)
            try:
                found: Measurement = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:  # an error of ours: the same anywhere
                raise error.as_instanceof_cause() from error
            except self._ray.exceptions.RayActorError:
                self._replace(crew)
            else:
                return found
        raise RayError(
            f"{REPLACED_MAX} workers of Ray were lost in a row: most often memory runs out, so ask for fewer "
            "(compute.workers), or look into Ray's logs"
        )

    def _replace(self, crew: _Crew) -> None:
        """Ask a new worker for all that the lost one still owes."""
        self.replaced += 1
        owed = [request for request, _ in crew.waiting]
        crew.actor, crew.told, crew.waiting = self._actor(), 0, deque()
        for request in owed:
            self._send(crew, request)


def _started(section: RealSpec) -> Any:
    """Return Ray, connected: to the cluster at the address, or to one of this machine that ends with this process."""
    try:
        import ray
    except ImportError as error:
        raise RayError("compute.kind is ray, which is not installed: pip install 'peerturb[sim]'") from error
    try:
        ray.init(
            address=section.address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = section.address or "this machine"
        raise RayError(f"no cluster of Ray at {where}: {error}; is `ray start --head` running there?") from error
    return ray
