"""Frozen base models in 4 or 8 bits, under an adapter in floating point.

Weights alone are quantised: activations keep their type, because rounding them would hide the small differences that
probes measure. 4-bit layers are bitsandbytes'. Everything is quantised on the CPU whatever the device, so that equal
base models give equal bytes; the base digest covers those bytes. Knows nothing of adapters.
"""

import hashlib
import logging
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peerturb.errors import ModelError
from peerturb.spec import Quantise
from peerturb.zo.digest import tensor_digest
from peerturb.zo.kinds import output_head

BLOCK = 64
"""Weights that share a scale in the 4-bit kinds; layers whose rows are no multiple of it stay as they are."""

FLOATS_SHOWN, FLOAT_SHARE_MIN = 3, 0.01
"""How many names of weights in floating point a line has room for, and the smallest share worth naming."""


class Int8Linear(nn.Linear):
    """A linear layer with weights q * scale: q int8 [out, in], scale f32 [out], one for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        wide = layer.weight.data.float().cpu()
        scale = wide.abs().amax(1) / 127
        quotient = wide / torch.where(scale > 0, scale, 1.0)[:, None]
        place = layer.weight.device
        self.weight = nn.Parameter(quotient.round().clamp(-127, 127).to(torch.int8).to(place), requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", scale.to(place))
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias; W exists for the time of the product."""
        return F.linear(x, (self.weight * self.scale[:, None]).to(x.dtype), self.bias)


