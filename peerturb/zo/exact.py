"""Exact projected gradients: one gradient by backward passes, then its product with every direction, encoded as always.

The same interface as `peerturb.zo.probe.ProbeEngine`, the same directions, bytes and log: nobody but the sender knows
how a code came about. All codes of a contribution are of one gradient, that of the mean loss over the examples that
the node's slot draws in that round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peerturb.errors import DataError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import RunSpec
from peerturb.zo.batch import Evaluator
from peerturb.zo.data import Draw
from peerturb.zo.gradients import Activations, Backward, is_finite
from peerturb.zo.probe import ProbeResult, encoded
from peerturb.zo.projection import Projector

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """What one gradient says about samples 0..n-1."""

    projected: NDArray[np.float64]
    """<G, z>: [n]; NaN throughout where the model broke down. Empty if stopped before the gradient was whole."""
    loss: float
    """Mean loss over the examples; NaN if there is none."""
    tokens: int
    """Tokens of the examples, each read once forwards (and once backwards)."""


class ExactEngine(Generic[Item]):
    """A model with its objective, a node's private examples and the rules of a run that allows exact gradients.

    Args:
        evaluator: gives losses that can be differentiated; weights are read, never written.
        items: the node's examples. Fewer than a contribution wants: all of them, every round.
        examples: of one contribution; None: the RunSpec's `perturbation.exact.examples`.
        rows_max: most rows in one backward pass; None: chosen from device and free memory.
        activations: see `Backward`.
        carry: what is left of a contribution's gradient in the next one's, 0 to 1: v = G + carry * (v before). What the
            codes of a round have expressed of it, n / d, is too little to be subtracted. It needs memory for a second
            set of gradients, and makes codes depend on rounds before.

    Raises:
        ModelError: the losses cannot be differentiated, or memory is too little.
        DataError: no examples.
    """

    slowness: str | None = None
    """As of `ProbeEngine`: nothing is measured one at a time here."""

    def __init__(
        self,
        evaluator: Evaluator[Item],
        spec: RunSpec,
        items: Sequence[Item],
        *,
        examples: int | None = None,
        rows_max: int | None = None,
        activations: Activations = "auto",
        carry: float = 0.0,
    ) -> None:
        if not items:
            raise DataError("the data has no examples; a gradient needs at least one")
        self.spec = spec
        self.evaluator = evaluator
        self.items = items
        wanted = spec.perturbation.exact_rules.examples if examples is None else examples
        self.examples = min(wanted, len(items))
        self.backward = Backward(evaluator, items, rows_max=rows_max, activations=activations, has_memory=carry > 0)
        self._carry = carry
        self._carried: tuple[RoundNumber, list[Tensor]] | None = None
        """The round that it was last added to, and the sum."""
        self._manifest = tuple(entry for entry, _ in evaluator.parameters)
        self._draw: tuple[Slot, Draw] | None = None

    def contribute(
        self,
        round_number: RoundNumber,
        *,
        slot: Slot,
        scale: float,
        count: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ProbeResult:
        """Project on `count` directions (by default the RunSpec's most) and encode.

        There are no codes, and no loss, if it is stopped before the gradient is whole.
        """
        measured = self.measure(round_number, slot=slot, count=count, should_stop=should_stop)
        codes = encoded(self.projected_gradients(measured), self.spec, round_number, slot=slot, scale=scale)
        return ProbeResult(codes=codes, loss=measured.loss, tokens=measured.tokens)

    def projected_gradients(self, measured: Projections) -> NDArray[np.float64]:
        """Return what was projected: [n]."""
        return measured.projected

    def measure(
        self,
        round_number: RoundNumber,
        *,
        slot: Slot,
        count: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Projections:
        """Compute the gradient and project it on samples 0..count-1.

        Raises:
            ModelError: memory runs out at a single row.
        """
        count = self.spec.perturbation.exact_rules.codes if count is None else count
        drawn = self.drawn(round_number, slot)
        found = self.backward.gradient([self.items[number] for number in drawn.tolist()], should_stop=should_stop)
        if found is None:
            return Projections(projected=np.zeros(0), loss=float("nan"), tokens=0)
        if not is_finite(found):
            return Projections(projected=np.full(count, np.nan), loss=found.loss, tokens=found.tokens)
        tensors = self._with_carried(round_number, found.tensors) if self._carry else found.tensors
        projector = Projector(self._manifest, tensors, self.spec.perturbation.family)
        projected = projector.project(
            run_key=self.spec.run_key, round=round_number, slot=slot, count=count, should_stop=should_stop
        )
        return Projections(projected=projected, loss=found.loss, tokens=found.tokens)

    def forget(self) -> None:
        """Forget what is carried over: the weights are others than those it was computed on."""
        self._carried = None

    def _with_carried(self, round_number: RoundNumber, gradients: list[Tensor]) -> list[Tensor]:
        """Add gradients to what is carried over, which a round that comes again begins anew."""
        if self._carried is None or round_number <= self._carried[0]:
            self._carried = round_number, gradients
            return gradients
        _, sums = self._carried
        for total, gradient in zip(sums, gradients, strict=True):
            total.mul_(self._carry).add_(gradient)
        self._carried = round_number, sums
        return sums

    def drawn(self, round_number: RoundNumber, slot: Slot) -> NDArray[np.int64]:
        """Return the examples of a round, by number: [examples]; consecutive rounds go through all of them."""
        if self._draw is None or self._draw[0] != slot:
            draw = Draw(
                run_key=self.spec.run_key, slot=slot, total=len(self.items), per_probe=self.examples, probes_max=1
            )
            self._draw = (slot, draw)
        return self._draw[1].indices(int(round_number), 0)
