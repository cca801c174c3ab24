"""What this machine brings to a run, made ready: base model, losses in the wanted type, data. For nodes and `tune`.

It knows nothing of rounds: whoever writes the weights says so, and the next losses follow them.
"""

import torch

from peerturb.errors import DataError, ModelError
from peerturb.spec import RunSpec
from peerturb.zo.base import open_base
from peerturb.zo.batch import Runner
from peerturb.zo.model import TORCH_DTYPES, build_manifest, trainable_weights
from peerturb.zo.objective import Objective
from peerturb.zo.resolution import epsilon_warning
from peerturb.zo.shadow import Shadow, compute_dtype
from peerturb_node.data import local_objective
from peerturb_node.settings import NodeSettings


class Prepared:
    """Model, private data and held-out data on one device.

    Attributes:
        source: folder or hub name that the model was loaded from.
        device: where the tensors are.
        model: the model with the weights, in the run's type; the adapter attached, if the run has one.
        named: trained tensors by name, in manifest order.
        compute_dtype: type in which losses are computed.
        runner: gives losses in that type.
        items: training examples.
        held_out: held-out examples; empty if no file is given.

    Raises:
        ModelError: the model cannot be loaded or perturbed.
        DataError: no training data are given, or a file cannot be used.
        RefusedError: its base weights are not the run's; the message has both digests.
    """

    def __init__(self, spec: RunSpec, settings: NodeSettings) -> None:
        if settings.data is None:
            raise DataError("no training data given: --data FILE says what to learn from")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.source = settings.model or spec.model.name
        self.device = choose_device(settings.device)
        self.model, self.tokenizer = open_base(self.source, spec, device=self.device)
        self.manifest = build_manifest(self.model, spec.model)
        self.named = trainable_weights(self.model, self.manifest)
        self._dtype = compute_dtype(settings.compute_dtype, spec.model.dtype, self.device)
        self.compute_dtype = str(self._dtype).removeprefix("torch.")
        self._shadow = None if self._dtype == TORCH_DTYPES[spec.model.dtype] else Shadow(self.model, self._dtype)
        objective = Objective.of(local_objective(spec.objective, settings), self.model, self.tokenizer)
        self.items = objective.load(settings.data.expanduser())
        evaluated = self.model if self._shadow is None else self._shadow.model
        self.runner = Runner(evaluated, self.manifest, objective)
        self.held_out = objective.load(settings.eval.expanduser()) if settings.eval is not None else []

    def warning(self, epsilon: float) -> str | None:
        """Return what the operator should know about an epsilon in this type, or None."""
        return epsilon_warning(self.runner.parameters, epsilon, self._dtype)

    def changed(self) -> None:
        """Note that the weights are others than those losses were last computed from."""
        if self._shadow is not None:
            self._shadow.expire()

    def refresh(self) -> None:
        """Let losses follow the weights; not after every update: a replay of many rounds needs it once."""
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
