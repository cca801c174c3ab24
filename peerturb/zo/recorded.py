"""Record a forward of one shape on a CUDA device and play it again: else a card waits for Python, hundreds of times.

A recording (a CUDA graph) reads the same tensors at each play: a batch and its signs are copied into them. Recordings
share their scratch memory. What cannot be recorded runs as it is. Knows nothing of objectives or signs.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from peerturb.zo.perturbation import PagedFactors, Perturbation
from peerturb.zo.rows import Rows
from peerturb.zo.shortage import is_out_of_memory
from peerturb.zo.written import Written

Work = Callable[[Rows, Perturbation | None], Tensor]
"""Rows and perturbation to losses, the same operations for all rows of the same shapes."""

SEEN_BEFORE = 2
"""Forwards of a shape that run as they are before one is recorded: a recording takes as long as several."""
RECORDINGS_MAX = 16
"""Recordings kept: those of the shapes that came last."""
SHAPES_MAX = 1_000
"""Shapes whose forwards are counted."""


@dataclass(slots=True, kw_only=True)
class Recording:
    """A recorded forward and the tensors that it reads and writes."""

    graph: Any
    rows: Rows
    page: Tensor | None
    """Signs of the perturbation."""
    perturbation: Perturbation | None
    """Its tensors are read too."""
    losses: Tensor


class Recorder:
    """Forwards of one model on one CUDA device.

    Args:
        work: what is recorded.
        parameters: where the weights lie: a recording reads these addresses.
    """

    def __init__(self, work: Work, parameters: Sequence[Tensor]) -> None:
        self._work = work
        self._parameters = parameters
        self._seen: Counter[Any] = Counter()
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self._pool: Any = None
        self.failure: str | None = None
        """Why nothing is recorded any more; None: it is."""

    def losses(self, rows: Rows, perturbation: Perturbation | None) -> Tensor:
        """Return what `work` returns, from a recording where there is one for these shapes."""
        if self.failure is not None or not _is_plain(perturbation):
            return self._work(rows, perturbation)
        key = self._key(rows, perturbation)
        found = self._recordings.get(key)
        if found is None and self._is_rare(key):
            return self._unrecorded(rows, perturbation)
        try:
            found = found or self._record(rows, perturbation)
        except Exception as error:  # this model's forward waits for results of its own, or memory is short
            reason = f"{type(error).__name__}: {error}"
        else:
            self._keep(key, found)
            return _play(found, rows, perturbation)
        # Not within the handler: until it ends, the error holds the failed forward's tensors.
        self._give_up(reason)
        return self._work(rows, perturbation)

    def _unrecorded(self, rows: Rows, perturbation: Perturbation | None) -> Tensor:
        """Run a forward as it is; where memory runs out, once more without what recordings hold."""
        try:
            return self._work(rows, perturbation)
        except Exception as error:
            if not self._recordings or not is_out_of_memory(error):
                raise
        self._give_up("memory ran out")
        return self._work(rows, perturbation)

    def _keep(self, key: Any, recording: Recording) -> None:
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > RECORDINGS_MAX:
            self._recordings.popitem(last=False)

    def _is_rare(self, key: Any) -> bool:
        """Count a forward of this shape; tell whether there were too few to record one."""
        if len(self._seen) > SHAPES_MAX:
            self._seen.clear()
        self._seen[key] += 1
        return self._seen[key] <= SEEN_BEFORE

    def _key(self, rows: Rows, perturbation: Perturbation | None) -> Any:
        """Return all that a forward's operations and addresses depend on, besides what is copied."""
        shapes = tuple(None if value is None else (value.shape, value.dtype) for value in _tensors(rows).values())
        addresses = hash(tuple(parameter.data_ptr() for parameter in self._parameters))
        if perturbation is None:
            return shapes, addresses
        page = _page(perturbation)
        kind = (type(perturbation), perturbation.probes, perturbation.sides, perturbation.epsilon, perturbation.dtype)
        return shapes, addresses, kind, page.shape, page.stride()

    def _record(self, rows: Rows, perturbation: Perturbation | None) -> Recording:
        own: dict[str, Any] = {name: value.clone() for name, value in _tensors(rows).items() if value is not None}
        rows = replace(rows, **own)
        page = None if perturbation is None else _page(perturbation)  # made before: the recording must not make it
        device = rows.ids.device
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: they must not spoil the recording.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._work(rows, perturbation)
        return Recording(graph=graph, rows=rows, page=page, perturbation=perturbation, losses=losses)

    def _give_up(self, reason: str) -> None:
        """Free the recordings and make no more."""
        self.failure = reason
        self._recordings.clear()
        self._pool = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_plain(perturbation: Perturbation | None) -> bool:
    """True if a perturbation's signs are one page (those of several are made during the forward), its weights plain."""
    if perturbation is None:
        return True
    signs = perturbation.signs
    return isinstance(signs, PagedFactors) and signs.page_count == 1 and not isinstance(perturbation, Written)


def _page(perturbation: Perturbation) -> Tensor:
    assert isinstance(perturbation.signs, PagedFactors)
    return perturbation.signs.page(0)


def _tensors(rows: Rows) -> dict[str, Tensor | None]:
    found = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {name: value for name, value in found.items() if value is None or isinstance(value, Tensor)}


@torch.inference_mode()
def _play(recording: Recording, rows: Rows, perturbation: Perturbation | None) -> Tensor:
    """Copy a batch into a recording's tensors, play it, return a copy of its losses."""
    targets = _tensors(recording.rows)
    for name, value in _tensors(rows).items():
        target = targets[name]
        if value is not None and target is not None:
            target.copy_(value)
    if recording.page is not None and perturbation is not None:
        recording.page.copy_(_page(perturbation))
    recording.graph.replay()
    return recording.losses.clone()
