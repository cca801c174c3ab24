"""The numerics' inner loops as Triton kernels: signs, fused updates, the two roundings, the digest.

What each makes is defined by docs/numerics.md, bit for bit. Launch them through `peerturb.zo.cuda.launch` only, which
switches the fusion of multiplications with subtractions off: with it the update would round once instead of twice.

Words are 32 bits wide, as the generator's are; only a product has 64. Offsets of elements have 64 bits.
"""

from typing import Any

import triton.language as tl

from peerturb.rng import GROUP_BLOCKS, GROUP_SIGNS, KEY_STEPS, MULTIPLIERS, ROUNDING_SLOT, SIGNS_PER_BLOCK
from peerturb.zo.cuda.jit import jit, kernel

Block = Any
"""A Triton tensor, or one of its scalars: Triton has no types that a checker could follow."""

# A kernel sees only such constants of its module.
_M0 = tl.constexpr(MULTIPLIERS[0])
_M1 = tl.constexpr(MULTIPLIERS[1])
_STEP0 = tl.constexpr(KEY_STEPS[0])
_STEP1 = tl.constexpr(KEY_STEPS[1])
_NOBODY = tl.constexpr(ROUNDING_SLOT)
_GROUP_BLOCKS = tl.constexpr(GROUP_BLOCKS)
_GROUP_SIGNS = tl.constexpr(GROUP_SIGNS)
_SIGNS = tl.constexpr(SIGNS_PER_BLOCK)
_EXPONENT = tl.constexpr(0x7F80_0000)
_PLANES = tl.constexpr(16)
"""Bit planes in half a word."""
_FLUSH = tl.constexpr(256)
"""Probes whose codes' sum surely fits 16 bits: 127 * 256 < 2**15."""


@jit
def _plus(a, b):  # type: ignore[no-untyped-def]
    return a + b


@jit
def _word(value):  # type: ignore[no-untyped-def]
    """Take an int32 argument's bits as an unsigned word."""
    return value.to(tl.uint32, bitcast=True)


@jit
def _philox(block, stream, sample, round, key0, slot):  # type: ignore[no-untyped-def]
    """Return the four words of each counter. Operands are uint32; whatever is the same for all lanes stays scalar."""
    c0, c1, c2, c3, key1 = block, stream, sample, round, slot
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * _M0
        product1 = c2.to(tl.uint64) * _M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 += _STEP0
        key1 += _STEP1
    return c0, c1, c2, c3


