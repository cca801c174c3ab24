"""What a perturbed forward keeps of the parameters it follows, and what it offers to the handlers of operations.

Knows no operation; `peerturb.zo.operations` has those, `peerturb.zo.perturbed` the forward itself.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from torch import Tensor

from peerturb.manifest import Parameter
from peerturb.zo.experts import Routing
from peerturb.zo.perturbation import Perturbation


@dataclass(slots=True, kw_only=True)
class Tracked:
    """A trainable parameter, or a tensor the model derived from one in a way the engine can follow."""

    parameter: Parameter
    tensor: Tensor
    """Kept so that its `id` stays its own."""
    is_transposed: bool = False
    """A matrix seen through `.t()`."""
    rows: Tensor | None = None
    """For a derived vector: its perturbed value for every row, [probes, sides, 1, elements]."""
    table: Tensor | None = None
    """For rows of an embedding that all rows of the batch share: the perturbed ones, [rows, *shape]."""


class Following(Protocol):
    """What a handler needs of the forward it belongs to; see `PerturbedForward`."""

    probes: int
    rows: int
    head: Tensor | None
    positions: Tensor | None
    shared: Collection[str]
    used: set[str]
    is_inside: bool

    @property
    def perturbation(self) -> Perturbation:
        """What is added."""

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tracked | None:
        """Return the first tracked argument."""

    def known(self, value: Any) -> Tracked | None:
        """Return what is known about one argument."""

    def track(self, value: Any) -> Tracked | None:
        """Return what is known about one argument, and note its use."""

    def derive(
        self,
        source: Tracked,
        tensor: Tensor,
        *,
        rows: Tensor | None = None,
        table: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """Track a tensor computed from `source`."""

    def keep(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keep the hidden states at `positions`."""

    def vector(self, found: Tracked) -> Tensor:
        """Return a vector's perturbed value for every row."""

    def grouped(self, found: Tracked, value: Tensor, last: int) -> Tensor:
        """View an activation as [probes, sides, rest, last]."""

    def groups(self, found: Tracked, routing: Routing) -> Tensor:
        """Return sides * probe + side of each routed pair."""
        ...

    def refuse(self, found: Tracked, why: str) -> NoReturn:
        """Raise the error that names the parameter."""
        ...


Handler = Callable[[Following, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