def quantise_base(model: Any, kind: Quantise | None) -> None:
    """Replace the linear layers, but for the output head, by quantised ones; nothing if `kind` is None.

    Raises:
        ModelError: bitsandbytes is missing or does not work here, or no layer can be quantised.
    """
    if kind is None:
        return
    library = None if kind == "int8" else _library()
    head = output_head(model)
    # Layers whose input a model converts to the type of their weights (T5's `wo`): packed bytes are not such a type.
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    count = 0
    for name, layer in list(model.named_modules()):
        if kept & set(name.split(".")) and kind != "int8":
            continue
        if type(layer) is not nn.Linear or name in head or (kind != "int8" and layer.in_features % BLOCK):
            continue
        try:
            fresh = Int8Linear(layer) if kind == "int8" else _four_bits(library, layer, kind)
        except (RuntimeError, NotImplementedError, OSError) as error:
            raise ModelError(
                f"bitsandbytes cannot quantise {name} to {kind} on this computer: {str(error).splitlines()[0]:.200}; "
                "leave out model.quantise"
            ) from error
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fresh)
        count += 1
    if not count:
        why = "" if kind == "int8" else f" whose rows are a multiple of {BLOCK} long"
        if any(isinstance(layer, Conv1D) for layer in model.modules()):
            why = ": this model's layers are transformers' Conv1D (as GPT-2's), which is another"
        raise ModelError(f'model.quantise = "{kind}" finds no layer of torch.nn.Linear to quantise{why}; leave it out')
    model.eval().requires_grad_(False)


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let quantised layers compute in this type: bitsandbytes' convert activations to the one they were made with."""
    for module in model.modules():
        if _is_packed(module) and not isinstance(module, Int8Linear):
            module.compute_dtype = dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What of a frozen base is held in few bits."""

    kind: str
    """How, as in `model.quantise`."""
    weights: int
    """Of the base."""
    packed: int
    """Of these in few bits."""
    floats: dict[str, int]
    """The others by name, numbers of layers as `*`: how many weights, most first."""

    @classmethod
    def of(cls, model: nn.Module, trained: Collection[str]) -> Self | None:
        """Count the weights of a model; None if none is quantised.

        Args:
            model: with or without its adapter.
            trained: names of parameters that do not belong to the base.
        """
        layers = {f"{name}.weight": module for name, module in model.named_modules() if _is_packed(module)}
        if not layers:
            return None
        kind, _ = _parts(*next(iter(layers.items())))
        floats: dict[str, int] = {}
        packed = 0
        for name, tensor in model.named_parameters():
            layer: Any = layers.get(name)
            if layer is not None:
                packed += layer.in_features * layer.out_features
            elif name not in trained:
                shown = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.replace(".base_layer.", "."))
                floats[shown] = floats.get(shown, 0) + tensor.numel()
        ordered = dict(sorted(floats.items(), key=lambda item: -item[1]))
        return cls(kind=kind, weights=packed + sum(floats.values()), packed=packed, floats=ordered)

    @property
    def text(self) -> str:
        """Say it in a line: the share, and the largest of what stays in floating point."""
        shares = {name: count / self.weights for name, count in self.floats.items()}
        large = [f"{name} ({share:.0%})" for name, share in shares.items() if share >= FLOAT_SHARE_MIN]
        named = ", ".join(large[:FLOATS_SHOWN]) + (" and others" if len(large) > FLOATS_SHOWN else "")
        stay = f"; in floating point stay {named}" if named else ""
        return f"{self.kind} holds {self.packed / self.weights:.0%} of the base's {self.weights:,} weights{stay}"


def is_quantised(model: nn.Module) -> bool:
    """True if some layer is."""
    return any(_is_packed(module) for module in model.modules())


def quantised_digest(model: nn.Module, kind_of_floats: str) -> str:
    """Return RunSpec `model.digest` of a quantised model, hexadecimal: SHA-256 over all parameters by name.

    A floating-point tensor contributes as to a run digest. A quantised one: its name and its kind, each with its length
    before it, then for its packed bytes and its scales their number of bytes and their SHA-256 (docs/numerics.md).

    Raises:
        ModelError: a forward has been run, which on some CPUs rearranges the bytes.
    """
    packed = {f"{name}.weight": module for name, module in model.named_modules() if _is_packed(module)}
    state = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.named_parameters(remove_duplicate=False)):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        state.update(_text(name))
        if name not in packed:
            state.update(struct.pack(f"<I{tensor.dim()}Q", tensor.dim(), *tensor.shape))
            state.update(_text(kind_of_floats) + struct.pack("<Q", tensor_digest(tensor)))
            continue
        kind, parts = _parts(name, packed[name])
        state.update(_text(kind))
        for part in parts:
            data = _bytes(part)
            state.update(struct.pack("<Q", len(data)) + hashlib.sha256(data).digest())
    return state.hexdigest()


def _four_bits(library: Any, layer: nn.Linear, kind: Quantise) -> nn.Module:
    place, has_bias = layer.weight.device, layer.bias is not None
    weight = layer.weight.data.cpu()
    fresh = library.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=has_bias, quant_type=kind, compute_dtype=weight.dtype
    )
    # On some CPUs it would rearrange the bytes and compute in bfloat16, whatever the type of the activations.
    fresh.support_avx512bf16_for_cpu = False
    fresh.weight = library.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, blocksize=BLOCK, compress_statistics=False, module=fresh
    )
    if has_bias:
        fresh.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    on_cpu = fresh.to("cpu")
    placed: nn.Module = on_cpu if place.type == "cpu" else on_cpu.to(place)
    return placed


def _is_packed(module: nn.Module) -> bool:
    is_theirs = type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)
    return isinstance(module, Int8Linear) or is_theirs


def _parts(name: str, layer: Any) -> tuple[str, tuple[Tensor, Tensor]]:
    """Return the kind, and packed weights and scales."""
    if isinstance(layer, Int8Linear):
        return "int8", (layer.weight.data, layer.scale)
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(f"the bytes of {name} have been rearranged by bitsandbytes; take the digest before a forward")
    return str(state.quant_type), (layer.weight.data, state.absmax)


def _bytes(part: Tensor) -> bytes:
    flat = part.detach().cpu().contiguous().view(torch.uint8).reshape(-1)
    array: np.ndarray[Any, np.dtype[np.uint8]] = flat.numpy()
    return array.tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _library() -> Any:
    # It warns of kernels that it has substitutes for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f'model.quantise needs the package bitsandbytes ({error}); pip install "peerturb[quantised]"'
        ) from error
    return bitsandbytes
