"""A compute without numerics: plausible random codes at once. It measures what the protocol costs, and nothing else."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from peerturb.errors import LogError, ModelError
from peerturb.ids import Slot
from peerturb.manifest import Manifest
from peerturb.noise import Estimator
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb_node.compute.base import HeldOut, Measured


class StubCompute:
    """Random codes; the "weights" are a running hash of the applied rounds, so digests still tell replicas apart."""

    is_blocking = False
    estimator: Estimator = "spsa"
    manifest: Manifest = ()
    has_held_out = False
    checkpoint_name = "checkpoint.txt"

    def __init__(self, spec: RunSpec) -> None:
        self.base_digest = bytes.fromhex(spec.model.digest)
        self.rounds = 0
        self._state = self.base_digest
        # Distributed like real codes (normal, rms 32): the feed is compressed, so the distribution shows on the wire.
        draw = random.Random(spec.seed)
        self._codes = bytes(max(-127, min(127, round(draw.gauss(0.0, 32.0)))) & 0xFF for _ in range(1 << 16))

    def apply(self, sealed: RoundSealed) -> None:
        """Fold the round into the running hash."""
        if sealed.round != self.rounds:
            raise LogError(f"round {sealed.round} cannot be applied to weights after {self.rounds} rounds")
        self._state = hashlib.sha256(self._state + sealed.codes).digest()
        self.rounds += 1

    def digest(self) -> bytes:
        """Return the running hash."""
        return self._state

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        """Return codes cut from a fixed pool."""
        start = (work.round * 7919 + slot * 104_729) % (len(self._codes) - work.count + 1)
        return Measured(codes=self._codes[start : start + work.count], loss=1.0 / (1 + work.round))

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """There is nothing to evaluate."""
        return None

    def reset(self) -> None:
        """Forget all rounds."""
        self.rounds, self._state = 0, self.base_digest

    def save(self, path: Path, *, position: int, chain: bytes) -> None:
        """Write round and hash."""
        draft = path.with_suffix(".new")
        draft.write_text(f"{self.rounds} {self._state.hex()}\n", encoding="ascii")
        draft.replace(path)

    def restore(self, path: Path) -> int:
        """Read what `save` wrote."""
        try:
            rounds, state = path.read_text(encoding="ascii").split()
            self.rounds, self._state = int(rounds), bytes.fromhex(state)
        except (OSError, ValueError) as error:
            raise ModelError(f"the checkpoint {path} is damaged: {error}") from error
        return self.rounds

    def export(self, folder: Path) -> None:
        """There is no model."""
        raise ModelError("the stub compute has no model to export")

    def close(self) -> None:
        """Nothing is held."""
