"""A compute on a real model: the engine of `peerturb.zo` behind the node's contract."""

from collections.abc import Callable
from pathlib import Path

from peerturb.errors import ModelError, RefusedError
from peerturb.spec import RunSpec
from peerturb.zo.adapter_files import export_adapter
from peerturb.zo.base import open_base
from peerturb.zo.choosing import choose_engine
from peerturb.zo.evaluate import evaluate
from peerturb.zo.export import export_model
from peerturb.zo.model import trainable_weights
from peerturb.zo.quantised import Packing
from peerturb_node.compute.base import HeldOut
from peerturb_node.compute.prepared import Prepared
from peerturb_node.compute.replica import Replica
from peerturb_node.settings import NodeSettings


class TorchCompute(Replica):
    """Model, private data and held-out data on one device.

    Attributes:
        compute_dtype: type in which losses are computed.
        warning: what the operator should know about epsilon, or None.
        choice: why the estimator is what it is; empty where there was no choice.
        slowness: why probes are measured one at a time, or None.
        packing: what of the base is quantised, or None.

    Raises:
        ModelError: the model cannot be loaded or perturbed.
        DataError: a data file cannot be used.
        RefusedError: its base weights are not the run's; the message has both digests.
    """

    def __init__(self, spec: RunSpec, settings: NodeSettings) -> None:
        self.rounds = 0
        self._spec = spec
        self._prepared = Prepared(spec, settings)
        self.base_digest = bytes.fromhex(spec.model.digest)
        self.manifest = self._prepared.manifest
        self._named = self._prepared.named
        self._weights = list(self._named.values())
        self.packing = Packing.of(self._prepared.model, self._named)
        self.compute_dtype = self._prepared.compute_dtype
        self.warning = self._prepared.warning(spec.perturbation.epsilon)
        chosen = choose_engine(
            self._prepared.runner, spec, self._prepared.items,
            wanted=settings.estimator, rows_max=settings.rows or None,
            activations=settings.activations, carry=settings.carry,
        )  # fmt: skip
        self._engine, self.estimator, self.choice = chosen.engine, chosen.estimator, chosen.why
        self.slowness = self._engine.slowness
        self.has_held_out = bool(self._prepared.held_out)

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return loss (and accuracy) on the held-out sequences."""
        if not self.has_held_out:
            return None
        self._refresh()
        result = evaluate(self._prepared.runner, self._prepared.held_out, should_stop=is_cancelled)
        if result is None:
            return None
        return HeldOut(loss=result.loss, accuracy=result.accuracy, examples=result.examples)

    def reset(self) -> None:
        """Load the base weights again, into the same tensors."""
        source = self._prepared.source
        try:
            fresh, _ = open_base(source, self._spec)
        except RefusedError as error:
            raise ModelError(f"the base weights in {source} have changed since the node started") from error
        for weight, base in zip(self._weights, trainable_weights(fresh, self.manifest).values(), strict=True):
            weight.copy_(base)
        self._changed()
        self._forget()
        self.rounds = 0

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; of a run with an adapter, the adapter's."""
        if self._spec.model.adapter is not None:
            export_adapter(self._prepared.model, self._spec, folder)
            return
        export_model(self._prepared.model, self._prepared.tokenizer, folder)

    def _changed(self) -> None:
        self._prepared.changed()

    def _refresh(self) -> None:
        self._prepared.refresh()
