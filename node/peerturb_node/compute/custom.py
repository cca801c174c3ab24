"""A compute on a user's own evaluator: a module, loss or reward of their own program takes part in a run.

The functions are handed over in Python by whoever starts the node; no run and no peer can name code.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from peerturb.errors import ModelError
from peerturb.spec import RunSpec
from peerturb.zo.base import check_base
from peerturb.zo.batch import Evaluator
from peerturb.zo.choosing import Wanted, choose_engine
from peerturb.zo.room import in_parts
from peerturb_node.compute.base import HeldOut
from peerturb_node.compute.replica import Replica

Item = TypeVar("Item")

EVALUATED_AT_ONCE = 64
"""Held-out items in one forward."""


class CustomCompute(Replica, Generic[Item]):
    """An evaluator, private items and held-out items.

    Args:
        spec: the run's.
        evaluator: its tensors are trained in place; a copy of them is kept for starting over.
        items: this node's private items.
        base_digest: hexadecimal, of the base weights as loaded (`peerturb.zo.custom.base_spec`, or
            `peerturb.zo.model.base_digest` before an adapter is attached).
        held_out: items to evaluate.
        estimator: how projected gradients are found, within what the run allows; `auto`: exact where it can be.
        export: writes what was trained into a folder, at the end of `peerturb node run --export`.

    Attributes:
        choice: why the estimator is what it is; empty where there was no choice.
        slowness: why probes are measured one at a time, or None; a node says it when it starts.

    Raises:
        RefusedError: the base weights are not the run's.
        ModelError: a parameter cannot be perturbed.
        DataError: too few items.
    """

    def __init__(
        self,
        spec: RunSpec,
        evaluator: Evaluator[Item],
        items: Sequence[Item],
        *,
        base_digest: str,
        held_out: Sequence[Item] = (),
        export: Callable[[Path], None] | None = None,
        rows_max: int | None = None,
        estimator: Wanted = "auto",
    ) -> None:
        check_base(spec, base_digest, holder="this program", remedy="build the module from the same weights, or seed")
        self.rounds = 0
        self._spec = spec
        self.base_digest = bytes.fromhex(base_digest)
        self.manifest = tuple(entry for entry, _ in evaluator.parameters)
        self._named: dict[str, Tensor] = {entry.name: tensor.data for entry, tensor in evaluator.parameters}
        self._weights = list(self._named.values())
        self._start = [weight.clone() for weight in self._weights]
        self._evaluator = evaluator
        chosen = choose_engine(evaluator, spec, items, wanted=estimator, rows_max=rows_max)
        self._engine, self.estimator, self.choice = chosen.engine, chosen.estimator, chosen.why
        self.slowness = self._engine.slowness
        self._held_out = list(held_out)
        self.has_held_out = bool(self._held_out)
        self._export = export

    @torch.inference_mode()
    def evaluate(self, is_cancelled: Callable[[], bool]) -> HeldOut | None:
        """Return the mean loss of the held-out items."""
        total, done = 0.0, 0
        at_once = len(self._held_out) if self._evaluator.is_whole else EVALUATED_AT_ONCE
        for losses in in_parts(self._evaluator, self._held_out, self._evaluator.losses, items_max=at_once):
            total += float(losses.sum())
            done += len(losses)
            if done < len(self._held_out) and is_cancelled():
                return None
        return HeldOut(loss=total / done, accuracy=None, examples=done) if done else None

    def reset(self) -> None:
        """Copy the base weights back."""
        for weight, start in zip(self._weights, self._start, strict=True):
            weight.copy_(start)
        self.rounds = 0

    def export(self, folder: Path) -> None:
        """Hand the folder to the user's function."""
        if self._export is None:
            raise ModelError("this program gave its compute no `export` function: nothing was written")
        self._export(folder)
