"""How each torch operation that can take a trainable parameter is corrected for every row's perturbation.

A handler performs the operation with the plain weights and adds what the perturbation changes. Whatever it cannot
follow it refuses by the parameter's name. The bookkeeping is `Following`'s, that is `peerturb.zo.perturbed`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerturb.zo.experts import expert_bias, expert_linear
from peerturb.zo.following import Following, Handler, Tracked
from peerturb.zo.perturbation import HALVES


def _linear(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _signature(args, kwargs, "input", "weight", "bias")
    if weight is mode.head and mode.positions is not None:
        x = mode.keep(x, mode.positions)
    stray = mode.find((x,), {})
    if stray is not None:
        mode.refuse(stray, "multiplies it by another matrix before its use")
    tracked_weight, tracked_bias = mode.track(weight), mode.track(bias)
    y = F.linear(x, weight, bias)
    return _correct(mode, x, y, tracked_weight, tracked_bias, is_transposed=False)


def _addmm(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = mode.find(args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    if len(args) != 3 or kwargs:
        mode.refuse(found, "uses it in `addmm` with scale factors")
    bias, x, weight = args
    stray = mode.find((x,), {})
    if stray is not None:
        mode.refuse(stray, "uses it as the left matrix of `addmm`")
    tracked_weight, tracked_bias = mode.track(weight), mode.track(bias)
    return _correct(mode, x, func(*args), tracked_weight, tracked_bias, is_transposed=True)


def _matmul(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = mode.find(args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    x, weight = args if len(args) == 2 else (None, None)
    tracked = mode.track(weight)
    if not isinstance(x, Tensor) or tracked is None or mode.find((x,), {}) is not None:
        mode.refuse(found, "uses it as the left operand of a product")
    if weight is mode.head and mode.positions is not None:
        x = mode.keep(x, mode.positions)
    return _correct(mode, x, func(x, weight), tracked, None, is_transposed=True)


def _correct(
    mode: Following,
    x: Tensor,
    y: Tensor,
    weight: Tracked | None,
    bias: Tracked | None,
    *,
    is_transposed: bool,
) -> Tensor:
    """Add the rows' perturbations to y = x W (+ bias); `is_transposed`: the operation takes W as [in, out]."""
    if bias is not None and (bias.rows is not None or bias.parameter.kind != "vector"):
        mode.refuse(bias, "adds a tensor computed from it")
    found = weight or bias
    if found is not None and y.dtype != x.dtype:
        mode.refuse(found, f"takes {x.dtype} and gives {y.dtype} there, as under autocast; leave out autocast")
    y = y if y.is_contiguous() else y.contiguous()
    rows = y.shape[-1]
    if weight is None:
        if bias is not None:
            mode.grouped(bias, y, rows).add_(mode.perturbation.vector(bias.parameter))
        return y
    if (
        weight.parameter.kind != "matrix"
        or weight.rows is not None
        or weight.table is not None
        or weight.tensor.dim() != 2
    ):
        mode.refuse(weight, "multiplies by it as a matrix, which it is not")
    columns = x.shape[-1]
    mode.grouped(weight, y, rows)
    mode.perturbation.add_linear(
        weight.parameter,
        mode.grouped(weight, x, columns).view(mode.probes, -1, columns),
        y.view(mode.probes, -1, rows),
        bias=None if bias is None else bias.parameter,
        transposed=is_transposed != weight.is_transposed,
    )
    return y


