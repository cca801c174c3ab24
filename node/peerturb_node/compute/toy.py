"""A compute that really trains, without torch: a vector pulled towards a target by a quadratic loss, in numpy.

It follows the numerics of a run (Philox signs, exact integer update, two roundings), so that whole networks of
processes can be tested in milliseconds a round.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peerturb.errors import LogError, ModelError, SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest, Parameter
from peerturb.noise import Estimator
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.rng import SIDE_LEFT, linear_signs, stream_of
from peerturb.spec import RunSpec
from peerturb_node.compute.base import HeldOut, Measured

ELEMENTS = 256
_VOID = -128


class ToyCompute:
    """Loss: half the mean square distance to a target; every slot's target lies a little elsewhere."""

    is_blocking = False
    checkpoint_name = "checkpoint.bin"

    def __init__(
        self, spec: RunSpec, *, has_held_out: bool = True, estimator: Literal["auto", "spsa", "exact"] = "auto"
    ) -> None:
        self._spec = spec
        allowed = spec.perturbation.estimators
        if estimator not in ("auto", *allowed):
            raise SpecError(f'estimator = "{estimator}" is not allowed in this run; set estimator = "auto"')
        self.estimator: Estimator = allowed[-1] if estimator == "auto" else estimator
        self.has_held_out = has_held_out
        self.base_digest = bytes.fromhex(spec.model.digest)
        self.manifest: Manifest = (Parameter(index=0, name="weight", shape=(ELEMENTS,), dtype="float32"),)
        self._target = self._noise("target", 1.0)
        self.rounds = 0
        self._weights = np.zeros(ELEMENTS, np.float32)

    def apply(self, sealed: RoundSealed) -> None:
        """Add the round's exact integer update, in two separately rounded operations."""
        if sealed.round != self.rounds:
            raise LogError(f"round {sealed.round} cannot be applied to weights after {self.rounds} rounds")
        total = np.zeros(ELEMENTS, np.int64)
        for slot, codes in sealed.contributions():
            values = np.frombuffer(codes, np.int8).astype(np.int64)
            values[values == _VOID] = 0
            total += values @ self._signs(sealed.round, slot, len(codes)).astype(np.int64)
        step = np.float32(sealed.alpha) * total.astype(np.float32)
        self._weights = self._weights - step
        self.rounds += 1

    def digest(self) -> bytes:
        """Return a SHA-256 of round and weights."""
        if self.rounds == 0:
            return self.base_digest  # as with a real model that trains all its parameters
        return hashlib.sha256(self.rounds.to_bytes(8, "little") + self._weights.tobytes()).digest()

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        """Measure every probe (one-sided against the loss of plain weights) or project the gradient, and encode."""
        sides, epsilon = self._spec.perturbation.side_count, np.float32(self._spec.perturbation.epsilon)
        offset = self._weights - (self._target + self._noise(f"slot {slot}", 0.1))
        signs = self._signs(work.round, slot, work.count)
        if self.estimator == "exact":
            units = signs @ (offset.astype(np.float64) / ELEMENTS) / work.scale
            codes = np.clip(np.rint(units), -127, 127).astype(np.int8)
            return Measured(codes=codes.tobytes(), loss=0.5 * float(np.mean(offset.astype(np.float64) ** 2)))
        moved = epsilon * signs.astype(np.float32)
        plus = 0.5 * np.mean((offset + moved).astype(np.float64) ** 2, axis=1)
        reference = 0.5 * np.mean((offset - (sides - 1) * moved).astype(np.float64) ** 2, axis=1)
        units = (plus - reference) / (sides * float(epsilon)) / work.scale
        codes = np.clip(np.rint(units), -127, 127).astype(np.int8)
        return Measured(codes=codes.tobytes(), loss=float(np.mean((plus + reference) / 2)))

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return the loss against the common target."""
        if not self.has_held_out:
            return None
        loss = 0.5 * float(np.mean((self._weights - self._target).astype(np.float64) ** 2))
        return HeldOut(loss=loss, accuracy=None, examples=1)

    def reset(self) -> None:
        """Go back to zero."""
        self.rounds = 0
        self._weights = np.zeros(ELEMENTS, np.float32)

    def save(self, path: Path, *, position: int, chain: bytes) -> None:
        """Write round and weights, with their digest in front."""
        draft = path.with_suffix(".new")
        draft.write_bytes(self.digest() + self.rounds.to_bytes(8, "little") + self._weights.tobytes())
        draft.replace(path)

    def restore(self, path: Path) -> int:
        """Read what `save` wrote."""
        data = path.read_bytes()
        if len(data) != 40 + 4 * ELEMENTS:
            raise ModelError(f"the checkpoint {path} is damaged: it has {len(data)} bytes")
        self.rounds = int.from_bytes(data[32:40], "little")
        self._weights = np.frombuffer(data[40:], np.float32).copy()
        if self.digest() != data[:32]:
            raise ModelError(f"the checkpoint {path} is damaged: its digest does not fit its weights")
        return self.rounds

    def export(self, folder: Path) -> None:
        """There is no model."""
        raise ModelError("the toy compute has no model to export")

    def close(self) -> None:
        """Nothing is held."""

    def _signs(self, round: RoundNumber, slot: Slot, count: int) -> NDArray[np.int8]:
        """Return int8[count, ELEMENTS]."""
        return linear_signs(
            stream_of(0, SIDE_LEFT),
            0,
            ELEMENTS,
            round=round,
            run_key=self._spec.run_key,
            slots=slot,
            samples=np.arange(count),
        )

    def _noise(self, purpose: str, size: float) -> NDArray[np.float32]:
        """Return a fixed vector of +size and -size that belongs to the run and a purpose."""
        bits = hashlib.shake_128(self._spec.digest + purpose.encode()).digest(ELEMENTS // 8)
        signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(bits, np.uint8)).astype(np.float32)
        return (size * signs).astype(np.float32)
