"""What a `rank1` perturbation does to activations, as Triton kernels: each activation is read and written once.

Sums are f32, rounded to the type of the activations once. Launch them through `peerturb.zo.cuda.rowwise` only. A
program has rows of one group, that is of one probe and side: their weights are the same.
"""

import triton.language as tl

from peerturb.zo.cuda.jit import jit, kernel


@jit
def _plus(a, b):  # type: ignore[no-untyped-def]
    return a + b


@jit
def _signs(signs, column, inside):  # type: ignore[no-untyped-def]
    """Return signs of these columns in f32, and 0 outside."""
    return tl.load(signs + column, mask=inside, other=0).to(tl.float32)


@jit
def _affine_row(  # type: ignore[no-untyped-def]
    plain, offset, signs, step, column, inside, HAS_PLAIN: tl.constexpr, HAS_SIGNS: tl.constexpr
):
    """Return offset + plain + step * signs of these columns, each part only where there is one."""
    row = tl.full(column.shape, 0.0, tl.float32) + offset
    if HAS_PLAIN:
        row += tl.load(plain + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SIGNS:
        row += _signs(signs, column, inside) * step
    return row


@kernel("rows", "per_side", "sides", "step", "bias_step")
def add_linear(  # type: ignore[no-untyped-def]
    x, y, a, b, bias, shift, rows, per_side, sides, columns, out, a_next, b_next, bias_next, step, bias_step,
    HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y += s * step * (x . b) * a + s * bias_step * bias + shift; s is 1 on the first side, -1 on the second.

    Args:
        x: [probes, rows, columns].
        y: [probes, rows, out].
        a, b, bias: int8 signs, a probe's row every `..._next` bytes.
        shift: [out].
        per_side: Rows of a probe that are on one side.
    """
    group = tl.program_id(1)
    probe, side = group // sides, group % sides
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (number < per_side)[:, None]
    row = probe.to(tl.int64) * rows + side * per_side + number
    sign = tl.where(side == 0, 1.0, -1.0)
    column = tl.arange(0, COLUMNS)[None, :]
    b += probe.to(tl.int64) * b_next
    a += probe.to(tl.int64) * a_next
    bias += probe.to(tl.int64) * bias_next

    x_rows = x + row[:, None] * columns
    products = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + column < columns
        values = tl.load(x_rows + start + column, mask=is_row & inside, other=0.0).to(tl.float32)
        products += values * _signs(b, start + column, inside)
    dots = (tl.reduce(products, 1, _plus) * (sign * step))[:, None]

    y_rows = y + row[:, None] * out
    for start in range(0, out, COLUMNS):
        inside = start + column < out
        pointers = y_rows + start + column
        values = tl.load(pointers, mask=is_row & inside, other=0.0).to(tl.float32)
        values += dots * _signs(a, start + column, inside)
        if HAS_BIAS or HAS_SHIFT:
            values += _affine_row(shift, 0.0, bias, sign * bias_step, start + column, inside, HAS_SHIFT, HAS_BIAS)
        tl.store(pointers, values.to(y.dtype.element_ty), mask=is_row & inside)


@kernel("rows", "per_side", "sides", "offset", "scale_step", "shift_step", "epsilon")
def affine(  # type: ignore[no-untyped-def]
    x, y, scale, shift, scale_signs, shift_signs, rows, per_side, sides, columns, scale_next, shift_next, offset,
    scale_step, shift_step, epsilon, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE_SIGNS: tl.constexpr,
    HAS_SHIFT_SIGNS: tl.constexpr, IS_NORMALISED: tl.constexpr, IS_CENTRED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = x * (offset + scale + s * scale_step * scale_signs) + (shift + s * shift_step * shift_signs).

    x is normalised before, if so wished, `epsilon` added to its variance. `COLUMNS` is not below `columns`.
    """
    group = tl.program_id(1)
    probe, side = group // sides, group % sides
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = probe.to(tl.int64) * rows + side * per_side + number
    sign = tl.where(side == 0, 1.0, -1.0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < columns
    mask = (number < per_side)[:, None] & inside
    values = tl.load(x + row[:, None] * columns + column, mask=mask, other=0.0).to(tl.float32)
    if IS_NORMALISED:
        if IS_CENTRED:
            values = tl.where(inside, values - (tl.reduce(values, 1, _plus) / columns)[:, None], 0.0)
        variance = tl.reduce(values * values, 1, _plus) / columns
        values *= (1.0 / tl.sqrt(variance + epsilon))[:, None]
    scale_signs += probe.to(tl.int64) * scale_next
    shift_signs += probe.to(tl.int64) * shift_next
    values *= _affine_row(scale, offset, scale_signs, sign * scale_step, column, inside, HAS_SCALE, HAS_SCALE_SIGNS)
    if HAS_SHIFT or HAS_SHIFT_SIGNS:
        values += _affine_row(shift, 0.0, shift_signs, sign * shift_step, column, inside, HAS_SHIFT, HAS_SHIFT_SIGNS)
    tl.store(y + row[:, None] * columns + column, values.to(y.dtype.element_ty), mask=mask)
