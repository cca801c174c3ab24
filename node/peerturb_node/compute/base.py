"""The contract between a node and its numerics. It knows no torch, socket or thread.

A `Compute` is a replica of the weights and a private data set. Its methods may block for long; `peerturb_node.worker`
calls them one at a time, in order, so an implementation needs no locks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peerturb.ids import Slot
from peerturb.manifest import Manifest
from peerturb.noise import Estimator
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A round's probes, or exact projections."""

    codes: bytes
    """int8, two's complement, samples ascending; -128 is void. Empty only when cancelled."""
    loss: float
    """Mean of the finite losses: L+ and L-, one-sided L+ and the clean loss; NaN without any."""
    tokens: int = 0
    """Tokens that went through the model for it, all sides of every probe and a clean loss counted; for exact
    projections those of the examples, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A held-out evaluation."""

    loss: float
    accuracy: float | None
    """Fraction in [0, 1]; None where the objective has no labels."""
    examples: int


class Compute(Protocol):
    """A replica and its data."""

    is_blocking: bool
    """True: calls take long and belong on a thread. False: calls return within a millisecond."""
    estimator: Estimator
    """How it finds projected gradients."""
    base_digest: bytes
    """32 bytes: digest of the base weights."""
    manifest: Manifest
    """The trainable tensors."""
    checkpoint_name: str
    """File name of its checkpoints."""
    has_held_out: bool
    """Whether there are held-out examples to evaluate."""

    @property
    def rounds(self) -> int:
        """Rounds applied since the base weights."""

    def apply(self, sealed: RoundSealed) -> None:
        """Turn weights `sealed.round` into weights `sealed.round` + 1.

        Raises:
            LogError: the weights are not those before `sealed.round`.
        """

    def digest(self) -> bytes:
        """Return the run digest of the weights, 32 bytes."""

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        """Measure samples 0, 1, ... of `work.round`; `is_cancelled` is asked between passes and ends it early."""

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return the loss on held-out data; None without such data, or when cancelled."""

    def reset(self) -> None:
        """Go back to the base weights."""

    def save(self, path: Path, *, position: int, chain: bytes) -> None:
        """Write a checkpoint of weights and round, atomically.

        Args:
            path: the file; an old one stays until the new one is whole.
            position: length of the local log on disk, at least what the weights are made of.
            chain: chain hash of the log there.

        Raises:
            PeerturbError: it cannot be written.
        """

    def restore(self, path: Path) -> int:
        """Load a checkpoint; return its round.

        Raises:
            PeerturbError: it is damaged or of another run. The weights may be anything then: `reset`.
        """

    def export(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder: the model's, or the adapter's where the run trains one.

        Raises:
            ModelError: this compute has no such model, or the folder cannot be written.
        """

    def close(self) -> None:
        """Free what is held."""
