"""Weight digests against the plain sum."""

import struct

import pytest
import torch

from peerturb.errors import ModelError
from peerturb.ids import short_hex
from peerturb.manifest import Parameter
from peerturb.zo import digest
from peerturb.zo.digest import run_digest, short_digest, tensor_digest

pytestmark = pytest.mark.usefixtures("either_loops")

WORD = 2**64 - 1


def splitmix64(i: int) -> int:
    z = (i + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def plain(bits: list[int]) -> int:
    return sum((splitmix64(i) | 1) * x for i, x in enumerate(bits)) & WORD


def bits_of(values: torch.Tensor) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values.flatten().tolist()]


def test_splitmix64_starts_as_published() -> None:
    first = digest.splitmix64(torch.zeros(1, dtype=torch.int64))
    assert int(first) & WORD == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (129, 3), (3, 4, 5)])
def test_tensor_digest_is_the_sum(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    assert tensor_digest(values) == plain(bits_of(values))
    halves = values.to(torch.bfloat16)
    assert tensor_digest(halves) == plain([bits >> 16 for bits in bits_of(halves.to(torch.float32))])


def test_row_major_order_counts_not_storage() -> None:
    values = torch.randn(5, 7)
    assert tensor_digest(values.t().contiguous().t()) == tensor_digest(values)
    assert tensor_digest(values.t()) != tensor_digest(values)


def test_tiles_and_uncached_hashes_give_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(70_001)
    expected = tensor_digest(values)
    monkeypatch.setitem(digest._TILE_ELEMENTS, "cpu", 1 << 10)
    monkeypatch.setattr(digest, "_CACHED_ELEMENTS", 1 << 12)
    monkeypatch.setattr(digest, "_cache", {})
    assert tensor_digest(values) == expected == plain(bits_of(values))


def test_one_bit_and_a_swap_are_seen() -> None:
    values = torch.randn(1000)
    changed = values.clone()
    changed.view(torch.int32)[999] ^= 1
    swapped = values.clone()
    swapped[[0, 1]] = values[[1, 0]]
    assert len({tensor_digest(v) for v in (values, changed, swapped)}) == 3


def test_negative_zero_differs_from_zero() -> None:
    assert tensor_digest(torch.tensor([-0.0])) != tensor_digest(torch.tensor([0.0]))


def manifest_of(name: str, shape: tuple[int, ...]) -> tuple[Parameter, ...]:
    return (Parameter(index=0, name=name, shape=shape, dtype="float32"),)


def test_run_digest_covers_name_shape_dtype_and_values() -> None:
    zeros = torch.zeros(2, 3)
    digests = {
        run_digest(manifest_of("a", (2, 3)), [zeros]),
        run_digest(manifest_of("b", (2, 3)), [zeros]),
        run_digest(manifest_of("a", (3, 2)), [zeros.view(3, 2)]),
        run_digest(manifest_of("a", (6,)), [zeros.view(6)]),
        run_digest(manifest_of("a", (2, 3)), [zeros + 1]),
        run_digest((Parameter(index=0, name="a", shape=(2, 3), dtype="bfloat16"),), [zeros.to(torch.bfloat16)]),
        run_digest((), []),
    }
    assert len(digests) == 7
    assert {len(value) for value in digests} == {32}


def test_run_digest_refuses_other_tensors() -> None:
    with pytest.raises(ModelError, match="a is"):
        run_digest(manifest_of("a", (2, 3)), [torch.zeros(3, 2)])


def test_short_digest_is_little_endian() -> None:
    assert short_digest(bytes([1, 2, 3, 4, 5])) == 0x04030201


@pytest.mark.parametrize("digest", [bytes(range(32)), bytes(32), b"\xff" * 32])
def test_a_short_digest_is_shown_as_the_beginning_of_the_whole_one(digest: bytes) -> None:
    shown = short_hex(short_digest(digest))
    assert len(shown) == 8
    assert digest.hex().startswith(shown)
