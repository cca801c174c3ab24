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

from peerturb.zo.following import Following
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
    if type(module) is nn.Embedding and module.max_norm is None:
        return _general(mode, module, F.embedding, module.weight)
    norm = norm_of(module)
    return enclosed if norm is None else _normed(mode, norm, enclosed)


def _linear(mode: Following, module: nn.Linear) -> Forward:
    weight: Tensor = module.weight
    bias: Tensor | None = module.bias
    found, found_bias = mode.known(weight), mode.known(bias)
    general = _general(mode, module, F.linear, weight, bias)
    is_head = weight is mode.head and mode.positions is not None
    if found is None or found.parameter.kind != "matrix" or is_head:
        return general
    parameter, added = found.parameter, None if found_bias is None else found_bias.parameter
    names = {parameter.name} if added is None else {parameter.name, added.name}

    def linear(input: Tensor) -> Tensor:
        if mode.is_inside or mode.known(input) is not None or input.shape[0] % mode.rows:
            result: Tensor = general(input)
            return result
        # torch writes a bias into all of the output before it multiplies: here it costs next to nothing.
        shift = bias if bias is not None and mode.perturbation.takes_shift(input, bias) else None
        output = F.linear(input, weight, bias if shift is None else None)
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
            shift=shift,
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
class Norm:
    """x / sqrt(mean x^2 + epsilon) * (offset + weight) + bias, the mean of x subtracted before if it is centred."""

    weight: Tensor
    bias: Tensor | None = None
    epsilon: float
    offset: float = 0.0
    is_centred: bool = False


def norm_of(module: nn.Module) -> Norm | None:
    """Return what a norm over the last dimension computes; None if that is not known.

    Every model brings a class of its own for the root mean square, in four to eight operations: found by trying.
    """
    if type(module) is nn.LayerNorm:
        weight: Tensor | None = module.weight
        if weight is None or weight.dim() != 1:
            return None
        return Norm(weight=weight, bias=module.bias, epsilon=module.eps, is_centred=True)
    if module not in _tried:
        _tried[module] = _try(module)
    found = _tried[module]
    weight = getattr(module, "weight", None)
    return None if found is None or weight is None else Norm(weight=weight, epsilon=found[0], offset=found[1])


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
            norm = Norm(weight=weight, epsilon=epsilon, offset=offset)
            if all(_is_alike(module, norm, (values * size).to(weight.dtype)) for size in (8.0, epsilon**0.5)):
                return epsilon, offset
    return None


def _is_alike(module: nn.Module, norm: Norm, x: Tensor) -> bool:
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


def _normed(mode: Following, norm: Norm, enclosed: Forward) -> Forward:
    """Return the forward of a norm in one pass, where the activation allows one."""
    found = mode.known(norm.weight), mode.known(norm.bias)
    scaled, shifted = (None if one is None else one.parameter for one in found)
    if scaled is None and shifted is None:
        return enclosed
    names = {parameter.name for parameter in (scaled, shifted) if parameter is not None}

    def normed(input: Tensor) -> Any:
        if mode.is_inside or mode.known(input) is not None or input.shape[0] % mode.rows:
            return enclosed(input)
        output = mode.perturbation.affine(
            input, norm.weight, norm.bias, scaled=scaled, shifted=shifted,
            epsilon=norm.epsilon, is_centred=norm.is_centred, offset=norm.offset,
        )  # fmt: skip
        if output is None:
            return enclosed(input)
        mode.used.update(names)
        return output

    return normed
