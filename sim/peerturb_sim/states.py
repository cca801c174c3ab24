"""The states of one set of real weights, and how to get from one to another: the same update as everywhere.

Virtual peers share tensors. A state is where sealed rounds have led (or a flipped bit); the tensors stand at one of
them and are moved to whichever is asked for, from the base or a kept copy. Knows neither peers nor losses.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peerturb.manifest import Manifest
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.update import apply_update

KEPT = 3
"""Copies of states left lately, besides the base: peers that lag a little behind cost no replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a state follows from another one."""

    number: int
    """Of the state, unique in a simulation."""
    parent: int
    """Number of the state before."""
    sealed: RoundSealed | None
    """The round applied; None: a bit flipped."""
    element: int = 0
    """Of the first tensor (counted round), whose lowest bit is flipped where no round is applied."""


@dataclass(slots=True, eq=False)
class State:
    """Weights that many replicas may share (`peerturb_sim.compute.Weights`)."""

    number: int
    rounds: int
    digest: int
    after: list[tuple[RoundSealed, "State"]] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)
    """Measurements begun on these weights and not yet computed."""


class States:
    """Tensors that stand at one of many states.

    Args:
        weights: the manifest's tensors, as before round 0; moved in place.
    """

    BASE = 0
    """Number of the state before round 0."""

    def __init__(self, weights: Sequence[Tensor], manifest: Manifest, spec: RunSpec) -> None:
        self._weights, self._manifest, self._spec = list(weights), manifest, spec
        self._base = [weight.clone() for weight in weights]
        self._steps: dict[int, Step] = {}
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._at = self.BASE

    def add(self, step: Step) -> None:
        """Hear of a state."""
        self._steps[step.number] = step

    def go(self, number: int) -> bool:
        """Move the tensors to a state; return False if they are there already.

        Raises:
            KeyError: nothing is known of the state.
        """
        if number == self._at:
            return False
        way: list[Step] = []
        start = number
        while start not in (self._at, self.BASE) and start not in self._kept:
            way.append(self._steps[start])
            start = way[-1].parent
        if start != self._at:
            # Out of the kept ones while the weights are put among them: that may make room by dropping the oldest.
            source = self._base if start == self.BASE else self._kept.pop(start)
            self._keep()
            self._copy(source)
            self._at = start
        for step in reversed(way):
            self._keep()
            self._take(step)
        return True

    def _keep(self) -> None:
        """Keep a copy of the state that is about to be left."""
        if self._at == self.BASE:
            return
        if self._at not in self._kept:
            spare = self._kept.popitem(last=False)[1] if len(self._kept) >= KEPT else None
            copy = spare or [torch.empty_like(weight) for weight in self._weights]
            for target, weight in zip(copy, self._weights, strict=True):
                target.copy_(weight)
            self._kept[self._at] = copy
        self._kept.move_to_end(self._at)

    def _copy(self, source: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self._weights, source, strict=True):
                weight.copy_(value)

    def _take(self, step: Step) -> None:
        sealed = step.sealed
        if sealed is None:
            first = self._weights[0].detach().view(-1)
            one = first[step.element % len(first) :][:1]
            bits = one.view(torch.int32 if one.element_size() == 4 else torch.int16)
            bits.bitwise_xor_(1)
        else:
            apply_update(
                self._weights, self._manifest, family=self._spec.perturbation.family, run_key=self._spec.run_key,
                round=sealed.round, slots=sealed.slots, counts=sealed.counts, codes=sealed.codes, alpha=sealed.alpha,
            )  # fmt: skip
        self._at = step.number
