"""Which examples share a forward: units sorted by length and cut into micro-batches. Arithmetic alone, no model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What a contribution is measured in: some examples of a sample, whole on all its sides."""

    samples: NDArray[np.int64]
    """Of each unit: [units]."""
    examples: NDArray[np.int64]
    """By number: [units, examples of each]."""
    places: NDArray[np.int64]
    """Which of its sample's examples each is: [units, examples of each]."""

    @classmethod
    def of(cls, drawn: NDArray[np.int64], *, first: int = 0, is_whole: bool) -> "Units":
        """Make one unit of all a sample's examples, or one of each.

        Args:
            drawn: [samples, examples per probe] numbers of examples.
            first: number of the first sample.
        """
        samples = np.arange(first, first + len(drawn))
        places = np.broadcast_to(np.arange(drawn.shape[1]), drawn.shape)
        units = cls(samples=samples, examples=drawn, places=places)
        return units if is_whole else units.singles()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def together(self) -> int:
        """Examples of each unit."""
        return int(self.examples.shape[1])

    def take(self, chosen: NDArray[np.int64] | slice) -> "Units":
        """Return some of the units, in the order given."""
        return Units(samples=self.samples[chosen], examples=self.examples[chosen], places=self.places[chosen])

    def singles(self) -> "Units":
        """Return the same examples, each a unit of its own."""
        return Units(
            samples=self.samples.repeat(self.together),
            examples=self.examples.reshape(-1, 1),
            places=self.places.reshape(-1, 1),
        )

    def halves(self) -> tuple["Units", "Units"]:
        """Return two with about half as much: of the units, or of the examples of a single one."""
        if len(self) > 1:
            half = len(self) // 2
            return self.take(slice(half)), self.take(slice(half, None))
        half = self.together // 2
        columns = slice(half), slice(half, None)
        first, second = (
            Units(samples=self.samples, examples=self.examples[:, part], places=self.places[:, part])
            for part in columns
        )
        return first, second


def cheapest_cuts(
    lengths: NDArray[np.int64], most: NDArray[np.int64], *, rows: int, cut_tokens: int
) -> Iterator[slice]:
    """Yield where to cut units that are sorted by falling length, such that the least is computed in all.

    A group computes its rows at the length of its first unit; each group costs `cut_tokens` besides. Solved from the
    end: the best cuts of a tail follow from those of the tails behind it.

    Args:
        lengths: tokens of a row of each unit.
        most: units that fit a forward as long as this one: [units], at least 1.
        rows: of each unit.
    """
    count = len(lengths)
    costs, sizes = np.zeros(count + 1), np.ones(count, np.int64)
    for first in range(count - 1, -1, -1):
        ends = np.arange(1, min(int(most[first]), count - first) + 1)
        tried = cut_tokens + rows * ends * lengths[first] + costs[first + ends]
        best = int(tried.argmin())
        sizes[first], costs[first] = best + 1, tried[best]
    first = 0
    while first < count:
        yield slice(first, first + int(sizes[first]))
        first += int(sizes[first])
