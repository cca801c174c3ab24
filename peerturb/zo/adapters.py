"""Attach adapters to a frozen base model, with the same first values on every machine.

The layers are `peft`'s; their values are not: they come from the run's seed by Philox and one float32 product an
element, whatever the release of torch or peft (docs/numerics.md). Knows nothing of probes; files are
`peerturb.zo.adapter_files`'.
"""

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peerturb import rng
from peerturb.errors import ModelError
from peerturb.spec import AdapterSpec, ModelSpec
from peerturb.zo.heads import is_new
from peerturb.zo.kinds import kind_of, output_head

NAME = "default"
"""What peft calls the adapter inside the model; its files leave this out."""

MARKS = {
    "lora": (f".lora_A.{NAME}.", f".lora_B.{NAME}."),
    "vera": (f".vera_lambda_b.{NAME}", f".vera_lambda_d.{NAME}"),
}
"""By what the names of trained tensors are known, by kind."""

EXPERT_LAYERS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Last names of layers that peft, in models with expert stacks, takes for the experts and so gives no adapter."""

VERA_START = 0.1
"""First value of VeRA's inner vector; the outer one begins at zero."""

INIT_KEY = b"peerturb adapter 1\0"
"""What is hashed before seed and name."""

BLOCKS_AT_ONCE = 1 << 18
"""Philox blocks of a tensor made at a time."""


def attach_adapter(model: Any, spec: ModelSpec, *, seed: int) -> None:
    """Give the model the adapter that the RunSpec asks for, if any; take the base digest before.

    Args:
        model: as `peerturb.zo.model.load_model` returns it.
        spec: the RunSpec's section `model`.
        seed: the RunSpec's.

    Afterwards `peerturb.zo.model.build_manifest` numbers the adapter's tensors only.

    Raises:
        ModelError: peft is missing, or a pattern of `model.adapter.targets` names no linear layer.
    """
    adapter = spec.adapter
    if adapter is None:
        return
    if is_adapted(model):
        raise ModelError("the model has an adapter already; load the base model anew")
    names = target_names(model, adapter)
    peft = _peft()
    config = _config(peft, adapter, names, has_columns_first=_has_columns_first(model, names))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # advice about training by backpropagation
        # The layers are put into the model itself. Kinds that share tensors allow this only by way of peft's wrapper.
        if adapter.kind == "vera":
            peft.get_peft_model(model, config, adapter_name=NAME, autocast_adapter_dtype=False)
        else:
            peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    for name in names:
        if not hasattr(model.get_submodule(name), "base_layer"):
            raise ModelError(f"peft gave the layer {name} no adapter; leave it out of model.adapter.targets")
    _initialise(model, adapter, seed, getattr(torch, spec.dtype), names)
    model.requires_grad_(False)
    model.eval()


