"""What a perturbation does to one operation's output: the two families, `rank1` and `dense`.

A micro-batch holds `probes` probes; its rows lie probe by probe, in each probe first the rows measured at +epsilon,
then the same rows at -epsilon. So every activation, whatever its shape, is a (probes, 2, rest) array, and a
perturbation is added to it without ever forming perturbed weights. Knows nothing of models or of how signs are made.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from peerturb.manifest import Parameter


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


class Perturbation:
    """Epsilon, signs and the arithmetic both families share.

    Args:
        probes: number of probes in the micro-batch.
        epsilon: half the distance between the two evaluations.
        dtype: type of the activations.
    """

    def __init__(self, signs: Signs, *, probes: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> None:
        self.signs = signs
        self.probes = probes
        self.dtype = dtype
        self.device = device
        self._exact = torch.float32 if dtype == torch.bfloat16 else dtype
        self._steps = torch.tensor([epsilon, -epsilon], dtype=dtype, device=device)
        self._vectors: dict[int, Tensor] = {}

    def steps(self, parameter: Parameter) -> Tensor:
        """Return (+epsilon 2**k, -epsilon 2**k): shape [2]. The power of two makes this exact."""
        return self._steps if parameter.exponent == 0 else self._steps * 2.0**parameter.exponent

    def vector(self, parameter: Parameter) -> Tensor:
        """Return the perturbation of a vector for every row: [probes, 2, 1, elements], f32 in bfloat16 models."""
        delta = self._vectors.get(parameter.index)
        if delta is None:
            signs = self.signs.left(parameter).to(device=self.device, dtype=self._exact)
            delta = signs[:, None, None, :] * self.steps(parameter).to(self._exact)[None, :, None, None]
            self._vectors[parameter.index] = delta
        return delta

    def add_linear(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, bias: Parameter | None, transposed: bool
    ) -> None:
        """Add x zT (x z where the model stores the matrix transposed) and a bias's perturbation to y, in place.

        Args:
            x: [probes, rest, columns], rest even: first half +epsilon, second half -epsilon.
            y: [probes, rest, rows], contiguous.
        """
        raise NotImplementedError

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """Add the rows of z that `ids` names to y, in place.

        Args:
            ids: [probes, rest].
            y: [probes, rest, columns], contiguous.
        """
        raise NotImplementedError


class RankOne(Perturbation):
    """z = a bT: a dot product with b and a multiple of a for each token, no matter how many weights the matrix has."""

    def __init__(self, signs: Signs, *, probes: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(signs, probes=probes, epsilon=epsilon, dtype=dtype, device=device)
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}

    def _pair(self, parameter: Parameter) -> tuple[Tensor, Tensor]:
        pair = self._factors.get(parameter.index)
        if pair is None:
            left, right = self.signs.left(parameter), self.signs.right(parameter)
            pair = left.to(self.device, self.dtype), right.to(self.device, self.dtype)
            self._factors[parameter.index] = pair
        return pair

    def add_linear(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, bias: Parameter | None, transposed: bool
    ) -> None:
        """See the base class. One pass over x, one over y."""
        a, b = self._pair(parameter)
        if transposed:
            a, b = b, a
        steps = self.steps(parameter)[:, None]
        # b as a row times xT runs several times faster on CPUs than x times b as a column.
        dots = torch.bmm(b[:, None, :], x.transpose(1, 2))
        dots.view(self.probes, 2, -1).mul_(steps)
        if bias is None:
            add_outer(y, dots.transpose(1, 2), a[:, None, :])
        elif y.dtype != torch.bfloat16:
            add_outer(y, dots.transpose(1, 2), a[:, None, :])
            y.view(self.probes, 2, -1, y.shape[2]).add_(self.vector(bias))
        else:  # both at once, so that they are rounded once
            ones = torch.ones_like(dots)
            ones.view(self.probes, 2, -1).mul_(self.steps(bias)[:, None])
            signs = self.signs.left(bias).to(self.device, self.dtype)
            y.baddbmm_(torch.cat([dots, ones], 1).transpose(1, 2), torch.stack([a, signs], 1))

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """See the base class."""
        a, b = self._pair(parameter)
        picked = a.gather(1, ids)
        picked = (picked.view(self.probes, 2, -1) * self.steps(parameter)[:, None]).view(self.probes, -1, 1)
        add_outer(y, picked, b[:, None, :])


class Dense(Perturbation):
    """Every element its own sign: one matrix of one probe at a time, in a scratch buffer."""

    def __init__(self, signs: Signs, *, probes: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(signs, probes=probes, epsilon=epsilon, dtype=dtype, device=device)
        self._scratch = torch.empty(0, dtype=dtype, device=device)

    def _matrix(self, parameter: Parameter, probe: int) -> Tensor:
        """z of one probe as a matrix [matrices * rows, columns], valid until the next call."""
        if self._scratch.numel() < parameter.elements:
            self._scratch = torch.empty(parameter.elements, dtype=self.dtype, device=self.device)
        matrices, rows, columns = parameter.stacked
        z = self._scratch[: parameter.elements].view(matrices * rows, columns)
        return z.copy_(self.signs.dense(parameter, probe).view(z.shape))

    def add_linear(
        self, parameter: Parameter, x: Tensor, y: Tensor, *, bias: Parameter | None, transposed: bool
    ) -> None:
        """See the base class."""
        # Scaling x, not z, keeps z exact in bfloat16 and serves both signs with one matrix.
        scaled = (x.view(self.probes, 2, -1, x.shape[-1]) * self.steps(parameter)[:, None, None]).view(x.shape)
        for probe in range(self.probes):
            z = self._matrix(parameter, probe)
            y[probe].addmm_(scaled[probe], z if transposed else z.t())
        if bias is not None:
            y.view(self.probes, 2, -1, y.shape[2]).add_(self.vector(bias))

    def add_embedding(self, parameter: Parameter, ids: Tensor, y: Tensor) -> None:
        """See the base class."""
        for probe in range(self.probes):
            picked = self._matrix(parameter, probe)[ids[probe]].view(2, -1, y.shape[-1])
            y[probe].view(picked.shape).add_(picked * self.steps(parameter)[:, None, None])


def add_outer(y: Tensor, column: Tensor, row: Tensor) -> None:
    """y += column * row for [p, k, m], [p, k, 1], [p, 1, m], by the faster of two equal ways (measured on CPUs)."""
    if y.dtype == torch.bfloat16:
        y.baddbmm_(column, row)  # accumulates in f32 and rounds once
    else:
        y.addcmul_(column, row)


FAMILIES: dict[str, Callable[..., Perturbation]] = {"rank1": RankOne, "dense": Dense}
"""RunSpec `perturbation.family` to class."""
