"""The two families of perturbations: `rank1`, a product of two sign vectors a matrix, and `dense`, a sign an element.

How rows, probes and sides lie: `peerturb.zo.perturbation`.
"""

from collections.abc import Callable
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from peerturb.manifest import Parameter
from peerturb.zo import fast
from peerturb.zo.perturbation import HALVES, SIDES, Perturbation, Side

TABLE_BYTES_MAX = 2**23
"""Up to here a whole page of factors is converted and multiplied by epsilon at once: fewer operations."""


class RankOne(Perturbation):
    """z = a bT: a dot product with b and a multiple of a for each token, no matter how many weights the matrix has."""

    @cached_property
    def _pages(self) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Pages in the type of the activations, plain and times the steps."""
        return {}

    def noise(self, parameter: Parameter, probe: int) -> Tensor:
        """See the base class."""
        matrices, rows, columns = parameter.stacked
        left = self.signs.left(parameter)[probe].view(matrices, rows, 1)
        if parameter.kind == "vector":
            return left
        return left * self.signs.right(parameter)[probe].view(matrices, 1, columns)

    def _page(self, parameter: Parameter, side: Side) -> tuple[Tensor, Tensor] | None:
        """Return one factor in the type of the activations, plain and times the steps, if its page is converted."""
        if self._paged is None or parameter.exponent != 0:
            return None
        number, columns = self._paged.place(parameter, side)
        if number not in self._pages:
            signs = self._paged.page(number)
            is_small = 3 * signs.numel() * self.dtype.itemsize <= TABLE_BYTES_MAX
            factors = signs.to(self.device, self.dtype) if is_small else None
            # One at a time: what is converted is larger than the signs.
            self._pages = {number: None if factors is None else (factors, self._with_steps(factors, self._steps))}
        found = self._pages[number]
        return None if found is None else (found[0][:, columns], found[1][:, :, columns])

    def _with_steps(self, factors: Tensor, steps: Tensor) -> Tensor:
        """Return +epsilon and -epsilon times the factors: [groups, 1, n]."""
        return (factors[:, None, :] * steps[:, None]).view(self.groups, 1, -1)

    def _factor(self, parameter: Parameter, side: Side) -> Tensor:
        """Return one factor: [probes, n]."""
        page = self._page(parameter, side)
        if page is not None:
            return page[0]
        signs = self.signs.left(parameter) if side == "left" else self.signs.right(parameter)
        return signs.to(self.device, self.dtype)

    def _stepped_factor(self, parameter: Parameter, side: Side) -> Tensor:
        """Return one factor times +epsilon 2**k and -epsilon 2**k: [groups, 1, n]."""
        page = self._page(parameter, side)
        if page is not None:
            return page[1]
        return self._with_steps(self._factor(parameter, side), self.steps(parameter))

    def takes_shift(self, x: Tensor, shift: Tensor) -> bool:
        """See the base class."""
        rowwise = fast.rowwise(self.device)
        return rowwise is not None and rowwise.takes(x) and shift.dtype == x.dtype and shift.is_contiguous()

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
        """See the base class. One pass over x, one over y."""
        rowwise = fast.rowwise(self.device)
        if rowwise is not None and rowwise.takes(x, y):
            a, b = self._sign_rows(parameter, "left"), self._sign_rows(parameter, "right")
            a, b = (b, a) if transposed else (a, b)
            self._add_rowwise(rowwise, x, y, a, b, self.step(parameter), bias, shift)
            return
        assert shift is None
        left, right = SIDES[:: -1 if transposed else 1]
        # b as a row times xT runs several times faster on CPUs than x times b as a column.
        dots = torch.bmm(self._factor(parameter, right)[:, None, :], x.transpose(1, 2)).view(self.groups, -1, 1)
        row, sides = self._stepped_factor(parameter, left), y.view(self.groups, -1, y.shape[2])
        if bias is None or y.dtype not in HALVES:
            add_outer(sides, dots, row)
            if bias is not None:
                y.view(self.probes, self.sides, -1, y.shape[2]).add_(self.vector(bias))
        else:  # both at once, so that they are rounded once
            row = torch.cat([row, self._stepped_factor(bias, "left")], 1)
            sides.baddbmm_(torch.cat([dots, torch.ones_like(dots)], 2), row)

    def _add_rowwise(
        self,
        rowwise: ModuleType,
        x: Tensor,
        y: Tensor,
        a: tuple[Tensor, int],
        b: tuple[Tensor, int],
        step: float,
        bias: Parameter | None = None,
        shift: Tensor | None = None,
    ) -> None:
        rowwise.add_linear(
            x, y, a, b, step=step, sides=self.sides, bias=None if bias is None else self._sign_rows(bias, "left"),
            bias_step=0.0 if bias is None else self.step(bias), shift=shift,
        )  # fmt: skip

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """See the base class."""
        # Signs are picked before they are converted: there is one for each word, and few words in a batch.
        picked = self.signs.left(parameter).gather(1, ids)[:, :, None].to(y.dtype)
        rowwise = fast.rowwise(self.device)
        if rowwise is not None and rowwise.takes(y):
            ones = torch.ones((self.probes, 1), dtype=torch.int8, device=y.device)
            a = self._sign_rows(parameter, "right")
            self._add_rowwise(rowwise, picked, y, a, (ones, 0), self.step(parameter))
            return
        column = picked.view(self.groups, -1, 1)
        add_outer(y.view(self.groups, -1, y.shape[2]), column, self._stepped_factor(parameter, "right"))

    def add_experts(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, groups: Tensor, experts: Tensor, transposed: bool
    ) -> None:
        """See the base class. Each pair picks its expert's factors."""
        right: Side = "left" if transposed else "right"
        left: Side = "right" if transposed else "left"
        probes, matrices = groups // self.sides, parameter.stacked[0]
        factor = self._factor(parameter, right).unflatten(1, (matrices, -1))[probes, experts]
        dots = factor.mul_(x).sum(1, keepdim=True)  # products with signs are exact
        dots *= self.steps(parameter)[groups % self.sides, None]
        y.addcmul_(dots, self._factor(parameter, left).unflatten(1, (matrices, -1))[probes, experts])

    def add_expert_rows(self, parameter: Parameter, y: Tensor, *, groups: Tensor, ids: Tensor) -> None:
        """See the base class."""
        picked = self._factor(parameter, "left")[groups // self.sides, ids] * self.steps(parameter)[groups % self.sides]
        y.addcmul_(picked[:, None], self._factor(parameter, "right")[groups // self.sides])


class Dense(Perturbation):
    """Every element its own sign: one matrix of one probe at a time, in a scratch buffer."""

    _scratch: Tensor | None = None

    def noise(self, parameter: Parameter, probe: int) -> Tensor:
        """See the base class."""
        if parameter.kind == "vector":
            return self.signs.left(parameter)[probe]
        return self.signs.dense(parameter, probe)

    def _matrix(self, parameter: Parameter, probe: int) -> Tensor:
        """z of one probe as a matrix [matrices * rows, columns], valid until the next call."""
        scratch = self._scratch
        if scratch is None or scratch.numel() < parameter.elements:
            self._scratch = scratch = torch.empty(parameter.elements, dtype=self.dtype, device=self.device)
        matrices, rows, columns = parameter.stacked
        z = scratch[: parameter.elements].view(matrices * rows, columns)
        return z.copy_(self.signs.dense(parameter, probe).view(z.shape))

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
        """See the base class."""
        assert shift is None
        # Scaling x, not z, keeps z exact in bfloat16 and serves both sides with one matrix.
        scaled = (x.view(self.probes, self.sides, -1, x.shape[-1]) * self.steps(parameter)[:, None, None]).view(x.shape)
        for probe in range(self.probes):
            z = self._matrix(parameter, probe)
            y[probe].addmm_(scaled[probe], z if transposed else z.t())
        if bias is not None:
            y.view(self.probes, self.sides, -1, y.shape[2]).add_(self.vector(bias))

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """See the base class."""
        for probe in range(self.probes):
            picked = self._matrix(parameter, probe)[ids[probe]].view(self.sides, -1, y.shape[-1])
            y[probe].view(picked.shape).add_(picked * self.steps(parameter)[:, None, None])

    def add_experts(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, groups: Tensor, experts: Tensor, transposed: bool
    ) -> None:
        """See the base class. One product for each probe and expert that meet."""
        scaled = x * self.steps(parameter)[groups % self.sides, None]
        matrices, rows, columns = parameter.stacked
        keys, order = torch.sort(groups // self.sides * matrices + experts, stable=True)
        met, counts = torch.unique_consecutive(keys, return_counts=True)
        begin, last = 0, -1
        for key, count in zip(met.tolist(), counts.tolist(), strict=True):
            probe, expert = divmod(key, matrices)
            if probe != last:
                z, last = self._matrix(parameter, probe).view(matrices, rows, columns), probe
            pairs = order[begin : begin + count]
            y[pairs] = torch.addmm(y[pairs], scaled[pairs], z[expert] if transposed else z[expert].t())
            begin += count

    def add_expert_rows(self, parameter: Parameter, y: Tensor, *, groups: Tensor, ids: Tensor) -> None:
        """See the base class."""
        steps = self.steps(parameter)[groups % self.sides, None]
        for probe in range(self.probes):
            pairs = (groups // self.sides == probe).nonzero().flatten()
            y[pairs] += self._matrix(parameter, probe)[ids[pairs]] * steps[pairs]


def add_outer(y: Tensor, column: Tensor, row: Tensor) -> None:
    """y += column * row for [p, k, m], [p, k, 1], [p, 1, m], by the faster of two equal ways (measured on CPUs)."""
    if y.dtype in HALVES:
        y.baddbmm_(column, row)  # accumulates in f32 and rounds once
    else:
        y.addcmul_(column, row)


FAMILIES: dict[str, Callable[..., Perturbation]] = {"rank1": RankOne, "dense": Dense}
"""RunSpec `perturbation.family` to class."""
