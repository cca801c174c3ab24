"""A peer's held-out evaluations: when one is due, and what is said of it."""

from peerturb.floats import f32
from peerturb.ids import RoundNumber
from peerturb.protocol.messages import Evaluation
from peerturb.protocol.outputs import Evaluate, PeerOutput, Say
from peerturb.protocol.results import EvaluatedResult


class Evaluating:
    """At most one evaluation at a time, and none twice of the same weights.

    Attributes:
        is_running: an evaluation was asked for and is not back.
    """

    def __init__(self, *, every: int) -> None:
        """Begin with nothing evaluated; `every` so many rounds, 0: never."""
        self.is_running = False
        self._every = every
        self._evaluated_at = -1

    def step(self, rounds: int, *, is_last: bool) -> list[PeerOutput]:
        """Evaluate the weights after `rounds` rounds if that is due; `is_last`: no round follows."""
        if not self._every or self.is_running or rounds == self._evaluated_at:
            return []
        if rounds % self._every and not is_last:
            return []
        self.is_running, self._evaluated_at = True, rounds
        return [Evaluate(round=RoundNumber(rounds))]

    def completed(self, result: EvaluatedResult, *, is_joined: bool) -> list[PeerOutput]:
        """Send the result, unless nobody listens or there was nothing to evaluate on."""
        self.is_running = False
        if not is_joined or not result.examples:
            return []
        message = Evaluation(
            round=result.round,
            loss=f32(result.loss),
            accuracy=None if result.accuracy is None else f32(result.accuracy),
            examples=result.examples,
        )
        return [Say(message=message)]
