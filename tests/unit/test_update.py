"""The exact update: against plain sums, in every shape, order, device arithmetic and number of threads."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb import codec
from peerturb.errors import LogError, ModelError
from peerturb.limits import PROBES_PER_UPDATE_MAX
from peerturb.manifest import DType, Manifest, Parameter
from peerturb.zo import directions, gemm, plan, rounding, update
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.update import Family, apply_update

pytestmark = pytest.mark.usefixtures("either_loops")

ALPHA = float(np.float32(0.013))
SHAPES: list[tuple[tuple[int, ...], int, bool]] = [
    ((), 0, False),
    ((5,), -3, False),
    ((4097,), 0, False),
    ((1, 1), 0, False),
    ((130, 77), 0, False),
    ((1, 300), 1, False),
    ((300, 1), 0, False),
    ((4, 3, 2, 2), 2, False),
    ((3, 129, 5), 0, True),
    ((70, 65), 0, False),
]


def manifest_of(dtype: DType = "float32") -> Manifest:
    return tuple(
        Parameter(index=i, name=f"t{i}", shape=shape, dtype=dtype, exponent=exponent, is_stack=is_stack)
        for i, (shape, exponent, is_stack) in enumerate(SHAPES)
    )


def weights_of(manifest: Manifest) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(p.shape, generator=generator).mul_(0.02).to(getattr(torch, p.dtype)) if p.shape
        else torch.tensor(0.5, dtype=getattr(torch, p.dtype))
        for p in manifest
    ]  # fmt: skip


def sums_of(parameter: Parameter, family: Family, probes: Probes, codes: NDArray[np.int8]) -> Tensor:
    """U by the definition, in f64 (exact far beyond what is needed)."""
    noise_of = Directions(probes)
    factors = torch.from_numpy(codec.decode(codes)).to(torch.float64)
    matrices, rows, columns = parameter.stacked
    left = noise_of.left(parameter).to(torch.float64)
    if parameter.kind == "vector":
        total = factors @ left
    elif family == "rank1":
        right = noise_of.right(parameter).to(torch.float64).view(-1, matrices, columns)
        total = torch.einsum("p,pmr,pmc->mrc", factors, left.view(-1, matrices, rows), right)
    else:
        noise = torch.stack([noise_of.dense(parameter, p) for p in range(len(probes))]).to(torch.float64)
        total = torch.einsum("p,prc->rc", factors, noise)
    return total.reshape(parameter.shape)


SEALED: dict[str, Any] = {
    "run_key": 7, "round": 4, "slots": np.array([0, 3, 900]), "counts": np.array([5, 1, 11]),
    "codes": np.random.default_rng(0).integers(-128, 128, 17).astype(np.int8),
}  # fmt: skip


def probes_of(sealed: dict[str, Any]) -> Probes:
    samples = np.concatenate([np.arange(count) for count in sealed["counts"]])
    slots = np.repeat(sealed["slots"], sealed["counts"])
    return Probes.of(run_key=sealed["run_key"], round=sealed["round"], slots=slots, samples=samples)


def applied(manifest: Manifest, weights: Sequence[Tensor], family: Family = "rank1", **changes: Any) -> list[Tensor]:
    copies = [weight.clone() for weight in weights]
    apply_update(copies, manifest, family=family, **{**SEALED, "alpha": ALPHA, **changes})
    return copies


def equal_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    octets = [[weight.reshape(-1).view(torch.uint8) for weight in weights] for weights in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*octets, strict=True))


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles, groups and passes so small that every path is taken by small tensors."""
    monkeypatch.setitem(plan.TILE_ELEMENTS, "cpu", 500)
    monkeypatch.setitem(plan.SIGN_BYTES, "cpu", 4096)
    monkeypatch.setitem(update.DENSE_ELEMENTS, "cpu", 4096)
    monkeypatch.setitem(update.DENSE_PROBES, "cpu", 4)
    monkeypatch.setattr(update, "PROBES_PER_PASS", 8)
    plan.plan_groups.cache_clear()
    yield
    plan.plan_groups.cache_clear()


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_f32_weights_are_exact(family: Family) -> None:
    manifest = manifest_of()
    weights = weights_of(manifest)
    after = applied(manifest, weights, family)
    for parameter, old, new in zip(manifest, weights, after, strict=True):
        total = sums_of(parameter, family, probes_of(SEALED), SEALED["codes"])
        step = (total * ALPHA * 2.0**parameter.exponent).to(torch.float32)
        assert torch.equal(new, old - step), parameter.name
        assert not torch.equal(new, old)


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_bf16_weights_are_rounded_with_shared_noise(family: Family) -> None:
    manifest = manifest_of("bfloat16")
    weights = weights_of(manifest)
    after = applied(manifest, weights, family)
    for parameter, old, new in zip(manifest, weights, after, strict=True):
        total = sums_of(parameter, family, probes_of(SEALED), SEALED["codes"])
        step = (total * ALPHA * 2.0**parameter.exponent).to(torch.float32)
        noise = rounding.rounding_noise(parameter.index, 0, parameter.elements, 7, 4, 0, torch.device("cpu"))
        bits = (old.to(torch.float32) - step).reshape(-1).view(torch.int32) + noise
        assert torch.equal(new.reshape(-1).view(torch.int16), (bits >> 16).to(torch.int16)), parameter.name


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_the_cut_into_tiles_and_passes_does_not_matter(
    family: Family, dtype: DType, request: pytest.FixtureRequest
) -> None:
    manifest = manifest_of(dtype)
    weights = weights_of(manifest)
    cut = applied(manifest, weights, family)
    request.getfixturevalue("monkeypatch").undo()
    plan.plan_groups.cache_clear()
    assert equal_bits(cut, applied(manifest, weights, family))


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_without_int8_the_bits_are_the_same(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of()
    weights = weights_of(manifest)
    assert gemm.has_int8(torch.device("cpu")), "this machine's torch lost its int8 product: speed, not bits, suffers"
    expected = applied(manifest, weights, family)
    monkeypatch.setattr(gemm, "has_int8", lambda device: False)
    assert equal_bits(applied(manifest, weights, family), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_the_accelerators_code_gives_the_same_bits(
    family: Family, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on accelerators (words by torch, padded products), run on the CPU."""
    manifest = manifest_of(dtype)
    weights = weights_of(manifest)
    expected = applied(manifest, weights, family)
    monkeypatch.setattr(directions, "uses_numpy", lambda device: False)
    monkeypatch.setattr(gemm, "int8_product", gemm.padded_product)
    assert equal_bits(applied(manifest, weights, family), expected)


@pytest.mark.parametrize("family", ["rank1", "dense"])
def test_the_number_of_threads_does_not_matter(family: Family) -> None:
    manifest = manifest_of("bfloat16")
    weights = weights_of(manifest)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = applied(manifest, weights, family)
        torch.set_num_threads(3)
        assert equal_bits(applied(manifest, weights, family), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (127, 129), (17, 8)])
@pytest.mark.parametrize("probes", [1, 2, 7, 8, 512])
def test_products_of_strided_columns_are_exact(shape: tuple[int, int], probes: int) -> None:
    """Views as the update makes them; an extent of 1 once left torch's CPU product unwritten."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(probes)
    codes = torch.randint(-127, 128, (probes, 128 + rows), generator=generator, dtype=torch.int8)[:, 128:]
    signs = torch.randint(0, 2, (probes, 64 + columns), generator=generator, dtype=torch.int8)[:, 64:] * 2 - 1
    expected = codes.to(torch.float64).t() @ signs.to(torch.float64)
    for product in (gemm.int8_product, gemm.float_product, gemm.exact_product, gemm.padded_product):
        assert torch.equal(product(codes, signs).to(torch.float64), expected)
        assert torch.equal(product(codes.contiguous(), signs.contiguous()).to(torch.float64), expected)


def test_the_largest_sum_is_exact() -> None:
    codes = torch.full((PROBES_PER_UPDATE_MAX, 1), 127, dtype=torch.int8)
    signs = torch.ones((PROBES_PER_UPDATE_MAX, 2), dtype=torch.int8)
    codes[-1] = 126
    for product in (gemm.int8_product, gemm.float_product):
        assert product(codes, signs).tolist() == [[127 * PROBES_PER_UPDATE_MAX - 1] * 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_probes_than_one_update_sums_make_several(dtype: DType) -> None:
    manifest = (Parameter(index=0, name="w", shape=(3, 2), dtype=dtype),)
    weights = [torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.5, 0.25]]).to(getattr(torch, dtype))]
    counts = np.array([65_536, 65_536, 700])
    codes = np.random.default_rng(2).integers(-128, 128, int(counts.sum())).astype(np.int8)
    sealed = {**SEALED, "slots": np.array([1, 2, 3]), "counts": counts, "codes": codes}
    after = applied(manifest, weights, **sealed)
    probes, expected = probes_of(sealed), weights[0].clone()
    for chunk, start in enumerate(range(0, len(codes), PROBES_PER_UPDATE_MAX)):
        part = slice(start, start + PROBES_PER_UPDATE_MAX)
        total = sums_of(manifest[0], "rank1", probes.part(part.start, part.stop), codes[part])
        exact = expected.to(torch.float32) - (total * ALPHA).to(torch.float32)
        if dtype == "bfloat16":
            noise = rounding.rounding_noise(0, 0, 6, 7, 4, chunk, torch.device("cpu"))
            exact = rounding.stochastic_bfloat16(exact.reshape(-1), noise).view(3, 2)
        expected.copy_(exact)
    assert equal_bits(after, [expected])


def test_void_codes_count_for_nothing() -> None:
    manifest = manifest_of()
    weights = weights_of(manifest)
    codes = np.array([5, -128, -128, 9] + [-128] * 13, np.int8)
    zeros = np.where(codes == -128, 0, codes).astype(np.int8)
    assert equal_bits(applied(manifest, weights, codes=codes), applied(manifest, weights, codes=zeros))


@pytest.mark.parametrize("changes", [{"codes": np.full(17, -128, np.int8)}, {"codes": bytes(17)}, {"alpha": 0.0}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_that_says_nothing_changes_no_bit(changes: dict[str, Any], dtype: DType) -> None:
    manifest = manifest_of(dtype)
    weights = weights_of(manifest)
    weights[1][:2] = torch.tensor([-0.0, 0.0])
    assert equal_bits(applied(manifest, weights, **changes), weights)


def test_two_rounds_differ_in_their_noise() -> None:
    manifest = manifest_of()
    weights = weights_of(manifest)
    assert not equal_bits(applied(manifest, weights, round=5), applied(manifest, weights))


def test_tensors_that_are_not_contiguous_are_updated_too() -> None:
    manifest = (Parameter(index=0, name="w", shape=(6, 4), dtype="float32"),)
    plain = torch.randn(6, 4)
    turned = plain.t().contiguous().t()
    assert not turned.is_contiguous()
    apply_update([turned], manifest, family="rank1", alpha=ALPHA, **SEALED)
    assert equal_bits([turned], applied(manifest, [plain]))


def test_parameters_that_require_gradients_are_updated() -> None:
    manifest = (Parameter(index=0, name="w", shape=(6, 4), dtype="float32"),)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    expected = applied(manifest, [weight.detach()])
    apply_update([weight], manifest, family="rank1", alpha=ALPHA, **SEALED)
    assert equal_bits([weight.detach()], expected)


def test_empty_tensors_are_passed_over() -> None:
    manifest = (Parameter(index=0, name="w", shape=(0, 4), dtype="float32"),)
    apply_update([torch.zeros(0, 4)], manifest, family="rank1", alpha=ALPHA, **SEALED)
    apply_update([torch.zeros(0, 4)], manifest, family="dense", alpha=ALPHA, **SEALED)


def test_differences_are_rounded_once_even_among_subnormal_steps() -> None:
    total = torch.tensor([1, 3, -7, 2**24 - 1], dtype=torch.int32)
    for scale in (float(np.float32(1e-3)), float(np.float32(1.1e-38)) * 2.0**-16, 2.0**80):
        expected = (total.to(torch.float64) * scale).to(torch.float32)
        assert torch.equal(rounding.difference(total, scale), expected)


def test_bf16_rounding_is_unbiased_in_expectation() -> None:
    """A step of 3/16 of a bf16 ulp moves that share of the elements by one ulp: none is lost, none is invented."""
    ulp = 2.0**-7
    values = torch.full((1 << 18,), 1.0 + 3 / 16 * ulp)
    noise = rounding.rounding_noise(3, 0, len(values), 1, 2, 0, torch.device("cpu"))
    rounded = rounding.stochastic_bfloat16(values, noise).to(torch.float32)
    moved = (rounded - 1.0) / ulp
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    share, deviation = 3 / 16, (3 / 16 * 13 / 16 / len(values)) ** 0.5
    assert abs(float(moved.mean()) - share) < 4 * deviation


def test_bf16_rounding_leaves_infinities_alone() -> None:
    values = torch.tensor([float("inf"), float("-inf"), 1.0, 3.3895e38])
    rounded = rounding.stochastic_bfloat16(values, torch.full((4,), 0xFFFF, dtype=torch.int32))
    assert rounded.tolist()[:3] == [float("inf"), float("-inf"), 1.0]
    assert not rounded.isnan().any()


def test_noise_in_pieces_is_a_cut_of_the_whole() -> None:
    cpu = torch.device("cpu")
    whole = rounding.rounding_noise(3, 0, 1000, 1, 2, 5, cpu)
    for start, stop in [(0, 1), (7, 9), (13, 1000)]:
        assert torch.equal(rounding.rounding_noise(3, start, stop, 1, 2, 5, cpu), whole[start:stop])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"alpha": float("nan")}, LogError, "step size"),
        ({"alpha": float("inf")}, LogError, "step size"),
        ({"alpha": -1.0}, LogError, "step size"),
        ({"alpha": 0.1}, LogError, "must be an f32"),
        ({"alpha": 2.0**65}, LogError, "step size"),
        ({"counts": [5, 1, 12]}, LogError, "does not describe 17 codes"),
        ({"counts": [5, 12]}, LogError, "3 slots and 2 counts"),
        ({"counts": [17, 0, 0]}, LogError, "does not describe"),
        ({"slots": [3, 0, 900]}, LogError, "ascending"),
        ({"slots": [0, 0, 900]}, LogError, "distinct"),
        ({"slots": [0, 3, 2**32 - 1]}, LogError, "below ffffffff"),
    ],
)
def test_records_that_cannot_be_are_refused_and_change_nothing(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    manifest = manifest_of()
    weights = weights_of(manifest)
    copies = [weight.clone() for weight in weights]
    with pytest.raises(error, match=words):
        apply_update(copies, manifest, family="rank1", **{**SEALED, "alpha": ALPHA, **changes})
    assert equal_bits(copies, weights)


def test_tensors_that_do_not_fit_the_manifest_are_refused() -> None:
    manifest = (Parameter(index=0, name="w", shape=(6, 4), dtype="float32"),)
    with pytest.raises(ModelError, match=r"w is \(6, 5\) float32"):
        applied(manifest, [torch.zeros(6, 5)])
    with pytest.raises(ModelError, match=r"w is .* bfloat16"):
        applied(manifest, [torch.zeros(6, 4, dtype=torch.bfloat16)])
    with pytest.raises(ModelError, match="has 1 tensors, but 2"):
        applied(manifest, [torch.zeros(6, 4)] * 2)
