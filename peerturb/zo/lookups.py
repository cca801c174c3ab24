"""Find the embeddings a module looks up once for all rows of a batch, such as those of positions.

What a lookup returns does not tell: the numbers of six positions look like one number for each of six rows. But numbers
that belong to rows grow with them. Knows nothing of perturbations.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peerturb.manifest import Parameter

Shapes = Mapping[str, Sequence[torch.Size]]
"""Of the numbers looked up, in order, by the parameter's name."""


class _Lookups(TorchFunctionMode):
    def __init__(self, parameters: Sequence[tuple[Parameter, Tensor]]) -> None:
        super().__init__()
        self.shapes: dict[str, list[torch.Size]] = defaultdict(list)
        self._names = {id(tensor): entry.name for entry, tensor in parameters}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.embedding:
            named = dict(zip(("input", "weight"), args, strict=False)) | given
            name = self._names.get(id(named["weight"]))
            if name is not None:
                self.shapes[name].append(named["input"].shape)
        return func(*args, **given)


@torch.inference_mode()
def shared_lookups(trial: Callable[[Tensor], Tensor], parameters: Sequence[tuple[Parameter, Tensor]]) -> frozenset[str]:
    """Return the names of embeddings that are looked up by numbers of no row: of the same shape for two rows and three.

    An embedding that is looked up in both ways is left out, and so is one whose numbers broadcast, [1, ...].

    Args:
        trial: see `peerturb.zo.coverage.Trial`.
    """
    two, three = (_shapes(trial, parameters, rows) for rows in (2, 3))
    return frozenset(
        name for name, shapes in two.items() if three.get(name) == shapes and not any(map(_broadcasts, shapes))
    )


def _shapes(trial: Callable[[Tensor], Tensor], parameters: Sequence[tuple[Parameter, Tensor]], rows: int) -> Shapes:
    mode = _Lookups(parameters)
    with mode:
        trial(torch.zeros(rows, dtype=torch.int64))  # one example several times: as long in both trials
    return mode.shapes


def _broadcasts(shape: torch.Size) -> bool:
    return len(shape) > 1 and shape[0] == 1
