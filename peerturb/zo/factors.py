"""The signs of `rank1` for a micro-batch, made a page at a time: parameters that are neighbours share one pass.

One parameter at a time costs more in calls than in signs, all at once costs memory; a page is a stretch of the manifest
between the two. Knows where factors lie and keeps the last pages, nothing of models, types or epsilon.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from peerturb.manifest import Parameter
from peerturb.rng import SIDE_LEFT, SIDE_RIGHT, stream_of
from peerturb.zo.directions import Probes, Span, SpanTable
from peerturb.zo.perturbation import Side

PAGES_KEPT = 2
"""A layer that lies on the edge of two pages needs both in turn."""


class Pages:
    """Which factors lie on which page, and where.

    Args:
        manifest: the parameters, in order.
        columns_max: most signs of one probe on a page, unless a single parameter has more.
    """

    def __init__(self, manifest: Sequence[Parameter], columns_max: int) -> None:
        self.tables: list[SpanTable] = []
        self.places: dict[tuple[int, Side], tuple[int, slice]] = {}
        """Parameter index and side -> page and columns on it."""
        keys: list[tuple[int, Side]] = []
        spans: list[Span] = []
        width = 0
        for entry in manifest:
            matrices, rows, columns = entry.stacked
            sides: list[tuple[Side, int, int]] = [("left", SIDE_LEFT, matrices * rows)]
            if entry.kind != "vector":
                sides.append(("right", SIDE_RIGHT, matrices * columns))
            added = sum(length for _, _, length in sides)
            if spans and width + added > columns_max:
                self._end(keys, spans)
                keys, spans, width = [], [], 0
            keys += [(entry.index, side) for side, _, _ in sides]
            spans += [Span(stream=stream_of(entry.index, number), start=0, stop=length) for _, number, length in sides]
            width += added
        self._end(keys, spans)

    def _end(self, keys: Sequence[tuple[int, Side]], spans: Sequence[Span]) -> None:
        """Close the page that holds these."""
        table = SpanTable(spans)
        page = len(self.tables)
        self.tables.append(table)
        self.places.update({key: (page, columns) for key, columns in zip(keys, table.columns, strict=True)})


class PagedSigns:
    """The signs of a micro-batch's probes (`peerturb.zo.perturbation.PagedFactors`)."""

    def __init__(self, pages: Pages, probes: Probes, device: torch.device) -> None:
        self._pages = pages
        self._probes = probes
        self._device = device
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    @property
    def page_count(self) -> int:
        """How many pages there are."""
        return len(self._pages.tables)

    def place(self, parameter: Parameter, side: Side) -> tuple[int, slice]:
        """Return the page and the columns of one factor."""
        return self._pages.places[parameter.index, side]

    def page(self, number: int) -> Tensor:
        """Return a page: int8[probes, width]."""
        found = self._kept.get(number)
        if found is None:
            found = self._kept[number] = self._pages.tables[number].signs(self._probes, self._device)
            if len(self._kept) > PAGES_KEPT:
                self._kept.popitem(last=False)
        return found

    def left(self, parameter: Parameter) -> Tensor:
        """See `Signs`."""
        return self._side(parameter, "left")

    def right(self, parameter: Parameter) -> Tensor:
        """See `Signs`."""
        return self._side(parameter, "right")

    def dense(self, parameter: Parameter, probe: int) -> Tensor:
        """Only the `dense` family asks for this, and it does not use this class."""
        raise NotImplementedError

    def _side(self, parameter: Parameter, side: Side) -> Tensor:
        number, columns = self.place(parameter, side)
        return self.page(number).narrow(1, columns.start, columns.stop - columns.start)
