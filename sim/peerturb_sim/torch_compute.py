"""`torch` fidelity: a real model in this process. `peerturb_sim.ray_compute` adds workers to it."""

from peerturb.manifest import manifest_digest
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb_sim.compute import Evaluation, Measurement, Request
from peerturb_sim.real import RealModel
from peerturb_sim.scenario import RealSpec
from peerturb_sim.states import State, States, Step


class TorchCompute:
    """Implements `Compute`."""

    def __init__(self, section: RealSpec, spec: RunSpec) -> None:
        self.model = RealModel(section, spec)
        self.base_digest = bytes.fromhex(spec.model.digest)
        self.manifest_digest = manifest_digest(self.model.manifest)
        self._base = State(States.BASE, 0, self.model.digest(States.BASE))
        self._count = States.BASE

    @property
    def base(self) -> State:
        """Weights before round 0."""
        return self._base

    def apply(self, weights: State, sealed: RoundSealed) -> State:
        """Return the weights after a round. What is expected on those before is measured first, while they are here."""
        for known, after in weights.after:
            if known is sealed or known == sealed:
                return after
        self.leave(weights)
        after = self._follow(weights, sealed, weights.rounds + 1)
        weights.after.append((sealed, after))
        return after

    def corrupt(self, weights: State, which: int) -> State:
        """Return the weights with the lowest bit of an element of the first tensor flipped."""
        return self._follow(weights, None, weights.rounds, element=which)

    def expect(self, request: Request) -> None:
        """Note what to compute before the weights move on."""
        request.weights.expected.append(request)

    def forget(self, request: Request) -> None:
        """Compute a request no more."""
        if request in request.weights.expected:
            request.weights.expected.remove(request)

    def measure(self, request: Request) -> Measurement:
        """Return the codes and the mean loss."""
        self.forget(request)
        if request.answer is None:
            request.answer = self._measured(request)
        return request.answer

    def evaluate(self, weights: State) -> Evaluation:
        """Evaluate on the held-out file."""
        return self.model.evaluate(weights.number)

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def leave(self, weights: State) -> None:
        """Get ready for the weights to move on."""
        for request in weights.expected:
            request.answer = self._measured(request)
        weights.expected.clear()

    def announce(self, step: Step) -> None:
        """Hear of a new state."""
        self.model.add(step)

    def digest_at(self, number: int) -> int:
        """Return the short digest of a state."""
        return self.model.digest(number)

    def _measured(self, request: Request) -> Measurement:
        return self.model.measure(
            request.weights.number, slot=request.slot, round=request.round, scale=request.scale, count=request.count,
            is_exact=request.is_exact,
        )  # fmt: skip

    def _follow(self, weights: State, sealed: RoundSealed | None, rounds: int, *, element: int = 0) -> State:
        self._count += 1
        self.announce(Step(number=self._count, parent=weights.number, sealed=sealed, element=element))
        return State(self._count, rounds, self.digest_at(self._count))
