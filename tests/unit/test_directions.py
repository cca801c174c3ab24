"""Signs of parameters: layouts, stacks, ranges, devices' agreement."""

import numpy as np
import pytest
import torch

from peerturb import rng
from peerturb.errors import ModelError
from peerturb.manifest import Parameter
from peerturb.zo import philox
from peerturb.zo.directions import Directions, Probes, Span, SpanTable, dense_signs, left_signs, right_signs

pytestmark = pytest.mark.usefixtures("either_loops")

PROBES = Probes.of(run_key=17, round=4, slots=[0, 0, 7], samples=[0, 1, 0])


def parameter(*shape: int, index: int = 2, is_stack: bool = False) -> Parameter:
    return Parameter(index=index, name="w", shape=shape, dtype="float32", is_stack=is_stack)


def linear(stream: int, elements: int) -> torch.Tensor:
    return torch.from_numpy(
        rng.linear_signs(stream, 0, elements, round=4, run_key=17, slots=PROBES.slots, samples=PROBES.samples)
    )


def planar(stream: int, elements: int) -> torch.Tensor:
    """The planar layout as its definition says, element by element."""
    e = np.arange(elements)
    q, r = e // 4096, e % 4096
    words = rng.philox(32 * q + r % 32, stream, PROBES.samples[:, None], 4, key=(17, PROBES.slots[:, None]))
    picked = np.take_along_axis(words, (r % 128 // 32)[None, :, None], axis=2)[..., 0]
    return torch.from_numpy(1 - 2 * ((picked >> (r // 128).astype(np.uint32)) & 1).astype(np.int8))


@pytest.mark.parametrize("rows", [1, 3, 5, 127, 129, 4097])
def test_factors_are_linear(rows: int) -> None:
    matrix = parameter(rows, 3)
    assert torch.equal(left_signs(matrix, PROBES), linear(4 * 2, rows))
    assert torch.equal(right_signs(matrix, PROBES), linear(4 * 2 + 1, 3))


def test_stacks_run_through_all_their_matrices() -> None:
    stack = parameter(3, 50, 7, is_stack=True)
    assert torch.equal(left_signs(stack, PROBES), linear(8, 150))
    assert torch.equal(right_signs(stack, PROBES), linear(9, 21))


def test_higher_ranks_are_first_by_rest() -> None:
    convolution = parameter(4, 3, 2, 2)
    assert left_signs(convolution, PROBES).shape == (3, 4)
    assert torch.equal(right_signs(convolution, PROBES), linear(9, 12))


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_are_linear_in_both_families_and_have_no_right_factor(shape: tuple[int, ...]) -> None:
    vector = parameter(*shape)
    assert torch.equal(left_signs(vector, PROBES), linear(8, vector.elements))
    assert torch.equal(dense_signs(vector, PROBES), linear(8, vector.elements))
    with pytest.raises(ModelError, match="is a vector"):
        right_signs(vector, PROBES)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (127, 129), (4097, 1), (5, 8192)])
def test_dense_signs_are_planar(shape: tuple[int, int]) -> None:
    matrix = parameter(*shape)
    assert torch.equal(dense_signs(matrix, PROBES), planar(8 + 2, matrix.elements))


def test_dense_signs_come_in_any_piece() -> None:
    matrix = parameter(100, 100)
    whole = dense_signs(matrix, PROBES)
    for start, stop in [(0, 1), (4095, 4097), (5000, 9999), (8192, 10000)]:
        assert torch.equal(dense_signs(matrix, PROBES, start=start, stop=stop), whole[:, start:stop])


def test_directions_hand_out_one_probe_as_a_matrix() -> None:
    stack = parameter(2, 3, 4, is_stack=True)
    directions = Directions(PROBES)
    assert torch.equal(directions.dense(stack, 2), dense_signs(stack, PROBES)[2].view(6, 4))
    assert torch.equal(directions.left(stack), left_signs(stack, PROBES))
    assert torch.equal(directions.right(stack), right_signs(stack, PROBES))


def test_spans_lie_side_by_side() -> None:
    spans = [Span(stream=4, start=100, stop=300), Span(stream=9, start=0, stop=1), Span(stream=4, start=0, stop=128)]
    table = SpanTable(spans)
    signs = table.signs(PROBES, torch.device("cpu"), rows=8)
    assert signs.shape == (8, table.width)
    assert not signs[3:].any()
    for span, columns in zip(spans, table.columns, strict=True):
        assert torch.equal(signs[:3, columns], linear(span.stream, span.stop)[:, span.start :])


def test_torch_unpacks_like_numpy() -> None:
    """What runs on accelerators, run on the CPU."""
    blocks, streams = torch.arange(64), torch.full((64,), 10)
    samples, slots = (torch.from_numpy(a.astype(np.int64)) for a in (PROBES.samples, PROBES.slots))
    words = philox.grid_words(blocks, streams, samples, slots, round=4, run_key=17)
    assert torch.equal(philox.unpack_linear(words), linear(10, 64 * 128))
    assert torch.equal(1 - 2 * philox.unpack_planar(words), planar(10, 2 * 4096))


@pytest.mark.parametrize(
    "changed",
    [
        Probes.of(run_key=9, round=2, slots=3, samples=[4]),
        Probes.of(run_key=1, round=9, slots=3, samples=[4]),
        Probes.of(run_key=1, round=2, slots=9, samples=[4]),
        Probes.of(run_key=1, round=2, slots=3, samples=[9]),
    ],
)
def test_every_word_of_key_and_counter_matters(changed: Probes) -> None:
    vector = parameter(1000)
    reference = left_signs(vector, Probes.of(run_key=1, round=2, slots=3, samples=[4]))
    assert 400 < int((left_signs(vector, changed) != reference).sum()) < 600


def test_every_tensor_has_its_own_signs() -> None:
    one, other = left_signs(parameter(1000), PROBES), left_signs(parameter(1000, index=3), PROBES)
    assert 1200 < int((one != other).sum()) < 1800


def test_signs_do_not_depend_on_the_number_of_threads() -> None:
    table = SpanTable([Span(stream=4, start=0, stop=300_000)])
    probes = Probes.of(run_key=1, round=2, slots=3, samples=np.arange(20))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = table.signs(probes, torch.device("cpu"))
        torch.set_num_threads(3)
        assert torch.equal(table.signs(probes, torch.device("cpu")), alone)
    finally:
        torch.set_num_threads(before)
