"""How many rows fit a forward: what a share of the free memory holds, and half as many after one that did not fit.

Whoever sizes batches asks `Room.rows` and does the forward by `Room.attempt`. Knows nothing of rounds or objectives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from peerturb.zo.batch import Evaluator, Size
from peerturb.zo.free import free_bytes
from peerturb.zo.need import need_of
from peerturb.zo.shortage import is_out_of_memory, no_smaller_forward

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Part of the free memory that a forward is planned to need at most. On a CPU other programs live on the rest, and too
much gets one of them killed; on CUDA it is an error that can be caught, and what is lost are fragments."""

LOOK_S = 2.0
"""How long an answer holds: to ask takes a millisecond, and small models' rounds few."""

UNLIMITED = 2**62
"""Bytes where nothing sets a limit."""


class Room:
    """The rows that fit forwards of one evaluator, by what is free and by what has not fitted before.

    Args:
        evaluator: what does the forwards.
        family: of its perturbations; empty: the weights as they are.
        is_planned: False where a person has chosen the rows: then only memory that does run out is a limit.
        besides: bytes that each forward needs whatever its rows.
    """

    def __init__(
        self, evaluator: Evaluator[Any], *, family: str = "", is_planned: bool = True, besides: int = 0
    ) -> None:
        self._device = evaluator.device
        self._need = need_of(evaluator, family=family)
        self._fixed = self._need.fixed + besides
        self._is_planned = is_planned
        self._planned_bytes, self._tried_bytes = UNLIMITED, UNLIMITED
        """What may be needed by what is free, and by what has not fitted."""
        self._looked_s = float("-inf")

    def look(self) -> None:
        """Ask what is free: before a round or an evaluation, so that all of it is planned alike."""
        if time.monotonic() < self._looked_s + LOOK_S:
            return
        self._looked_s = time.monotonic()
        free = free_bytes(self._device) if self._is_planned else None
        if free is not None:
            self._planned_bytes = int(SHARE[self._device.type] * free) - self._fixed

    def row_bytes(self, size: Size) -> int:
        """Return what a row of this size needs, estimated."""
        return self._need.of(size)

    def rows(self, row_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows that need so much fit a forward, at least one."""
        fitting: NDArray[np.int64] = np.maximum(1, min(self._planned_bytes, self._tried_bytes) // row_bytes)
        return fitting

    def attempt(
        self, work: Callable[[], Result], *, rows: int, row_bytes: int, tokens: int, is_smallest: bool
    ) -> Result | None:
        """Do a forward; return None if memory ran out, and allow half as many rows from now on.

        Args:
            rows: of the forward.
            row_bytes: what each of them needs, estimated.
            tokens: of the longest of them.
            is_smallest: True if the forward cannot be split.

        Raises:
            ModelError: memory ran out in a forward that cannot be split.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if is_smallest:
                raise no_smaller_forward(error, self._device, rows=rows, tokens=tokens) from error
        # Not within the handler: until it ends, the error holds the failed forward's tensors.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._tried_bytes = min(self._tried_bytes, rows * row_bytes // 2)
        return None


def in_parts(
    evaluator: Evaluator[Item],
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Result],
    *,
    items_max: int,
    tokens_max: int = UNLIMITED,
    is_whole: bool | None = None,
) -> Iterator[Result]:
    """Yield what `work` makes of the items, in order, as many of them at once as memory allows.

    Args:
        evaluator: knows how large items are; one that judges them together gets `items_max` at once, whatever is free.
        work: does a forward of plain weights over some of the items.
        items_max: items at once, if memory is no limit.
        tokens_max: tokens at once, padding counted, if memory is no limit.
        is_whole: whether `work` judges items together; None: as the evaluator does.

    Raises:
        ModelError: memory runs out at a single item, or at items that are judged together.
    """
    room = Room(evaluator)
    room.look()
    is_whole = evaluator.is_whole if is_whole is None else is_whole
    sizes = [evaluator.size(item) for item in items]
    done = 0
    while done < len(items):
        ahead = sizes[done : done + items_max]
        rows_each = max(size.rows for size in ahead)
        tokens, row_bytes = max(size.tokens for size in ahead), max(room.row_bytes(size) for size in ahead)
        count = len(ahead)
        if not is_whole:
            rows = min(int(room.rows(np.array([row_bytes]))[0]), tokens_max // tokens)
            count = max(1, min(count, rows // rows_each))
        result = room.attempt(
            partial(work, items[done : done + count]),
            rows=count * rows_each,
            row_bytes=row_bytes,
            tokens=tokens,
            is_smallest=count == 1 or is_whole,
        )
        if result is not None:
            done += count
            yield result
