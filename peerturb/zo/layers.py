"""Layers whose operation is known beforehand: corrected as they are called, without looking at each torch operation.

To see an operation of a small layer costs more than the operation itself, and a model calls hundreds of them. What is
not as expected (another shape, a type that changes, a parameter computed from another) goes the general way.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerturb.zo.following import Following, Tracked
from peerturb.zo.operations import HANDLERS

Forward = Callable[..., Any]
TOLERANCE = 2.0**-5
"""Of a norm's outputs in half precision, several roundings apart; what is told apart differs by more."""


def known_forward(mode: Following, module: nn.Module, enclosed: Forward) -> Forward:
    """Return a module's corrected forward.

    Args:
        module: one that holds a tracked parameter or the head.
        enclosed: its forward with every operation seen.
    """
    if "forward" in module.__dict__:  # somebody's own
        return enclosed
    if type(module) is nn.Linear:
        return _linear(mode, module)
    if type(module) is nn.LayerNorm:
        return _general(mode, module, F.layer_norm, module.normalized_shape, module.weight, module.bias, module.eps)
    if type(module) is nn.Embedding and module.max_norm is None:
        return _general(mode, module, F.embedding, module.weight)
    norm = root_mean_square_of(module)
    found = None if norm is None else mode.known(norm.weight)
    return enclosed if norm is None or found is None else _norm(mode, norm, found, enclosed)


def _linear(mode: Following, module: nn.Linear) -> Forward:
    weight, bias = module.weight, module.bias
    found, shift = mode.known(weight), mode.known(bias)
    general = _general(mode, module, F.linear, weight, bias)
    is_head = weight is mode.head and mode.positions is not None
    if found is None or found.parameter.kind != "matrix" or is_head:
        return general
    parameter, added = found.parameter, None if shift is None else shift.parameter
    names = {parameter.name} if added is None else {parameter.name, added.name}

    def linear(input: Tensor) -> Tensor:
        if mode.is_inside or mode.known(input) is not None or input.shape[0] % mode.rows:
            result: Tensor = general(input)
            return result
        output = F.linear(input, weight, bias)
        if output.dtype != input.dtype:  # under autocast: refused there
            result = general(input)
            return result
        mode.used.update(names)
        mode.perturbation.add_linear(
            parameter,
            input.reshape(mode.probes, -1, input.shape[-1]),
            output.view(mode.probes, -1, output.shape[-1]),
            bias=added,
            transposed=False,
        )
        return output

    return linear


def _general(mode: Following, module: nn.Module, func: Forward, *rest: Any) -> Forward:
    """Return the forward of a module whose only operation is `func(input, *rest)`, which has a handler."""
    handler, forward = HANDLERS[func], module.forward

    def handled(input: Tensor) -> Any:
        # Inside another owner the operation is seen anyway.
        return forward(input) if mode.is_inside else handler(mode, func, (input, *rest), {})

    return handled


@dataclass(frozen=True, slots=True, kw_only=True)
class RootMeanSquare:
    """x / sqrt(mean x^2 + epsilon) * (offset + weight)."""

    weight: Tensor
    epsilon: float
    offset: float


def root_mean_square_of(module: nn.Module) -> RootMeanSquare | None:
    """Return what a norm computes, found by trying; None if it is no such norm.

    Every model brings a class of its own for this, in four to eight operations.
    """
    if module not in _tried:
        _tried[module] = _try(module)
    found = _tried[module]
    weight = getattr(module, "weight", None)
    return None if found is None or weight is None else RootMeanSquare(weight=weight, epsilon=found[0], offset=found[1])


_tried: weakref.WeakKeyDictionary[nn.Module, tuple[float, float] | None] = weakref.WeakKeyDictionary()
"""Epsilon and offset by norm. The weights are not kept: they may be other ones later."""


def _try(module: nn.Module) -> tuple[float, float] | None:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(weight, Tensor)
        or weight.dim() != 1
        or not isinstance(epsilon, float)
        or len(list(module.parameters())) != 1
        or any(True for _ in module.children())
    ):
        return None
    # Large numbers tell the offset and a mean that is subtracted, small ones the epsilon.
    values = torch.linspace(-1, 2, 3 * len(weight), dtype=torch.float32, device=weight.device).view(3, -1)
    with torch.inference_mode():
        for offset in (0.0, 1.0):
            norm = RootMeanSquare(weight=weight, epsilon=epsilon, offset=offset)
            if all(_is_alike(module, norm, (values * size).to(weight.dtype)) for size in (8.0, epsilon**0.5)):
                return epsilon, offset
    return None


def _is_alike(module: nn.Module, norm: RootMeanSquare, x: Tensor) -> bool:
    """Tell whether the module computes the norm for these rows."""
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()
    expected *= norm.offset + norm.weight.double()
    found = module.forward(x)
    return bool(
        isinstance(found, Tensor)
        and found.dtype == x.dtype
        and torch.allclose(found.double(), expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().mean()))
    )


def _norm(mode: Following, norm: RootMeanSquare, found: Tracked, enclosed: Forward) -> Forward:
    parameter, names = found.parameter, {found.parameter.name}

    def normed(hidden_states: Tensor) -> Any:
        if mode.is_inside or mode.known(hidden_states) is not None or hidden_states.shape[0] % mode.rows:
            return enclosed(hidden_states)
        output = mode.perturbation.affine(
            hidden_states, norm.weight, None, scaled=parameter, shifted=None,
            epsilon=norm.epsilon, is_centred=False, offset=norm.offset,
        )  # fmt: skip
        if output is None:
            return enclosed(hidden_states)
        mode.used.update(names)
        return output

    return normed
