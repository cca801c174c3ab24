"""Loops over rows of activations in machine code, for `peerturb.zo.rowwise`: built from LLVM's vectors of 32 numbers.

Left to itself Numba's compiler makes narrow loops of bfloat16, and numpy has no such type; these loops load a kind of
numbers, compute in f32 and round once. Addresses and counts are int64, numbers f32. Knows nothing of perturbations.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WIDTH: Final = 32
"""Elements in a step of a loop: whole registers of half-precision numbers, however wide a machine's are."""

_CHAINS: Final = 4
"""Sums kept side by side: one would wait for each addition to end before the next."""

SIZES: Final = {"f32": 4, "bf16": 2, "f16": 2}
"""Kinds of numbers and their bytes."""

_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FEATURES: Final = binding.get_host_cpu_features()


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()


# --- pieces of LLVM's intermediate representation -------------------------------------------------------------------


def _vector(kind: Any, width: int) -> Any:
    return kind if width == 1 else ir.VectorType(kind, width)


def _word(value: int, width: int) -> Any:
    return ir.Constant(_vector(_I32, width), value if width == 1 else [value] * width)


def _address(builder: Any, base: Any, index: Any, size: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(_I64, size)))


def _read(builder: Any, address: Any, stored: Any, width: int) -> Any:
    value = builder.load(builder.inttoptr(address, _vector(stored, width).as_pointer()))
    value.align = 1
    return value


def _load(builder: Any, base: Any, index: Any, kind: str, width: int) -> Any:
    """Load elements of a kind as f32."""
    address = _address(builder, base, index, SIZES[kind])
    if kind == "f32":
        return _read(builder, address, _FLOAT, width)
    if kind == "f16":
        return builder.fpext(_read(builder, address, _HALF, width), _vector(_FLOAT, width))
    bits = builder.zext(_read(builder, address, _I16, width), _vector(_I32, width))
    return builder.bitcast(builder.shl(bits, _word(16, width)), _vector(_FLOAT, width))


def _store(builder: Any, value: Any, base: Any, index: Any, kind: str, width: int) -> None:
    """Store f32 values as elements of a kind, rounded to nearest, ties to even."""
    if kind == "f16":
        value = builder.fptrunc(value, _vector(_HALF, width))
    elif kind == "bf16" and FEATURES.get("avx512bf16"):
        value = builder.fptrunc(value, _vector(_BFloat(), width))
    elif kind == "bf16":
        bits = builder.bitcast(value, _vector(_I32, width))
        odd = builder.and_(builder.lshr(bits, _word(16, width)), _word(1, width))
        bits = builder.add(builder.add(bits, _word(0x7FFF, width)), odd)
        value = builder.trunc(builder.lshr(bits, _word(16, width)), _vector(_I16, width))
    place = builder.inttoptr(_address(builder, base, index, SIZES[kind]), value.type.as_pointer())
    builder.store(value, place).align = 1


def _filled(builder: Any, value: Any, width: int) -> Any:
    """Return a vector of one f32."""
    if width == 1:
        return value
    nothing = ir.Constant(_vector(_FLOAT, width), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, _word(0, width))


def _multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    return builder.fadd(builder.fmul(left, right, flags=("contract",)), total, flags=("contract",))


def _each(builder: Any, count: Any, step: Callable[[Any, int], None]) -> None:
    """Build the loops over `count` elements: `_WIDTH` at a time, then the rest one by one."""
    whole = builder.sub(count, builder.srem(count, ir.Constant(_I64, _WIDTH)))
    for begin, end, width in ((ir.Constant(_I64, 0), whole, _WIDTH), (whole, count, 1)):
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(_I64, width), intp=_I64) as (index, _):
            step(index, width)


