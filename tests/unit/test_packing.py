"""Units and their cuts: every example once, and the cheapest cuts there are."""

from itertools import pairwise

import numpy as np
import pytest

from peerturb.zo.packing import Units, cheapest_cuts


def test_units_hold_every_example_once() -> None:
    drawn = np.array([[5, 1], [2, 7], [4, 4]])
    whole = Units.of(drawn, first=10, is_whole=True)
    assert (len(whole), whole.together) == (3, 2)
    assert whole.samples.tolist() == [10, 11, 12]
    single = Units.of(drawn, first=10, is_whole=False)
    assert (len(single), single.together) == (6, 1)
    assert single.samples.tolist() == [10, 10, 11, 11, 12, 12]
    assert single.examples[:, 0].tolist() == [5, 1, 2, 7, 4, 4]
    some = single.take(np.array([3, 0]))
    assert (some.samples.tolist(), some.examples.tolist()) == ([11, 10], [[7], [5]])


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_cuts_are_found(seed: int) -> None:
    """Against all 64 ways to cut seven units."""
    lengths = np.sort(np.random.default_rng(seed).integers(1, 2_000, 7))[::-1]
    most = np.full(7, 4)

    def cost(cuts: list[tuple[int, int]]) -> int:
        return sum(256 + 2 * (stop - first) * int(lengths[first]) for first, stop in cuts)

    every = []
    for bits in range(64):
        cuts = list(pairwise([0, *(place + 1 for place in range(6) if bits >> place & 1), 7]))
        if all(stop - first <= 4 for first, stop in cuts):
            every.append(cost(cuts))
    found = [(cut.start, cut.stop) for cut in cheapest_cuts(lengths, most, rows=2, cut_tokens=256)]
    assert [first for first, _ in found[1:]] == [stop for _, stop in found[:-1]]
    assert (found[0][0], found[-1][1]) == (0, 7)
    assert cost(found) == min(every)
    assert all(stop - first <= 4 for first, stop in found)


def test_longer_units_allow_fewer_of_them() -> None:
    cuts = list(cheapest_cuts(np.array([100, 100, 10, 10, 10]), np.array([1, 1, 9, 9, 9]), rows=2, cut_tokens=10**6))
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 1), (1, 2), (2, 5)]
