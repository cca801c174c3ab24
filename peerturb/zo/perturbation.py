"""What a perturbation does to one operation's output: what the families share, and where their signs come from.

A micro-batch holds `probes` probes; its rows lie probe by probe, in each probe first the rows measured at +epsilon,
then, with two sides, the same rows at -epsilon. So every activation, whatever its shape, is a (probes, sides, rest)
array, and a perturbation is added to it without ever forming perturbed weights. Knows nothing of models or of how signs
are made.
"""

from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb.manifest import Parameter
from peerturb.zo import fast

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")

HALVES = (torch.bfloat16, torch.float16)
"""Types of which a perturbation may be too small a part to survive a sum: what can be is added in f32."""


class Signs(Protocol):
    """Where the signs of the micro-batch's probes come from; int8 tensors of +1 and -1."""

    def left(self, parameter: Parameter) -> Tensor:
        """Return the left factors, or the whole signs of a vector: [probes, matrices * rows]."""
        ...

    def right(self, parameter: Parameter) -> Tensor:
        """Return the right factors: [probes, matrices * columns]."""
        ...

    def dense(self, parameter: Parameter, probe: int) -> Tensor:
        """Return one probe's sign for every element: [matrices * rows, columns]."""
        ...


@runtime_checkable
class PagedFactors(Signs, Protocol):
    """Signs of `rank1` of which several parameters' are made at once (`peerturb.zo.factors`)."""

    @property
    def page_count(self) -> int:
        """How many pages there are."""
        ...

    def page(self, number: int) -> Tensor:
        """Return a page: [probes, width]."""
        ...

    def place(self, parameter: Parameter, side: Side) -> tuple[int, slice]:
        """Return the page of one factor and its columns there."""
        ...


