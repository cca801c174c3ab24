"""Run mixture-of-experts layers so that every routed token still knows the row it came from.

Routing mixes the tokens of all rows, and a perturbed forward has to tell rows apart. `use_row_experts` therefore gives
the models' expert layers an implementation of their own, through the interface that transformers has for this; the
operations in it that touch weights are `expert_linear` and `expert_bias`, which `peerturb.zo.operations` follows.
Knows nothing of perturbations.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "peerturb_rows"
"""Name under which transformers knows `experts_forward`."""

GROUPED_ALIGNMENT_BYTES = 16
"""The grouped product on CUDA wants rows of a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which token goes to which expert: one entry for each (token, chosen expert), sorted by expert, then by token."""

    experts: Tensor
    """[pairs] int64, ascending."""
    tokens: Tensor
    """[pairs] int64: number of the token, counted through the batch row by row."""
    ends: Tensor
    """[experts] int32: where each expert's pairs end."""
    tokens_total: int
    """Tokens in the batch: a multiple of its rows."""


def use_row_experts(model: nn.Module) -> None:
    """Let every expert layer of a transformers model run through `experts_forward`; others stay as they are."""
    for module in model.modules():
        # What transformers' decorator for expert layers leaves on each of them.
        if all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
            config: Any = module.config
            config._experts_implementation = IMPLEMENTATION


def expert_linear(x: Tensor, weight: Tensor, routing: Routing, *, is_transposed: bool) -> Tensor:
    """Multiply each pair's activation by its expert's matrix.

    Args:
        x: [pairs, in], in the order of `routing`.
        weight: [experts, out, in], or [experts, in, out] where `is_transposed`.

    Returns:
        [pairs, out].
    """
    if has_torch_function((x, weight)):
        result: Tensor = handle_torch_function(
            expert_linear, (x, weight), x, weight, routing, is_transposed=is_transposed
        )
        return result
    stack = weight if is_transposed else weight.transpose(1, 2)
    if _can_group(x, weight):
        return F.grouped_mm(x, stack, offs=routing.ends)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):  # no `out` can be differentiated
        counts = routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist()
        return torch.cat([part @ matrix for part, matrix in zip(x.split(counts), stack, strict=True)])
    y = x.new_empty(len(x), stack.shape[2])
    begin = 0
    for expert, end in enumerate(routing.ends.tolist()):
        if end > begin:
            torch.mm(x[begin:end], stack[expert], out=y[begin:end])
        begin = end
    return y


def expert_bias(bias: Tensor, routing: Routing) -> Tensor:
    """Return each pair's bias: [experts, out] -> [pairs, out]."""
    if has_torch_function((bias,)):
        result: Tensor = handle_torch_function(expert_bias, (bias,), bias, routing)
        return result
    return F.embedding(routing.experts, bias)


def experts_forward(layer: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Forward of a transformers expert layer.

    Args:
        layer: the module; its matrices, gate and activation follow the library's conventions for expert layers.
        hidden: [tokens, width], row by row.
        chosen: [tokens, k] experts of each token.
        weights: [tokens, k] what their outputs count.
    """
    per_token = chosen.shape[-1]
    experts, order = torch.sort(chosen.reshape(-1), stable=True)
    counts = torch.zeros(layer.num_experts, dtype=torch.int64, device=hidden.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    routing = Routing(
        experts=experts,
        tokens=order // per_token,
        ends=counts.cumsum(0).to(torch.int32),
        tokens_total=len(hidden),
    )
    first, name = (layer.gate_up_proj, "gate_up_proj") if layer.has_gate else (layer.up_proj, "up_proj")
    y = expert_linear(hidden[routing.tokens], first, routing, is_transposed=layer.is_transposed)
    if layer.has_bias:
        y = y + expert_bias(getattr(layer, f"{name}_bias"), routing)
    y = layer._apply_gate(y) if layer.has_gate else layer.act_fn(y)
    y = expert_linear(y, layer.down_proj, routing, is_transposed=layer.is_transposed)
    if layer.has_bias:
        y = y + expert_bias(layer.down_proj_bias, routing)
    if getattr(layer, "has_post_expert_norm", False):  # older transformers have none
        y = layer.post_expert_norm(y)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    parts = y[back].view(len(hidden), per_token, -1) * weights[:, :, None]
    return parts.sum(1).to(hidden.dtype)


def _can_group(x: Tensor, weight: Tensor) -> bool:
    """True where one grouped product is possible and faster than a loop over the experts."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    sizes = (weight.shape[1] * weight.element_size(), weight.shape[2] * weight.element_size())
    return x.dtype == torch.bfloat16 and all(size % GROUPED_ALIGNMENT_BYTES == 0 for size in sizes)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
