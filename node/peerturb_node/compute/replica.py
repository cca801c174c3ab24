"""What computes on real tensors share: apply, digest, measure, checkpoint. Each brings its own tensors and losses."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peerturb.errors import LogError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.noise import Estimator
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from peerturb.zo.digest import run_digest
from peerturb.zo.exact import ExactEngine
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.update import apply_update
from peerturb_node.compute.base import Measured


class Replica:
    """The common part; a compute sets the attributes below."""

    is_blocking = True
    estimator: Estimator = "spsa"
    checkpoint_name = "checkpoint.safetensors"
    rounds: int
    base_digest: bytes
    manifest: Manifest
    _spec: RunSpec
    _named: dict[str, Tensor]
    """Trained tensors in manifest order."""
    _weights: list[Tensor]
    _engine: ProbeEngine[Any] | ExactEngine[Any]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights[0].device

    def release(self) -> None:
        """Give memory back that only speeds up the next forward pass; on a card others may want it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def apply(self, sealed: RoundSealed) -> None:
        """Update the weights in place, exactly."""
        if sealed.round != self.rounds:
            raise LogError(f"round {sealed.round} cannot be applied to weights after {self.rounds} rounds")
        apply_update(
            self._weights,
            self.manifest,
            family=self._spec.perturbation.family,
            run_key=self._spec.run_key,
            round=sealed.round,
            slots=sealed.slots,
            counts=sealed.counts,
            codes=sealed.codes,
            alpha=sealed.alpha,
        )
        self._changed()
        self.rounds += 1

    def digest(self) -> bytes:
        """Return the run digest of the trained tensors."""
        return run_digest(self.manifest, self._weights)

    def measure(self, work: Measure, slot: Slot, is_cancelled: Callable[[], bool]) -> Measured:
        """Measure, encode; end early when cancelled or, with probes, when the RunSpec's time budget is spent."""
        self._refresh()
        budget_s = self._spec.round.budget_ms / 1e3 if self.estimator == "spsa" else 0.0
        end_s = time.monotonic() + budget_s if budget_s else float("inf")
        result = self._engine.contribute(
            RoundNumber(work.round),
            slot=slot,
            scale=work.scale,
            count=work.count,
            should_stop=lambda: is_cancelled() or time.monotonic() >= end_s,
        )
        return Measured(codes=result.codes.tobytes(), loss=result.loss, tokens=result.tokens)

    def save(self, path: Path, *, position: int, chain: bytes) -> None:
        """Write the trained tensors and the round."""
        info = CheckpointInfo(
            spec_digest=self._spec.digest.hex(),
            base_digest=self.base_digest.hex(),
            round=self.rounds,
            position=position,
            chain=chain.hex(),
        )
        save_checkpoint(path, self.manifest, self._named, info)

    def restore(self, path: Path) -> int:
        """Read them back."""
        info = load_checkpoint(
            path,
            self.manifest,
            self._named,
            spec_digest=self._spec.digest.hex(),
            base_digest=self.base_digest.hex(),
        )
        self._changed()
        self.rounds = info.round
        return self.rounds

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def _forget(self) -> None:
        """Forget what measurements have carried over."""
        if isinstance(self._engine, ExactEngine):
            self._engine.forget()

    def _changed(self) -> None:
        """Note that the weights are others than those losses were last computed from."""

    def _refresh(self) -> None:
        """Make ready to compute losses; not after every update: a replay of many rounds needs it once."""