def target_names(model: Any, adapter: AdapterSpec) -> list[str]:
    """Return the names of the linear layers that get an adapter, sorted: in a mixture of experts only the attention's.

    Raises:
        ModelError: a pattern matches no linear layer, or nothing but the output head.
    """
    head = output_head(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    has_experts = any(tensor.dim() == 3 for tensor in model.parameters())
    usable = sorted(
        name
        for name, module in layers.items()
        if name and name not in head and not (has_experts and name.rpartition(".")[2] in EXPERT_LAYERS)
    )
    for pattern in adapter.targets:
        if not any(fnmatchcase(name, pattern) for name in usable):
            is_head = any(fnmatchcase(name, pattern) for name in layers)
            why = "matches only layers that get no adapter (head, experts)" if is_head else "matches no linear layer"
            shown = ", ".join(usable[:3]) or "none"
            raise ModelError(f"the pattern {pattern!r} in model.adapter.targets {why}; the layers are {shown}, ...")
    return [name for name in usable if any(fnmatchcase(name, pattern) for pattern in adapter.targets)]


def is_adapter_tensor(name: str) -> bool:
    """True for a parameter that belongs to an adapter's own trained part."""
    return any(mark in name for marks in MARKS.values() for mark in marks)


def trained_whole(model: Any) -> list[str]:
    """Return the parameters that are trained beside the adapter: a classifier's head, with the pooler below it."""
    if kind_of(model) != "classes":
        return []
    return [name for name, _ in model.named_parameters() if is_new(name, model.base_model_prefix)]


def is_adapted(model: nn.Module) -> bool:
    """True if the model has an adapter."""
    return any(is_adapter_tensor(name) for name, _ in model.named_parameters())


def first_values(*, seed: int, name: str, shape: tuple[int, ...], bound: float) -> Tensor:
    """Return a tensor's first values: uniform between -bound and bound, float32, the same bits everywhere.

    Element e (row-major) takes word e mod 4 of the Philox block e div 4, all other counter words zero. The key is the
    first eight bytes of SHA-256 over INIT_KEY, the seed as u64 and the name in UTF-8, little endian. The word's upper
    24 bits k give (2 k + 1 - 2**24) / 2**24, which is exact, times f32(bound): one rounding.
    """
    digest = hashlib.sha256(INIT_KEY + seed.to_bytes(8, "little") + name.encode()).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    total = math.prod(shape)
    values = np.empty(-(-total // 4) * 4, np.float32)
    for start in range(0, len(values) // 4, BLOCKS_AT_ONCE):
        blocks = np.arange(start, min(start + BLOCKS_AT_ONCE, len(values) // 4), dtype=np.uint64)
        words = rng.philox(blocks, 0, 0, 0, key=key).reshape(-1)
        units = (2 * (words >> np.uint32(8)).astype(np.int64) + 1 - 2**24).astype(np.float32) * np.float32(2.0**-24)
        values[4 * start : 4 * start + len(units)] = units * np.float32(bound)
    return torch.from_numpy(values[:total].reshape(shape).copy())


def _initialise(model: nn.Module, adapter: AdapterSpec, seed: int, dtype: torch.dtype, names: list[str]) -> None:
    place = next(model.parameters()).device
    for name, tensor in model.named_parameters():
        if is_adapter_tensor(name):
            tensor.data = _START[adapter.kind](seed, name, tuple(tensor.shape)).to(place, dtype)
    if adapter.kind == "vera":
        for name, holder in shared_matrices(model, names[0]):
            shape = tuple(holder[NAME].shape)
            bound = math.sqrt(6.0 / shape[1])
            holder[NAME] = first_values(seed=seed, name=name, shape=shape, bound=bound).to(place, dtype)


def shared_matrices(model: nn.Module, layer: str) -> Iterator[tuple[str, Any]]:
    """Yield name and dictionary of the two matrices that all VeRA layers share."""
    module: Any = model.get_submodule(layer)
    yield "vera_A", module.vera_A
    yield "vera_B", module.vera_B


def is_shared_matrix(name: str) -> bool:
    """True for a buffer that is one of them, as a layer names it."""
    return name.endswith((f"vera_A.{NAME}", f"vera_B.{NAME}"))


def _lora_start(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """A uniform first factor, a second one of zeros: the model begins as its base."""
    if MARKS["lora"][1] in name:
        return torch.zeros(shape)
    return first_values(seed=seed, name=name, shape=shape, bound=1.0 / math.sqrt(shape[1]))


def _vera_start(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, VERA_START if "lambda_d" in name else 0.0)


_START: dict[str, Callable[[int, str, tuple[int, ...]], Tensor]] = {"lora": _lora_start, "vera": _vera_start}


def _has_columns_first(model: nn.Module, names: list[str]) -> bool:
    """True for GPT-2's layers, which store their matrix as [in, out]."""
    kinds = {isinstance(model.get_submodule(name), Conv1D) for name in names}
    if len(kinds) > 1:
        raise ModelError(
            "model.adapter.targets matches layers that store their matrix as [in, out] and others as [out, in]; "
            "name only one sort"
        )
    return kinds == {True}


def _config(peft: Any, adapter: AdapterSpec, names: list[str], *, has_columns_first: bool) -> Any:
    shared = {"r": adapter.rank, "target_modules": names, "bias": "none", "fan_in_fan_out": has_columns_first}
    if adapter.kind == "vera":
        return peft.VeraConfig(**shared, d_initial=VERA_START, save_projection=True)
    return peft.LoraConfig(**shared, lora_alpha=adapter.alpha, lora_dropout=0.0)


def _peft() -> Any:
    # bitsandbytes, which peft imports where it is installed, warns of kernels it has substitutes for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ModelError(f'model.adapter needs the package peft ({error}); pip install "peerturb[adapters]"') from error
    return peft
