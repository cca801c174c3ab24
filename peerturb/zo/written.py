"""Measure with perturbed weights written out, one side of one probe at a time: slow, but right for any module.

For parameters that a module uses in ways which cannot be corrected row by row (`peerturb.zo.perturbed`). The weights
themselves are not touched: each operation is handed perturbed copies instead.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peerturb.manifest import Parameter
from peerturb.zo.perturbation import HALVES, Perturbation

if TYPE_CHECKING:
    from peerturb.zo.batch import Evaluator


class Written(Perturbation):
    """One side of a single probe whose weights are perturbed copies already: nothing is left to correct."""

    def __init__(self, whole: Perturbation) -> None:
        super().__init__(whole.signs, probes=1, epsilon=whole.epsilon, dtype=whole.dtype, device=whole.device, sides=1)
        self.draw_key, self.places = whole.draw_key, whole.places


class Replaced(TorchFunctionMode):
    """Context in which each parameter is a perturbed copy of itself: the same for all rows, right in any operation.

    Args:
        parameters: what is perturbed, by identity: (manifest entry, the model's tensor).
        noise: an entry's z, its elements row-major.
        step: epsilon, negative for the other side; times 2**k of the entry.
        is_kept: keep the copies until the context ends, as much memory as the parameters, instead of making them for
            each operation.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Parameter, Tensor]],
        noise: Callable[[Parameter], Tensor],
        step: float,
        *,
        is_kept: bool = False,
    ) -> None:
        super().__init__()
        self.used: set[str] = set()
        """Names of the parameters met so far."""
        self._parameters = {id(tensor): (entry, tensor) for entry, tensor in parameters}
        self._noise, self._step = noise, step
        self._is_kept = is_kept
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Perform `func` on perturbed copies."""
        met: set[str] = set()
        given = {name: self._copy(value, met) for name, value in (kwargs or {}).items()}
        result = func(*(self._copy(value, met) for value in args), **given)
        if uses(func, result):
            self.used |= met
        return result

    def _copy(self, value: Any, met: set[str]) -> Any:
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(self._copy(item, met) for item in value) if type(value) in (list, tuple) else value
        found = self._parameters.get(id(value))
        if found is None:
            return value
        entry, tensor = found
        met.add(entry.name)
        copy = self._copies.get(id(value))
        if copy is None:
            copy = self._perturbed(entry, tensor)
            if self._is_kept:
                self._copies[id(value)] = copy
        return copy

    def _perturbed(self, entry: Parameter, tensor: Tensor) -> Tensor:
        z = self._noise(entry).view(tensor.shape).to(tensor.device)
        exact = tensor.float() if tensor.dtype in HALVES else tensor  # rounded once
        return torch.add(exact, z, alpha=self._step * 2.0**entry.exponent).to(tensor.dtype)


def written_losses(evaluator: "Evaluator[Any]", items: Sequence[Any], perturbation: Perturbation) -> Tensor:
    """Return what `Evaluator.losses` returns under a perturbation of one probe, one forward for each side."""
    if perturbation.probes != 1:
        raise ValueError(f"one probe at a time, not {perturbation.probes}")
    noise, side = partial(perturbation.noise, probe=0), Written(perturbation)
    losses = []
    for step in (perturbation.epsilon, -perturbation.epsilon)[: perturbation.sides]:
        with Replaced(evaluator.parameters, noise, step, is_kept=True):
            losses.append(evaluator.losses(items, side))
    return torch.cat(losses, 1)


_WRITES_OR_READS = frozenset({
    Tensor.__setitem__, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__int__,
    Tensor.__bool__, Tensor.__index__, Tensor.__complex__, torch.is_nonzero, torch.equal, torch.allclose,
})  # fmt: skip
"""What uses a tensor's values and returns no tensor."""


def uses(func: Callable[..., Any], result: Any, source: Tensor | None = None) -> bool:
    """True if `func` used values: asking for a tensor's shape or type does not, nor does returning `source`."""
    if func in _WRITES_OR_READS:
        return True
    if isinstance(result, (list, tuple)) and not isinstance(result, torch.Size):
        return any(uses(func, item, source) for item in result)
    return isinstance(result, Tensor) and result is not source
