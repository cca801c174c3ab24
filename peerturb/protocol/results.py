"""What a peer's shell answers when a piece of work is done: inputs of `PeerMachine.completed`."""

from dataclasses import dataclass

from peerturb.ids import RoundNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Answer to `Measure`: also sent when the measurement was cancelled, then with what codes there are."""

    round: RoundNumber
    codes: bytes
    """int8 codes of samples 0..len-1; -128 is void. Empty only after a `CancelMeasure`."""
    loss: float
    """Mean of the finite losses: L+ and L-, one-sided L+ and the clean loss; NaN without any."""
    elapsed_ms: float
    """Time the measurement took; with the number of codes it sets the size of the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """Answer to `Apply`."""

    round: RoundNumber
    """The sealed round that was applied; the weights now have `round + 1` rounds."""
    digest: int | None
    """Short digest (u32) of the weights after it; None where the shell has another `Apply` to do at once and leaves it
    out, because it takes longer than the update itself. The last one of a burst has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedResult:
    """Answer to `Evaluate`."""

    round: RoundNumber
    """Rounds applied to the evaluated weights, as in `Evaluate`."""
    loss: float
    accuracy: float | None
    examples: int
    """Held-out examples; 0 if there are none, then nothing is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """Answer to `Rebuild`: the weights were replayed from the base."""

    rounds: int
    """Sealed rounds applied: all that the local log holds."""
    digest: int


Result = Measured | Applied | EvaluatedResult | Rebuilt