class Perturbation:
    """Epsilon, signs and the arithmetic both families share.

    Args:
        probes: number of probes in the micro-batch.
        epsilon: how far the weights are moved; 0 gives the clean loss, by the same operations.
        dtype: type of the activations.
        sides: 2 for +epsilon and -epsilon, 1 for +epsilon alone.
    """

    places: NDArray[np.int64] | None = None
    """Which of its probe's examples each of a probe's rows is, [probes, examples], where a probe has more examples than
    are measured here: what an evaluator draws for an example does not depend on what shares a forward."""
    draw_key = b""
    """What random draws of an evaluator (sampled text) shall follow from. Empty: from each probe's own signs."""

    def __init__(
        self,
        signs: Signs,
        *,
        probes: int,
        epsilon: float,
        dtype: torch.dtype,
        device: torch.device,
        sides: int = 2,
    ) -> None:
        self.signs = signs
        self._paged = signs if isinstance(signs, PagedFactors) else None
        self.probes = probes
        self.sides = sides
        self.groups = sides * probes
        """Groups of rows, each with weights of its own."""
        self.dtype = dtype
        self.device = device
        self.epsilon = epsilon
        self._exact = torch.float32 if dtype in HALVES else dtype
        self._steps = torch.tensor([epsilon, -epsilon][:sides], dtype=dtype, device=device)
        self._vectors: dict[int, Tensor] = {}

    def each_side(self, rows: int) -> list[int]:
        """Return which of the probes' rows each of the micro-batch is: all of a probe at +epsilon, then at -epsilon."""
        size = rows // self.probes
        starts = (begin for begin in range(0, rows, size) for _ in range(self.sides))
        return [begin + offset for begin in starts for offset in range(size)]

    def steps(self, parameter: Parameter) -> Tensor:
        """Return (+epsilon 2**k, -epsilon 2**k): shape [sides]. The power of two makes this exact."""
        return self._steps if parameter.exponent == 0 else self._steps * 2.0**parameter.exponent

    def step(self, parameter: Parameter) -> float:
        """Return epsilon 2**k."""
        return self.epsilon * 2.0**parameter.exponent

    def affine(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *,
        scaled: Parameter | None,
        shifted: Parameter | None,
        epsilon: float | None = None,
        is_centred: bool = True,
        offset: float = 0.0,
    ) -> Tensor | None:
        """Return x * (offset + scale) + shift in one pass, or None where only torch's own operations can.

        Args:
            x: activations, the vectors' elements in the last dimension.
            scale, shift: plain vectors, or None: 1 (without the offset) and 0.
            scaled, shifted: the parameter that the vector is, or None where it is not perturbed.
            epsilon: if given, x is normalised first, with this added to the variance.
            is_centred: whether its mean is subtracted then.
        """
        rowwise = fast.rowwise(self.device)
        if rowwise is None or not rowwise.takes(x):
            return None
        if any(value is not None and (value.dtype != x.dtype or not value.is_contiguous()) for value in (scale, shift)):
            return None
        y: Tensor = rowwise.affine(
            x.view(self.probes, -1, x.shape[-1]), scale, shift, sides=self.sides,
            scale_signs=None if scaled is None else self._sign_rows(scaled, "left"),
            scale_step=0.0 if scaled is None else self.step(scaled),
            shift_signs=None if shifted is None else self._sign_rows(shifted, "left"),
            shift_step=0.0 if shifted is None else self.step(shifted),
            epsilon=epsilon, is_centred=is_centred, offset=offset,
        )  # fmt: skip
        return y.view(x.shape)

    def _sign_rows(self, parameter: Parameter, side: Side) -> tuple[Tensor, int]:
        """Return what holds one factor's signs, [probes, width], and its first column there."""
        if self._paged is None:
            return (self.signs.left(parameter) if side == "left" else self.signs.right(parameter)), 0
        page, columns = self._paged.place(parameter, side)
        return self._paged.page(page), columns.start

    def vector(self, parameter: Parameter) -> Tensor:
        """Return the perturbation of a vector for every row: [probes, sides, 1, elements], f32 in half precision."""
        delta = self._vectors.get(parameter.index)
        if delta is None:
            signs = self.signs.left(parameter).to(device=self.device, dtype=self._exact)
            delta = signs[:, None, None, :] * self.steps(parameter).to(self._exact)[None, :, None, None]
            self._vectors[parameter.index] = delta
        return delta

    def noise(self, parameter: Parameter, probe: int) -> Tensor:
        """Return one probe's z, written out: int8, as many elements as the parameter has, row-major."""
        raise NotImplementedError

    def takes_shift(self, x: Tensor, shift: Tensor) -> bool:
        """Tell whether `add_linear` can add this bias itself to activations like x."""
        return False

    def add_linear(
        self,
        parameter: Parameter,
        x: Tensor,
        y: Tensor,
        *,
        bias: Parameter | None,
        transposed: bool,
        shift: Tensor | None = None,
    ) -> None:
        """Add x zT (x z where the model stores the matrix transposed) and a bias's perturbation to y, in place.

        Args:
            x: [probes, rest, columns]; with two sides the first half of rest is at +epsilon, the second at -epsilon.
            y: [probes, rest, rows], contiguous.
            shift: the plain bias, where y lacks it and `takes_shift` agrees.
        """
        raise NotImplementedError

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """Add the rows of z that `ids` names to y, in place.

        Args:
            ids: [probes, rest].
            y: [probes, rest, columns], contiguous.
        """
        raise NotImplementedError

    def add_experts(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, groups: Tensor, experts: Tensor, transposed: bool
    ) -> None:
        """Add each pair's product with its expert's perturbation to y, in place.

        Args:
            x: [pairs, columns].
            y: [pairs, rows].
            groups: [pairs] int64: number of the group, sides * probe + side, side 0 for +epsilon.
            experts: [pairs] int64.
            transposed: the model stores its matrices as [in, out].
        """
        raise NotImplementedError

    def add_expert_rows(self, parameter: Parameter, y: Tensor, *, groups: Tensor, ids: Tensor) -> None:
        """Add row `ids` of a matrix's perturbation to each pair of y [pairs, columns], in place; see `add_experts`."""
        raise NotImplementedError
