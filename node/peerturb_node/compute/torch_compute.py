"""A compute on a real model: the engine of `peerturb.zo` behind the node's contract."""

from collections.abc import Callable
from pathlib import Path

import torch

from peerturb.errors import DataError, ModelError, RefusedError
from peerturb.spec import RunSpec
from peerturb.zo.adapter_files import export_adapter
from peerturb.zo.base import open_base
from peerturb.zo.batch import Runner
from peerturb.zo.evaluate import evaluate
from peerturb.zo.export import export_model
from peerturb.zo.model import TORCH_DTYPES, build_manifest, trainable_weights
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.quantised import Packing
from peerturb.zo.resolution import epsilon_warning
from peerturb.zo.shadow import Shadow, compute_dtype
from peerturb_node.compute.base import HeldOut
from peerturb_node.compute.replica import Replica
from peerturb_node.data import local_objective
from peerturb_node.settings import NodeSettings


class TorchCompute(Replica):
    """Model, private data and held-out data on one device.

    Attributes:
        compute_dtype: type in which losses are computed.
        warning: what the operator should know about epsilon, or None.
        packing: what of the base is quantised, or None.

    Raises:
        ModelError: the model cannot be loaded or perturbed.
        DataError: a data file cannot be used.
        RefusedError: its base weights are not the run's; the message has both digests.
    """

    def __init__(self, spec: RunSpec, settings: NodeSettings) -> None:
        if settings.data is None:
            raise DataError("no training data given: --data FILE says what this node learns from")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.rounds = 0
        self._spec = spec
        self.source = settings.model or spec.model.name
        self.device = choose_device(settings.device)
        self._model, self._tokenizer = open_base(self.source, spec, device=self.device)
        self.base_digest = bytes.fromhex(spec.model.digest)
        self.manifest = build_manifest(self._model, spec.model)
        self._named = trainable_weights(self._model, self.manifest)
        self._weights = list(self._named.values())
        self.packing = Packing.of(self._model, self._named)
        dtype = compute_dtype(settings.compute_dtype, spec.model.dtype, self.device)
        self._shadow = None if dtype == TORCH_DTYPES[spec.model.dtype] else Shadow(self._model, dtype)
        self.compute_dtype = str(dtype).removeprefix("torch.")
        objective = Objective.of(local_objective(spec.objective, settings), self._model, self._tokenizer)
        sequences = objective.load(settings.data.expanduser())
        evaluated = self._model if self._shadow is None else self._shadow.model
        self._runner = Runner(evaluated, self.manifest, objective)
        self.warning = epsilon_warning(self._runner.parameters, spec.perturbation.epsilon, dtype)
        self._engine = ProbeEngine(self._runner, spec, sequences, rows_max=settings.rows or None)
        self._held_out = objective.load(settings.eval.expanduser()) if settings.eval is not None else []
        self.has_held_out = bool(self._held_out)

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return loss (and accuracy) on the held-out sequences."""
        if not self._held_out:
            return None
        self._refresh()
        result = evaluate(self._runner, self._held_out, should_stop=is_cancelled)
        if result is None:
            return None
        return HeldOut(loss=result.loss, accuracy=result.accuracy, examples=result.examples)

    def reset(self) -> None:
        """Load the base weights again, into the same tensors."""
        try:
            fresh, _ = open_base(self.source, self._spec)
        except RefusedError as error:
            raise ModelError(f"the base weights in {self.source} have changed since the node started") from error
        source = trainable_weights(fresh, self.manifest).values()
        for weight, base in zip(self._weights, source, strict=True):
            weight.copy_(base)
        self._changed()
        self.rounds = 0

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; of a run with an adapter, the adapter's."""
        if self._spec.model.adapter is not None:
            export_adapter(self._model, self._spec, folder)
            return
        export_model(self._model, self._tokenizer, folder)

    def _changed(self) -> None:
        if self._shadow is not None:
            self._shadow.expire()

    def _refresh(self) -> None:
        if self._shadow is not None:
            self._shadow.refresh()


def choose_device(name: str) -> torch.device:
    """Return the device a setting means.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"there is no device {name}; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
