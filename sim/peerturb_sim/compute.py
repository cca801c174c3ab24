"""What peers compute, as an interface: weights that sealed rounds change, probes measured on them.

Virtual peers share: equal weights are one object, and what a round does to them is computed once. A peer that skips a
round, applies one twice or has a flipped bit holds another object with another digest. An implementation may compute
requests together and where it likes; results are taken in the order of events, so that cannot reach the log.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.records import RoundSealed


class Weights(Protocol):
    """Weights of one replica, or of many that are the same. Immutable."""

    @property
    def rounds(self) -> int:
        """Sealed rounds applied."""

    @property
    def digest(self) -> int:
        """Short digest (u32)."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A measurement that a peer has begun."""

    weights: Any
    """As the same compute gave them."""
    slot: Slot
    round: RoundNumber
    scale: float
    count: int
    """Probes: samples 0..count-1."""
    is_exact: bool = False
    """Whether they are exact projections of one gradient."""
    answer: "Measurement | None" = None
    """For the compute to keep what it has computed ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What came of a request: exactly what production peers would send."""

    codes: bytes
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out loss of some weights."""

    loss: float
    accuracy: float | None
    examples: int


class Compute(Protocol):
    """One way to compute. Everything is a pure function of its arguments and of what the compute was made of."""

    base_digest: bytes
    """32 bytes; its first four are the short digest of `base`."""
    manifest_digest: bytes

    @property
    def base(self) -> Any:
        """Weights before round 0."""

    def apply(self, weights: Any, sealed: RoundSealed) -> Any:
        """Return the weights after a further sealed round."""

    def corrupt(self, weights: Any, which: int) -> Any:
        """Return the weights with one bit flipped; another bit for every other `which` (>= 0), as far as there are."""

    def expect(self, request: Request) -> None:
        """Hear of a measurement that has begun; `measure` or `forget` follows."""

    def measure(self, request: Request) -> Measurement:
        """Return what was measured."""

    def forget(self, request: Request) -> None:
        """A measurement was given up."""

    def evaluate(self, weights: Any) -> Evaluation:
        """Evaluate weights on held-out examples."""

    def close(self) -> None:
        """Let go of what is held outside this process."""