def _embedding(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = mode.find(args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    ids, weight = _signature(args, kwargs, "input", "weight")[:2]
    tracked = mode.track(weight)
    if tracked is None or tracked.is_transposed or tracked.rows is not None or tracked.table is not None:
        mode.refuse(found, "looks up rows of a tensor computed from it")
    settings = dict(zip(("padding_idx", "max_norm"), args[2:4], strict=False)) | kwargs
    if settings.get("max_norm") is not None:
        mode.refuse(tracked, "renormalises it while it looks up its rows (max_norm)")
    is_shared = tracked.parameter.name in mode.shared  # else its numbers are the rows', or [1, ...]
    plain = F.embedding(ids, weight) if is_shared else None
    if is_shared:
        ids = ids.expand(mode.rows, *ids.shape)
    elif ids.dim() >= 2 and ids.shape[0] == 1:
        ids = ids.expand(mode.rows, *ids.shape[1:])  # position numbers shared by all rows
    y = F.embedding(ids, weight)
    width = y.shape[-1]
    mode.grouped(tracked, ids, 1)
    flat = ids.reshape(mode.probes, -1)
    mode.perturbation.add_embedding(tracked.parameter, flat, y.view(mode.probes, -1, width))
    return y if plain is None else mode.derive(tracked, plain, table=y)


def _permute(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Another order of dimensions, followed for shared rows of an embedding."""
    result = func(*args, **kwargs)
    found = mode.find(args, kwargs)
    if found is None:
        return result
    if found.table is None or kwargs:
        mode.refuse(found, "permutes its dimensions")
    dims = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    dims = [dim % found.tensor.dim() + 1 for dim in dims]
    return mode.derive(found, result, table=found.table.permute(0, *dims))


def _unsqueeze(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new first dimension for the batch: there the shared rows of an embedding become every row's own."""
    found = mode.find(args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    if found.table is None or args[1:] != (0,) or kwargs:
        mode.refuse(found, "adds a dimension to it")
    return found.table


def _expert_linear(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, routing = args
    stray = mode.find((x,), {})
    if stray is not None:
        mode.refuse(stray, "routes a tensor computed from it to experts")
    tracked = mode.track(weight)
    y = func(*args, **kwargs)
    if tracked is None:
        return y
    if tracked.parameter.kind != "stack" or tracked.tensor.dim() != 3 or tracked.rows is not None:
        mode.refuse(tracked, "multiplies by it as a stack of matrices, which it is not")
    groups, transposed = mode.groups(tracked, routing), bool(kwargs["is_transposed"])
    mode.perturbation.add_experts(
        tracked.parameter, x, y, groups=groups, experts=routing.experts, transposed=transposed
    )
    return y


def _expert_bias(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bias, routing = args
    tracked = mode.track(bias)
    y = func(*args)
    if tracked is None:
        return y
    if tracked.parameter.kind != "matrix" or tracked.rows is not None:
        mode.refuse(tracked, "adds its rows as the experts' biases, which they are not")
    groups = mode.groups(tracked, routing)
    mode.perturbation.add_expert_rows(tracked.parameter, y, groups=groups, ids=routing.experts)
    return y


def _layer_norm(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, weight, bias, eps = _signature(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    eps = 1e-5 if eps is None else eps
    scale, shift = mode.track(weight), mode.track(bias)
    if scale is None and shift is None:
        return func(x, shape, weight, bias, eps)
    first = scale or shift
    if first is not None and len(shape) != 1:
        mode.refuse(first, "normalises over more than one dimension with it")
    fused = _affine_at_once(mode, x, weight, scale, bias, shift, eps)
    if fused is not None:
        return fused
    plain = F.layer_norm(x, shape, None, None, eps)
    return _affine(mode, plain, weight, scale, bias, shift)


def _rms_norm(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, weight, eps = _signature(args, kwargs, "input", "normalized_shape", "weight", "eps")
    scale = mode.track(weight)
    if scale is None:
        return func(*args, **kwargs)
    if len(shape) != 1:
        mode.refuse(scale, "normalises over more than one dimension with it")
    return _affine(mode, F.rms_norm(x, shape, None, eps), weight, scale, None, None)


def _affine(mode: Following, x: Tensor, weight: Any, scale: Tracked | None, bias: Any, shift: Tracked | None) -> Tensor:
    """x * weight + bias over the last dimension, either of them tracked, plain or None."""
    fused = _affine_at_once(mode, x, weight, scale, bias, shift)
    if fused is not None:
        return fused
    y = x
    if scale is not None:
        y = _scaled(mode, scale, x)
    elif weight is not None:
        y = x * weight
    if shift is not None:
        y = (mode.grouped(shift, y, y.shape[-1]) + mode.vector(shift)).to(y.dtype).view(y.shape)
    elif bias is not None:
        y = y + bias
    return y


def _affine_at_once(
    mode: Following,
    x: Tensor,
    weight: Any,
    scale: Tracked | None,
    bias: Any,
    shift: Tracked | None,
    epsilon: float | None = None,
) -> Tensor | None:
    """The same in one pass, where both are the model's own vectors; x normalised first if there is an epsilon."""
    for found in (scale, shift):
        if found is not None:
            if found.rows is not None or found.parameter.kind != "vector":
                return None
            mode.grouped(found, x, found.parameter.elements)
    return mode.perturbation.affine(
        x,
        weight if scale is None else scale.tensor.view(-1),
        bias if shift is None else shift.tensor.view(-1),
        scaled=None if scale is None else scale.parameter,
        shifted=None if shift is None else shift.parameter,
        epsilon=epsilon,
    )


def _scaled(mode: Following, found: Tracked, x: Tensor) -> Tensor:
    """x times a tracked vector."""
    fused = _affine_at_once(mode, x, None, found, None, None) if x.shape[-1] == found.parameter.elements else None
    if fused is not None:
        return fused
    grouped, vector = mode.grouped(found, x, found.parameter.elements), mode.vector(found)
    if found.rows is not None or x.dtype not in HALVES:
        return (grouped * vector).view(x.shape)
    # The perturbed vector is f32: in half precision 1 + epsilon would be 1 again. Converting before the product is
    # several times faster than a product of two types.
    return grouped.float().mul_(vector).to(x.dtype).view(x.shape)


def _elementwise(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products, quotients, sums and differences with a tracked vector (RMSNorm's scale, a bias added apart), or with an
    embedding's shared rows (positions)."""
    found = mode.find(args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    mode.track(found.tensor)
    if len(args) != 2 or kwargs:
        mode.refuse(found, f"uses it in `{func.__name__}` with further arguments")
    other = args[1] if args[0] is found.tensor else args[0]
    if found.table is not None:
        table = _table_beside(mode, found, found.table, other)
        return func(*(table if value is found.tensor else value for value in args))
    is_number = not isinstance(other, Tensor) or (other.numel() == 1 and mode.find((other,), {}) is None)
    if is_number and isinstance(other, Tensor) and mode.rows == 1:
        # A constant, or the activation of the only row: with the only perturbation there is, either comes out right.
        only = mode.vector(found).view(found.tensor.shape)
        result = func(*(only if value is found.tensor else value for value in args))
        return result.to(torch.result_type(found.tensor, other))
    if is_number:
        rows = func(*(mode.vector(found) if value is found.tensor else value for value in args))
        return mode.derive(found, func(*args), rows=rows)
    last = found.parameter.elements
    if mode.find((other,), {}) is not None or found.tensor.dim() > 1 or (last > 1 and other.shape[-1] != last):
        mode.refuse(found, f"uses it in `{func.__name__}` with another parameter or along an inner dimension")
    if func in PRODUCTS:
        return _scaled(mode, found, other)
    rows = mode.vector(found)
    grouped = mode.grouped(found, other, last)
    result = func(*(rows if value is found.tensor else grouped for value in args)).view(other.shape)
    return result if found.rows is not None else result.to(other.dtype)


def _table_beside(mode: Following, found: Tracked, table: Tensor, other: Any) -> Tensor:
    """Return what every row of an activation has of an embedding's shared rows, as it broadcasts over the activation's
    last dimensions."""
    inner = found.tensor.dim()
    is_activation = isinstance(other, Tensor) and other.dim() > inner and other.shape[0] == mode.rows
    if not is_activation or mode.find((other,), {}) is not None:
        mode.refuse(found, "looks up rows of it that all examples share, and combines them with what has no examples")
    return table.view(mode.rows, *(1,) * (other.dim() - inner - 1), *table.shape[1:])


def _cast(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A change of dtype or device: harmless if it changes nothing, followed for vectors."""
    result = func(*args, **kwargs)
    found = mode.find(args, kwargs)
    if found is None or result is found.tensor:
        return result
    if args[0] is not found.tensor:
        return result  # `x.to(weight)` only asks for the dtype
    mode.track(found.tensor)
    if found.parameter.kind != "vector":
        mode.refuse(found, "converts it to another dtype or device")
    rows = func(mode.vector(found), *args[1:], **kwargs)
    return mode.derive(found, result, rows=rows)


def _transpose(mode: Following, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    found = mode.find(args, kwargs)
    if found is None:
        return result
    if found.tensor.dim() != 2 or found.parameter.kind != "matrix":
        mode.refuse(found, "transposes it")
    swapped = result.shape == found.tensor.shape[::-1] and result.stride() == found.tensor.stride()[::-1]
    return mode.derive(found, result, transposed=found.is_transposed != swapped)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments by position or name; None where not given."""
    values = [*args[: len(names)], *(None for _ in names[len(args) :])]
    for index, name in enumerate(names):
        if name in kwargs:
            values[index] = kwargs[name]
    return values


PRODUCTS: tuple[Callable[..., Any], ...] = (
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__rmul__,
)
OTHERS: tuple[Callable[..., Any], ...] = (
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    torch.sub,
    torch.subtract,
    Tensor.sub,
    Tensor.subtract,
    Tensor.__sub__,
    Tensor.__rsub__,
    torch.div,
    torch.divide,
    torch.true_divide,
    Tensor.div,
    Tensor.divide,
    Tensor.true_divide,
    Tensor.__truediv__,
    Tensor.__rtruediv__,
)

HANDLERS: dict[Callable[..., Any], Handler] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.to: _cast,
    Tensor.float: _cast,
    Tensor.type_as: _cast,
    Tensor.t: _transpose,
    Tensor.transpose: _transpose,
    torch.t: _transpose,
    torch.transpose: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    expert_linear: _expert_linear,
    expert_bias: _expert_bias,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    **dict.fromkeys((*PRODUCTS, *OTHERS), _elementwise),
}
"""What the engine can follow, by torch function."""
