"""Properties of the numerics over generated shapes, codes and weights."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerturb import codec, stepping
from peerturb.floats import is_f32
from peerturb.manifest import Parameter
from peerturb.spec import StepSpec
from peerturb.zo import gemm
from peerturb.zo.digest import tensor_digest
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.update import Family, apply_update

U32 = st.integers(0, 2**32 - 1)
CODES = st.lists(st.integers(-128, 127), max_size=64).map(lambda values: np.array(values, np.int8))
SCALES = st.floats(stepping.SCALE_MIN, stepping.SCALE_MAX, width=32)


@given(st.lists(st.floats(width=64), max_size=32), SCALES, st.data())
def test_codes_stay_in_range_and_near_the_quotient(values: list[float], scale: float, data: st.DataObject) -> None:
    words = data.draw(st.lists(U32, min_size=len(values), max_size=len(values)))
    projected = np.array(values, np.float64)
    stochastic = codec.encode(projected, scale, rounding="stochastic", noise=np.array(words, np.uint32))
    for codes, reach in ((codec.encode(projected, scale), 0.5), (stochastic, 1.0)):
        for value, code in zip(values, codes.tolist(), strict=True):
            if not math.isfinite(value):
                assert code == stepping.VOID
            elif abs(value) >= 128 * scale:
                assert code == math.copysign(127, value)
            else:
                assert abs(code - max(min(value / scale, 127.0), -127.0)) <= reach


@given(SCALES, CODES)
def test_next_scale_stays_in_bounds_and_never_jumps(scale: float, codes: np.ndarray) -> None:
    following = float(stepping.next_scale(scale, codes))
    assert stepping.SCALE_MIN <= following <= stepping.SCALE_MAX
    assert scale / 4 <= following <= scale * 2 or following in (stepping.SCALE_MIN, stepping.SCALE_MAX)
    assert following == float(stepping.next_scale(scale, codes[::-1]))


@given(
    SCALES,
    CODES,
    st.sampled_from(["normalized", "sgd"]),
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
    st.integers(1, 2**32 - 1),
)
def test_step_size_is_always_an_f32_that_an_update_takes(
    scale: float, codes: np.ndarray, rule: str, schedule: str, round_: int, warmup: int, total: int
) -> None:
    step = StepSpec.model_validate({"rule": rule, "schedule": schedule, "warmup_rounds": warmup, "learning_rate": 1e3})
    alpha = stepping.step_size(step, round_, scale, codes, total)
    assert is_f32(alpha)
    assert 0 <= alpha <= stepping.STEP_MAX


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    codes=st.lists(st.integers(-128, 127), min_size=1, max_size=40).map(lambda values: np.array(values, np.int8)),
    family=st.sampled_from(["rank1", "dense"]),
    is_stack=st.booleans(),
    exponent=st.integers(-16, 16),
    run_key=U32,
    round_=U32,
    cut=st.integers(1, 40),
)
def test_an_update_is_the_sum_of_its_definition(
    shape: tuple[int, ...],
    codes: np.ndarray,
    family: Family,
    is_stack: bool,
    exponent: int,
    run_key: int,
    round_: int,
    cut: int,
) -> None:
    parameter = Parameter(
        index=1, name="w", shape=shape, dtype="float32", exponent=exponent, is_stack=is_stack and len(shape) == 3
    )
    counts = [cut, len(codes) - cut] if cut < len(codes) else [len(codes)]
    slots = [4, 65_535][: len(counts)]
    alpha = float(np.float32(1e-4))
    weight = torch.zeros(shape)
    apply_update(
        [weight], (parameter,), family=family, run_key=run_key, round=round_, slots=slots, counts=counts,
        codes=codes, alpha=alpha,
    )  # fmt: skip
    samples = np.concatenate([np.arange(count) for count in counts])
    directions = Directions(Probes.of(run_key=run_key, round=round_, slots=np.repeat(slots, counts), samples=samples))
    matrices, rows, columns = parameter.stacked
    total = np.zeros((matrices, rows, columns))
    for probe, code in enumerate(codec.decode(codes).tolist()):
        if parameter.kind == "vector":
            noise = directions.left(parameter)[probe].numpy()
        elif family == "dense":
            noise = directions.dense(parameter, probe).numpy()
        else:
            left = directions.left(parameter)[probe].numpy().reshape(matrices, rows, 1)
            noise = left * directions.right(parameter)[probe].numpy().reshape(matrices, 1, columns)
        total += code * noise.reshape(total.shape).astype(np.float64)
    expected = (total * alpha * 2.0**exponent).astype(np.float32).reshape(shape)
    assert np.array_equal(0 - expected, weight.numpy())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_products_agree_whatever_the_strides(
    rows: int, columns: int, depth: int, seed: int, is_left_turned: bool, is_right_turned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-127, 128, (depth, rows), generator=generator, dtype=torch.int8)
    right = torch.randint(-1, 2, (depth, columns), generator=generator, dtype=torch.int8)
    expected = left.to(torch.float64).t() @ right.to(torch.float64)
    left = left.t().contiguous().t() if is_left_turned else left
    right = right.t().contiguous().t() if is_right_turned else right
    assert torch.equal(gemm.int8_product(left, right).to(torch.float64), expected)
    assert torch.equal(gemm.float_product(left, right).to(torch.float64), expected)


@settings(deadline=None)
@given(st.lists(U32, max_size=300), st.integers(0, 299), st.integers(1, 2**32 - 1))
def test_any_change_of_one_element_changes_the_digest(bits: list[int], where: int, change: int) -> None:
    if not bits:
        return
    words = np.array(bits, np.uint32)
    before = tensor_digest(torch.from_numpy(words.view(np.float32)))
    words[where % len(words)] ^= np.uint32(change)
    assert tensor_digest(torch.from_numpy(words.view(np.float32))) != before