def _sum(builder: Any, count: Any, step: Callable[[Any, int, Any], Any], *, lanes: int = _WIDTH) -> Any:
    """Build the sum of what `step(index, width, total so far)` returns.

    Args:
        lanes: of a wide step's total.
    """
    nothing, wide = ir.Constant(_vector(_FLOAT, lanes), [0.0] * lanes), _vector(_FLOAT, lanes)
    totals = [cgutils.alloca_once_value(builder, nothing) for _ in range(_CHAINS)]
    rest = cgutils.alloca_once_value(builder, ir.Constant(_FLOAT, 0.0))

    def add(index: Any, width: int, total: Any) -> None:
        builder.store(step(index, width, builder.load(total)), total)

    edges = [ir.Constant(_I64, 0)]
    for width in (_CHAINS * _WIDTH, _WIDTH, 1):
        edges.append(builder.sub(count, builder.srem(count, ir.Constant(_I64, width))))
        with cgutils.for_range_slice(builder, *edges[-2:], ir.Constant(_I64, width), intp=_I64) as (index, _):
            if width == 1:
                add(index, 1, rest)
            else:
                for number in range(width // _WIDTH):
                    add(builder.add(index, ir.Constant(_I64, number * _WIDTH)), _WIDTH, totals[number])
    total = builder.load(totals[0])
    for other in totals[1:]:
        total = builder.fadd(total, builder.load(other))
    kind = ir.FunctionType(_FLOAT, [_FLOAT, wide])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f32")
    return builder.call(reduce, [builder.load(rest), total], fastmath=("reassoc",))


# --- what compiled code can call: addresses and counts are int64, numbers f32 ---------------------------------------


def row_of(kind: str, *, made: str = "f32") -> Any:
    @intrinsic
    def row(context: Any, out: Any, values: Any, plain: Any, signs: Any, step: Any, count: Any) -> Any:
        """out = plain + values (or nothing) + step * signs (or nothing); out `made`, values of the kind, signs int8."""

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            out, values, plain, signs, step, count = arguments
            nowhere = ir.Constant(_I64, 0)
            has_values = builder.icmp_signed("!=", values, nowhere)
            has_signs = builder.icmp_signed("!=", signs, nowhere)

            def write(index: Any, width: int) -> None:
                total = cgutils.alloca_once_value(builder, _filled(builder, plain, width))
                builder.store(_filled(builder, plain, width), total)
                with builder.if_then(has_values):
                    value = _load(builder, values, index, kind, width)
                    builder.store(builder.fadd(builder.load(total), value), total)
                with builder.if_then(has_signs):
                    sign = _read(builder, builder.add(signs, index), _I8, width)
                    sign = builder.sitofp(sign, _vector(_FLOAT, width))
                    moved = _multiply_add(builder, sign, _filled(builder, step, width), builder.load(total))
                    builder.store(moved, total)
                _store(builder, builder.load(total), out, index, made, width)

            _each(builder, count, write)
            return context.get_dummy_value()

        address, number = types.int64, types.float32
        return types.void(address, address, number, address, number, address), code

    return row


def factor_kind(kind: str) -> str:
    """Return the kind of the row that `dot_of` of this kind takes: signs are exact in any."""
    return "bf16" if kind == "bf16" and FEATURES.get("avx512bf16") else "f32"


def dot_of(kind: str) -> Any:
    @intrinsic
    def dot(context: Any, x: Any, b: Any, count: Any) -> Any:
        """Sum of x * b; x of the kind, b of its `factor_kind`."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            x, b, count = values

            def step(index: Any, width: int, total: Any) -> Any:
                left, right = (
                    _load(builder, row, index, own, width) for row, own in ((x, kind), (b, factor_kind(kind)))
                )
                return _multiply_add(builder, left, right, total)

            def step_in_pairs(index: Any, width: int, total: Any) -> Any:
                if width == 1:
                    return step(index, width, total)
                pairs = [_read(builder, _address(builder, row, index, 2), _BFloat(), width) for row in (x, b)]
                kinds = ir.FunctionType(total.type, [total.type, pairs[0].type, pairs[1].type])
                name = f"llvm.x86.avx512bf16.dpbf16ps.{16 * width}"
                return builder.call(cgutils.get_or_insert_function(builder.module, kinds, name), [total, *pairs])

            if factor_kind(kind) == "bf16":
                return _sum(builder, count, step_in_pairs, lanes=_WIDTH // 2)
            return _sum(builder, count, step)

        return types.float32(*[types.int64] * 3), code

    return dot


def add_of(kind: str, *, is_shifted: bool) -> Any:
    @intrinsic
    def add(context: Any, y: Any, a: Any, d: Any, c: Any, count: Any) -> Any:
        """y += d * a (+ c); y of the kind, a and c f32."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            y, a, d, c, count = values

            def step(index: Any, width: int) -> None:
                value, factor = _load(builder, y, index, kind, width), _load(builder, a, index, "f32", width)
                if is_shifted:
                    value = builder.fadd(value, _load(builder, c, index, "f32", width))
                value = _multiply_add(builder, factor, _filled(builder, d, width), value)
                _store(builder, value, y, index, kind, width)

            _each(builder, count, step)
            return context.get_dummy_value()

        address, number = types.int64, types.float32
        return types.void(address, address, number, address, address), code

    return add


def affine_of(kind: str) -> Any:
    @intrinsic
    def affine(context: Any, y: Any, x: Any, r: Any, m: Any, scale: Any, shift: Any, count: Any) -> Any:
        """y = (x * r + m) * scale + shift; y and x of the kind, scale and shift f32 rows, r and m numbers."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            y, x, r, m, scale, shift, count = values

            def step(index: Any, width: int) -> None:
                value, factor = _load(builder, x, index, kind, width), _load(builder, scale, index, "f32", width)
                value = _multiply_add(builder, value, _filled(builder, r, width), _filled(builder, m, width))
                value = _multiply_add(builder, value, factor, _load(builder, shift, index, "f32", width))
                _store(builder, value, y, index, kind, width)

            _each(builder, count, step)
            return context.get_dummy_value()

        address, number = types.int64, types.float32
        return types.void(address, address, number, number, address, address, address), code

    return affine


def power_sum_of(kind: str, power: int) -> Any:
    @intrinsic
    def power_sum(context: Any, x: Any, centre: Any, count: Any) -> Any:
        """Sum of (x - centre) to the power of 1 or 2."""

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            x, centre, count = values

            def step(index: Any, width: int, total: Any) -> Any:
                value = builder.fsub(_load(builder, x, index, kind, width), _filled(builder, centre, width))
                return _multiply_add(builder, value, value, total) if power == 2 else builder.fadd(value, total)

            return _sum(builder, count, step)

        return types.float32(types.int64, types.float32, types.int64), code

    return power_sum