@jit
def _four(w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Put a block's words beside each other: [R, C] four times -> [R, C, 2, 2], row-major w0, w1, w2, w3."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@jit
def _noise(block, stream, chunk, round, run_key, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the rounding noise of whole blocks, eight elements each: uint32[ROWS, 8 * COLUMNS]."""
    nobody = tl.full([1, 1], _NOBODY, tl.uint32)
    w0, w1, w2, w3 = _philox(block, stream, chunk, round, run_key, nobody)
    words = _four(w0, w1, w2, w3)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, 8 * COLUMNS])


@jit
def _noise_of_each(element, stream, chunk, round, run_key):  # type: ignore[no-untyped-def]
    """The same for elements at any place, a block for each of them: eight times the work, no alignment asked for."""
    nobody = tl.full([1, 1], _NOBODY, tl.uint32)
    w0, w1, w2, w3 = _philox((element >> 3).to(tl.uint32), stream, chunk, round, run_key, nobody)
    half = element & 7
    low = tl.where(half < 2, w0, w1)
    word = tl.where(half < 4, low, tl.where(half < 6, w2, w3))
    return tl.where((half & 1) == 0, word & 0xFFFF, word >> 16)


@jit
def _float_of(total):  # type: ignore[no-untyped-def]
    """Return integers below 2**22 as f32, exactly: by an addition, where a conversion takes four times as long.

    1.5 * 2**23 + n is the float whose bits are those of 1.5 * 2**23, plus n.
    """
    return (total + 0x4B40_0000).to(tl.float32, bitcast=True) - 12_582_912.0


@jit
def _step(total, scale):  # type: ignore[no-untyped-def]
    """D = f32(scale * U): U is exact in f32, so this is the one rounding."""
    return total.to(tl.float32) * scale


@jit
def _subtract_float32(pointers, mask, total, scale):  # type: ignore[no-untyped-def]
    """W - D, in place."""
    weight = tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, weight - _step(total, scale), mask=mask)


@jit
def _subtract_bfloat16(pointers, mask, total, scale, noise):  # type: ignore[no-untyped-def]
    """W - D in f32, plus noise, upper half; the pointers are to uint16."""
    weight = (tl.load(pointers, mask=mask, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    bits = (weight - _step(total, scale)).to(tl.uint32, bitcast=True)
    # Noise would turn an infinity into NaN.
    bits += tl.where((bits & _EXPONENT) == _EXPONENT, 0, noise)
    tl.store(pointers, (bits >> 16).to(tl.uint16), mask=mask)


@kernel("total_blocks", "scaled", "probes", "round", "run_key")
def fill_signs(  # type: ignore[no-untyped-def]
    out, stride_probe, stride_column, height, blocks, streams, total_blocks, samples, slots, codes, scaled, probes,
    round, run_key, PROBES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the linear signs of every probe and counter, those of the first `scaled` blocks times the probe's code.

    Rows probes..height of `out` (int8[height, 128 * total_blocks], any strides) become zero.
    """
    row = tl.program_id(1) * PROBES + tl.arange(0, PROBES)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    is_probe, is_block = row < probes, block < total_blocks
    sample = tl.load(samples + row, mask=is_probe, other=0)
    slot = tl.load(slots + row, mask=is_probe, other=0)
    code = tl.load(codes + row, mask=is_probe, other=0)
    counter = tl.load(blocks + block, mask=is_block, other=0)
    stream = tl.load(streams + block, mask=is_block, other=0)
    w0, w1, w2, w3 = _philox(
        _word(counter)[None, :], _word(stream)[None, :], _word(sample)[:, None], _word(round), _word(run_key),
        _word(slot)[:, None],
    )  # fmt: skip
    words = tl.reshape(_four(w0, w1, w2, w3), [PROBES, 4 * BLOCKS])
    bit = tl.arange(0, 32)
    ones = (words[:, :, None] >> bit[None, None, :].to(tl.uint32)) & 1
    column_word = tl.arange(0, 4 * BLOCKS)
    is_scaled = tl.program_id(0) * BLOCKS + column_word // 4 < scaled
    factor = tl.where(is_scaled[None, :], code[:, None], tl.where(is_probe, 1, 0)[:, None])
    signs = tl.where(ones == 0, factor[:, :, None], -factor[:, :, None]).to(tl.int8)
    column = tl.program_id(0).to(tl.int64) * (BLOCKS * _SIGNS) + column_word[:, None] * 32 + bit[None, :]
    pointers = out + row.to(tl.int64)[:, None, None] * stride_probe + column[None, :, :] * stride_column
    inside = (row < height)[:, None, None] & (column < total_blocks.to(tl.int64) * _SIGNS)[None, :, :]
    tl.store(pointers, signs, mask=inside)


@kernel("first_group", "groups", "stream", "round", "run_key")
def fill_dense(  # type: ignore[no-untyped-def]
    out, width, first_group, groups, samples, slots, stream, round, run_key, BLOCKS: tl.constexpr
):
    """Write the planar signs of whole groups of every probe: int8[n, width], +1 and -1, width = 4096 * groups."""
    probe = tl.program_id(1)
    lane = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = (_word(first_group) * _GROUP_BLOCKS + lane.to(tl.uint32))[None, :]
    sample, slot = tl.load(samples + probe), tl.load(slots + probe)
    words = _philox(block, _word(stream), _word(sample), _word(round), _word(run_key), _word(slot))
    plane = tl.arange(0, 32)[:, None]
    place = (lane // _GROUP_BLOCKS).to(tl.int64)[None, :] * _GROUP_SIGNS + plane * _SIGNS + (lane % _GROUP_BLOCKS)[None]
    inside = (lane < groups * _GROUP_BLOCKS)[None, :] & (plane >= 0)
    target = out + probe.to(tl.int64) * width + place
    for word in tl.static_range(4):
        bit = ((words[word] >> plane.to(tl.uint32)) & 1).to(tl.int32)
        tl.store(target + word * _GROUP_BLOCKS, (1 - 2 * bit).to(tl.int8), mask=inside)


@jit
def _packed_sums(  # type: ignore[no-untyped-def]
    block, start, stop, samples, slots, codes, stream, round, run_key, BLOCKS: tl.constexpr
):
    """Return sum of c * bit over probes start..stop (at most _FLUSH), two 16-bit sums in each int32[16, BLOCKS].

    One multiplication serves a bit plane of each half of the word. The lower sum's borrow is undone by `_halves`.
    """
    shift = tl.arange(0, _PLANES)[:, None].to(tl.uint32)
    s0 = tl.full([_PLANES, BLOCKS], 0, tl.int32)
    s1 = tl.full([_PLANES, BLOCKS], 0, tl.int32)
    s2 = tl.full([_PLANES, BLOCKS], 0, tl.int32)
    s3 = tl.full([_PLANES, BLOCKS], 0, tl.int32)
    for probe in range(start, stop):
        sample, slot, code = tl.load(samples + probe), tl.load(slots + probe), tl.load(codes + probe)
        w0, w1, w2, w3 = _philox(block, stream, _word(sample), round, run_key, _word(slot))
        s0 += ((w0 >> shift) & 0x0001_0001).to(tl.int32, bitcast=True) * code
        s1 += ((w1 >> shift) & 0x0001_0001).to(tl.int32, bitcast=True) * code
        s2 += ((w2 >> shift) & 0x0001_0001).to(tl.int32, bitcast=True) * code
        s3 += ((w3 >> shift) & 0x0001_0001).to(tl.int32, bitcast=True) * code
    return s0, s1, s2, s3


@jit
def _halves(packed):  # type: ignore[no-untyped-def]
    """Split packed sums into those of the lower and of the upper 16 planes."""
    low = (packed << 16) >> 16
    return low, (packed - low) >> 16


@jit
def _finish(  # type: ignore[no-untyped-def]
    weights, elements, sums, everything, scale, plane, WORD: tl.constexpr, noise_stream, chunk, round, run_key,
    IS_BFLOAT16: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Subtract the steps of 16 planes of one word: elements 4096 q + 128 plane + 32 word + block."""
    lane = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = (lane // _GROUP_BLOCKS) * _GROUP_SIGNS + WORD * _GROUP_BLOCKS + lane % _GROUP_BLOCKS
    element = place[None, :] + plane * _SIGNS
    total = everything - 2 * sums
    if IS_BFLOAT16:
        # Eight neighbouring lanes are eight neighbouring elements: they share a block of noise.
        eights: tl.constexpr = BLOCKS // 8
        eight = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, eights) * 8
        origin = (eight // _GROUP_BLOCKS) * _GROUP_SIGNS + WORD * _GROUP_BLOCKS + eight % _GROUP_BLOCKS
        noise_block = ((origin[None, :] + plane * _SIGNS) >> 3).to(tl.uint32)
        noise = _noise(noise_block, noise_stream, chunk, round, run_key, _PLANES, eights)
        _subtract_bfloat16(weights + element, element < elements, total, scale, noise)
    else:
        _subtract_float32(weights + element, element < elements, total, scale)


@kernel("elements", "probes", "everything", "scale", "stream", "noise_stream", "chunk", "round", "run_key")
def dense_update(  # type: ignore[no-untyped-def]
    weights, elements, samples, slots, codes, probes, everything, scale, stream, noise_stream, chunk, round, run_key,
    IS_SHORT: tl.constexpr, IS_BFLOAT16: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Apply all probes of a chunk to a whole tensor in planar layout: each weight is read and written once.

    Args:
        weights: f32, or bf16 as uint16.
        elements: How many.
        samples, slots, codes: int32[probes]; slots and samples are words, codes -127..127.
        probes: How many; at most _FLUSH if IS_SHORT.
        everything: The codes' sum.
        scale: alpha * 2**k, an f32.
        stream: The tensor's dense stream.
        noise_stream: Its stream of rounding noise.
        chunk: Number of the chunk, the noise's sample.
    """
    stream, noise_stream, chunk = _word(stream), _word(noise_stream), _word(chunk)
    round, run_key = _word(round), _word(run_key)
    block = (tl.program_id(0).to(tl.uint32) * BLOCKS + tl.arange(0, BLOCKS).to(tl.uint32))[None, :]
    if IS_SHORT:
        s0, s1, s2, s3 = _packed_sums(block, 0, probes, samples, slots, codes, stream, round, run_key, BLOCKS)
        low0, high0 = _halves(s0)
        low1, high1 = _halves(s1)
        low2, high2 = _halves(s2)
        low3, high3 = _halves(s3)
    else:
        low0 = tl.full([_PLANES, BLOCKS], 0, tl.int32)
        low1, low2, low3, high0, high1, high2, high3 = low0, low0, low0, low0, low0, low0, low0
        for start in range(0, probes, _FLUSH):
            stop = tl.minimum(start + _FLUSH, probes)
            s0, s1, s2, s3 = _packed_sums(block, start, stop, samples, slots, codes, stream, round, run_key, BLOCKS)
            low, high = _halves(s0)
            low0, high0 = low0 + low, high0 + high
            low, high = _halves(s1)
            low1, high1 = low1 + low, high1 + high
            low, high = _halves(s2)
            low2, high2 = low2 + low, high2 + high
            low, high = _halves(s3)
            low3, high3 = low3 + low, high3 + high
    plane = tl.arange(0, _PLANES)[:, None].to(tl.int64)
    above = plane + _PLANES
    lows, highs = (low0, low1, low2, low3), (high0, high1, high2, high3)
    for word in tl.static_range(4):
        _finish(
            weights, elements, lows[word], everything, scale, plane, word, noise_stream, chunk, round, run_key,
            IS_BFLOAT16, BLOCKS,
        )  # fmt: skip
        _finish(
            weights, elements, highs[word], everything, scale, above, word, noise_stream, chunk, round, run_key,
            IS_BFLOAT16, BLOCKS,
        )  # fmt: skip


@kernel("first", "rows", "scale", "noise_stream", "chunk", "round", "run_key")
def rank1_update(  # type: ignore[no-untyped-def]
    weights, first, rows, columns, left, right, depth, scale, noise_stream, chunk, round, run_key,
    IS_BFLOAT16: tl.constexpr, IS_ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Subtract the steps of U = left right^T from `rows` rows of a matrix: the sums never leave the registers.

    Args:
        weights: The whole tensor, f32, or bf16 as uint16.
        first: Index of the first row's first element in the tensor.
        rows, columns: Extents.
        left: int8[rows, depth], codes times signs, contiguous.
        right: int8[columns, depth], signs, contiguous.
        depth: Probes, padded with zeros to a multiple of DEPTH; at most 2**15, so that sums stay below 2**22.
        IS_ALIGNED: `first` and `columns` are multiples of 8, so that blocks of noise do not straddle rows.
    """
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    lefts = left + i.to(tl.int64)[:, None] * depth + k[None, :]
    rights = right + j.to(tl.int64)[None, :] * depth + k[:, None]
    total = tl.full([ROWS, COLUMNS], 0, tl.int32)
    for start in range(0, depth, DEPTH):
        a = tl.load(lefts + start, mask=(i < rows)[:, None], other=0)
        b = tl.load(rights + start, mask=(j < columns)[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    total = _float_of(total)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    # Inside a tile 32 bits are enough (a row of 2**24 elements is long): offsets are half of a thread's registers.
    corner = first.to(tl.int64) + (tl.program_id(1) * ROWS).to(tl.int64) * columns + tl.program_id(0) * COLUMNS
    if IS_ALIGNED:
        corner, columns = tl.multiple_of(corner, 8), tl.multiple_of(columns, 8)
    row = tl.arange(0, ROWS)[:, None] * columns
    offset = row + tl.arange(0, COLUMNS)[None, :]
    pointers = weights + corner + offset
    if IS_BFLOAT16:
        noise_stream, chunk, round, run_key = _word(noise_stream), _word(chunk), _word(round), _word(run_key)
        if IS_ALIGNED:
            eights: tl.constexpr = COLUMNS // 8
            block = (corner >> 3).to(tl.uint32) + ((row >> 3) + tl.arange(0, eights)[None, :]).to(tl.uint32)
            noise = _noise(block, noise_stream, chunk, round, run_key, ROWS, eights)
        else:
            noise = _noise_of_each(corner + offset, noise_stream, chunk, round, run_key)
        _subtract_bfloat16(pointers, mask, total, scale, noise)
    else:
        _subtract_float32(pointers, mask, total, scale)


@kernel("first", "stop", "scale", "noise_stream", "chunk", "round", "run_key")
def vector_update(  # type: ignore[no-untyped-def]
    weights, first, stop, left, depth, scale, noise_stream, chunk, round, run_key,
    IS_BFLOAT16: tl.constexpr, ELEMENTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Subtract the steps of U, the sum over each row of `left`, from elements first..stop of a vector.

    Args:
        left: int8[stop - first, depth], codes times signs, contiguous; depth is a multiple of DEPTH, at most 2**15.
    """
    eights: tl.constexpr = ELEMENTS // 8
    origin = (first // 8) * 8 + tl.program_id(0) * ELEMENTS
    element = origin + tl.arange(0, ELEMENTS)
    mask = (element >= first) & (element < stop)
    signs = left + (element - first).to(tl.int64)[:, None] * depth + tl.arange(0, DEPTH)[None, :]
    partial = tl.full([ELEMENTS, DEPTH], 0, tl.int32)
    for start in range(0, depth, DEPTH):
        partial += tl.load(signs + start, mask=mask[:, None], other=0).to(tl.int32)
    total = _float_of(tl.reduce(partial, 1, _plus))[None, :]
    element, mask = element[None, :], mask[None, :]
    if IS_BFLOAT16:
        block = ((origin >> 3) + tl.arange(0, eights))[None, :].to(tl.uint32)
        noise = _noise(block, _word(noise_stream), _word(chunk), _word(round), _word(run_key), 1, eights)
        _subtract_bfloat16(weights + element, mask, total, scale, noise)
    else:
        _subtract_float32(weights + element, mask, total, scale)


@kernel("first", "stop", "scale", "noise_stream", "chunk", "round", "run_key")
def subtract(  # type: ignore[no-untyped-def]
    weights, first, stop, total, scale, noise_stream, chunk, round, run_key,
    IS_BFLOAT16: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Subtract f32(scale * U) from elements first..stop of a tensor; `total` holds U from `first` on, int32 or f32."""
    first = first.to(tl.int64)
    eights: tl.constexpr = ELEMENTS // 8
    origin = (first // 8) * 8 + tl.program_id(0).to(tl.int64) * ELEMENTS
    element = (origin + tl.arange(0, ELEMENTS))[None, :]
    mask = (element >= first) & (element < stop)
    sums = tl.load(total + (element - first), mask=mask, other=0)
    if IS_BFLOAT16:
        block = ((origin >> 3) + tl.arange(0, eights))[None, :].to(tl.uint32)
        noise = _noise(block, _word(noise_stream), _word(chunk), _word(round), _word(run_key), 1, eights)
        _subtract_bfloat16(weights + element, mask, sums, scale, noise)
    else:
        _subtract_float32(weights + element, mask, sums, scale)


@kernel("elements", "out")
def digest_sum(words, elements, out, ELEMENTS: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add sum of h(i) * x[i] mod 2**64 of a tensor's bits (uint16 or uint32) to `out`, an int64."""
    start = tl.program_id(0).to(tl.int64) * (ELEMENTS * STEPS)
    sums = tl.full([ELEMENTS], 0, tl.uint64)
    for step in range(STEPS):
        element = start + step * ELEMENTS + tl.arange(0, ELEMENTS)
        value = tl.load(words + element, mask=element < elements, other=0).to(tl.uint64)
        z = element.to(tl.uint64) + 0x9E37_79B9_7F4A_7C15
        z = (z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB
        sums += ((z ^ (z >> 31)) | 1) * value
    tl.atomic_add(out, tl.reduce(sums.to(tl.int64, bitcast=True), 0, _plus))
