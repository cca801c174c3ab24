"""Write an adapter as peft reads it, or put it into the base weights for good.

Both give the same bytes on every machine: the files hold nothing but the run's values, and the merged weights are
defined operation by operation.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peerturb.errors import ModelError
from peerturb.spec import AdapterSpec, RunSpec
from peerturb.zo.adapters import NAME, is_adapter_tensor, shared_matrices, trained_whole
from peerturb.zo.files import write_folder
from peerturb.zo.kinds import kind_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classes": "SEQ_CLS"}
"""What peft calls the kinds of models."""

PREFIX = "base_model.model."
"""What peft puts before the names of the model's own tensors."""


def export_adapter(model: Any, spec: RunSpec, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, at once or not at all.

    Raises:
        ModelError: the run has no adapter, the folder holds something else, or it cannot be written.
    """
    adapter = _adapter(spec)
    whole = trained_whole(model)
    tensors = {
        PREFIX + name.replace(f".{NAME}", ""): tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if is_adapter_tensor(name) or name in whole
    }
    names = adapted_layers(model)
    if adapter.kind == "vera":
        for name, holder in shared_matrices(model, names[0]):
            tensors[f"base_model.{name}"] = holder[NAME].detach().cpu().contiguous()
    columns_first = isinstance(model.get_submodule(names[0]).get_base_layer(), Conv1D)
    document = _document(spec, adapter, names, has_columns_first=columns_first)
    document["task_type"] = TASK_TYPES[kind_of(model)]
    if whole:
        document["modules_to_save"] = sorted({_saved_module(name, model.base_model_prefix) for name in whole})

    def write(draft: Path) -> None:
        text = json.dumps(document, indent=2, sort_keys=True)
        (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
        try:
            save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})  # one key: the order of several is chance
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_folder(folder, write, marker=CONFIG)


def _saved_module(name: str, prefix: str) -> str:
    """Return the module by which peft knows a tensor that is trained whole: the head's first name, or the pooler."""
    parts = name.split(".")
    return parts[0] if parts[0] != prefix else "pooler"


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Put the adapter into the base weights, and the base layers back into their places.

    In f64: one term scale * left[:, r] * right[r, :] after the other is added to the weight, then the sum is rounded
    to f32 and from there to the weight's type. The order is fixed, so the bytes do not depend on the machine.

    Raises:
        ModelError: a base layer is quantised.
    """
    for name in adapted_layers(model):
        layer = model.get_submodule(name)
        base = layer.get_base_layer()
        if not base.weight.is_floating_point() or type(base).__module__.startswith("bitsandbytes"):
            raise ModelError(
                f"the layer {name} is quantised, so the adapter cannot be put into its weights; export the adapter "
                "without --merge, and load it onto the quantised base model"
            )
    for name in adapted_layers(model):
        layer = model.get_submodule(name)
        base = layer.get_base_layer()
        left, right, scale = _factors(layer)
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        total = weight.double()
        for rank in range(left.shape[1]):
            term = left[:, rank : rank + 1] * right[rank : rank + 1]
            total.add_(term.mul_(scale))
        weight.copy_(total.float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    if hasattr(model, "peft_config"):
        del model.peft_config


def adapted_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that have an adapter, sorted."""
    found = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".base_layer")}
    return sorted(found)


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Return left [out, rank] and right [rank, in] in f64, and what their product is multiplied by."""
    if hasattr(layer, "lora_A"):
        return layer.lora_B[NAME].weight.double(), layer.lora_A[NAME].weight.double(), float(layer.scaling[NAME])
    left = layer.vera_lambda_b[NAME].double()[:, None] * layer.vera_B[NAME][: layer.out_features].double()
    right = layer.vera_lambda_d[NAME].double()[:, None] * layer.vera_A[NAME][:, : layer.in_features].double()
    return left, right, 1.0


def _adapter(spec: RunSpec) -> AdapterSpec:
    if spec.model.adapter is None:
        raise ModelError("this run trains the model itself, not an adapter")
    return spec.model.adapter


def _document(spec: RunSpec, adapter: AdapterSpec, names: list[str], *, has_columns_first: bool) -> dict[str, Any]:
    """Return peft's configuration: what it needs, and nothing that depends on its release."""
    document: dict[str, Any] = {
        "base_model_name_or_path": spec.model.name,
        "bias": "none",
        "fan_in_fan_out": has_columns_first,
        "inference_mode": True,
        "peft_type": adapter.kind.upper(),
        "r": adapter.rank,
        "target_modules": names,
    }
    if adapter.kind == "vera":
        return document | {"save_projection": True, "vera_dropout": 0.0}
    return document | {"lora_alpha": adapter.alpha, "lora_dropout": 0.0}
