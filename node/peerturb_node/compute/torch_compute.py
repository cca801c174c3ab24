"""A compute on a real model: the engine of `peerturb.zo` behind the node's contract."""

from collections.abc import Callable
from pathlib import Path

import torch

from peerturb.errors import DataError, ModelError, RefusedError, RejectCode
from peerturb.spec import RunSpec
from peerturb.zo.adapter_files import export_adapter
from peerturb.zo.adapters import attach_adapter
from peerturb.zo.batch import Runner
from peerturb.zo.evaluate import evaluate
from peerturb.zo.export import export_model
from peerturb.zo.model import base_digest, build_manifest, load_model, positions_max, trainable_weights
from peerturb.zo.objective import Objective
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.quantised import quantise_base
from peerturb_node.compute.base import HeldOut
from peerturb_node.compute.replica import Replica
from peerturb_node.data import local_objective
from peerturb_node.settings import NodeSettings


class TorchCompute(Replica):
    """Model, private data and held-out data on one device.

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
        self._model, self._tokenizer = load_model(self.source, spec.model.dtype, device=self.device)
        quantise_base(self._model, spec.model.quantise)
        digest = base_digest(self._model, spec.model.dtype)
        if digest != spec.model.digest:
            raise RefusedError(RejectCode.MODEL_MISMATCH, mismatch(spec, self.source, digest))
        self.base_digest = bytes.fromhex(digest)
        attach_adapter(self._model, spec.model, seed=spec.seed)
        self.manifest = build_manifest(self._model, spec.model)
        self._named = trainable_weights(self._model, self.manifest)
        self._weights = list(self._named.values())
        objective = Objective(
            local_objective(spec.objective, settings), self._tokenizer, positions_max=positions_max(self._model)
        )
        sequences = objective.load(settings.data.expanduser())
        self._runner = Runner(self._model, self.manifest, objective)
        self._engine = ProbeEngine(self._runner, spec, sequences, rows_max=settings.rows or None)
        self._held_out = objective.load(settings.eval.expanduser()) if settings.eval is not None else []
        self.has_held_out = bool(self._held_out)

    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return loss (and accuracy) on the held-out sequences."""
        if not self._held_out:
            return None
        result = evaluate(self._runner, self._held_out, should_stop=is_cancelled)
        if result is None:
            return None
        return HeldOut(loss=result.loss, accuracy=result.accuracy, examples=result.examples)

    def reset(self) -> None:
        """Load the base weights again, into the same tensors."""
        fresh, _ = load_model(self.source, self._spec.model.dtype)
        quantise_base(fresh, self._spec.model.quantise)
        if base_digest(fresh, self._spec.model.dtype) != self._spec.model.digest:
            raise ModelError(f"the base weights in {self.source} have changed since the node started")
        attach_adapter(fresh, self._spec.model, seed=self._spec.seed)
        source = trainable_weights(fresh, self.manifest).values()
        for weight, base in zip(self._weights, source, strict=True):
            weight.copy_(base)
        self.rounds = 0

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; of a run with an adapter, the adapter's."""
        if self._spec.model.adapter is not None:
            export_adapter(self._model, self._spec, folder)
            return
        export_model(self._model, self._tokenizer, folder)


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


def mismatch(spec: RunSpec, source: str, digest: str) -> str:
    """Say that base weights differ, naming both sides."""
    return (
        f"the base weights differ: the run wants {spec.model.name!r} with digest {spec.model.digest} "
        f"({spec.model.dtype}), {source!r} has {digest}; get the same model, or name its folder with --model"
    )
