"""Write numerics.json: known answers for sections 1 to 8 and 11 of the numerics (docs/numerics.md).

It shares no code with the package: plain numpy, one element at a time wherever that is fast enough. Run it after a
deliberate change of the protocol:  python tests/golden/make_vectors.py
"""

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.golden.mixed_vectors import half_vectors, mixed_vectors

OUTPUT = Path(__file__).with_name("numerics.json")
U32, U64 = 2**32 - 1, 2**64 - 1
RUN_KEY, ROUND = 0x6B657921, 12


def philox(counter: Any, key: Any) -> Any:
    """Ten rounds of Philox4x32 on arrays of counters (each word a number or an array)."""
    c: list[Any] = [np.asarray(word, np.uint64) for word in counter]
    k: list[Any] = [np.asarray(word, np.uint64) for word in key]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & U32, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & U32]
        k = [(k[0] + np.uint64(0x9E3779B9)) & U32, (k[1] + np.uint64(0xBB67AE85)) & U32]
    return c


def bit_sign(words: Any, bit: Any) -> Any:
    return 1 - 2 * int((words >> int(bit)) & 1)


def linear(element: Any, stream: Any, slot: Any, sample: Any) -> Any:
    words = philox((element // 128, stream, sample, ROUND), (RUN_KEY, slot))
    return bit_sign(int(words[element % 128 // 32]), element % 32)


def planar(element: Any, stream: Any, slot: Any, sample: Any) -> Any:
    q, r = divmod(element, 4096)
    words = philox((32 * q + r % 32, stream, sample, ROUND), (RUN_KEY, slot))
    return bit_sign(int(words[r % 128 // 32]), r // 128)


def noise_of(tensor: Any, family: Any, slot: Any, sample: Any) -> Any:
    """The signs of one tensor, row-major."""
    index, shape = tensor["index"], tensor["shape"]
    count = math.prod(shape)
    if len(shape) < 2:
        return [linear(e, 4 * index, slot, sample) for e in range(count)]
    if family == "dense":
        return [planar(e, 4 * index + 2, slot, sample) for e in range(count)]
    matrices, rows = (shape[0], shape[1]) if tensor["stack"] else (1, shape[0])
    columns = count // (matrices * rows)
    a = [linear(e, 4 * index, slot, sample) for e in range(matrices * rows)]
    b = [linear(e, 4 * index + 1, slot, sample) for e in range(matrices * columns)]
    return [a[m * rows + i] * b[m * columns + j] for m in range(matrices) for i in range(rows) for j in range(columns)]


def signs_text(signs: Any) -> Any:
    return "".join("+" if s > 0 else "-" for s in signs)


def tensor(index: Any, name: Any, shape: Any, dtype: Any = "float32", exponent: Any = 0, stack: Any = False) -> Any:
    return {"index": index, "name": name, "shape": shape, "dtype": dtype, "exponent": exponent, "stack": stack}


TENSORS = [
    tensor(0, "bias", [5]),
    tensor(1, "conv.weight", [4, 3, 2, 2], exponent=2),
    tensor(2, "embed.weight", [131, 3]),
    tensor(3, "experts", [2, 3, 4], exponent=-3, stack=True),
    tensor(4, "scale", []),
]


def f32_bits(value: Any) -> Any:
    return int(np.float32(value).view(np.uint32))


def code(g: Any, s: Any, rounding: Any, word: Any) -> Any:
    if not math.isfinite(g):
        return -128
    q = max(min(g / s, 200.0), -200.0)
    c = math.floor(q + word / 2**32) if rounding == "stochastic" else round(q)  # Python rounds ties to even
    return max(-127, min(127, c))


def next_scale(s: Any, codes: Any) -> Any:
    valid = [c for c in codes if c != -128]
    if not valid:
        return s
    rms = math.sqrt(sum(c * c for c in valid) / len(valid))
    return float(np.float32(min(max(s * min(max(math.sqrt(rms / 32), 0.25), 2.0), 2.0**-100), 2.0**100)))


def plateau_fraction(rule: Any, warmup: Any, floor: Any, losses: Any) -> Any:
    """What the rate is multiplied by in round len(losses): looked up from the whole history."""
    means = []
    for start in range(warmup, len(losses) - rule["window"] + 1, rule["window"]):
        finite = [v for v in losses[start : start + rule["window"]] if math.isfinite(v)]
        if finite:
            total = 0.0
            for value in finite:
                total = total + value
            means.append(total / len(finite))
    fraction, best, streak = 1.0, None, 0
    for mean in means:
        is_better = best is None or mean < best - rule["threshold"] * abs(best)
        best, streak = (mean, 0) if is_better else (best, streak + 1)
        if streak == rule["patience"]:
            fraction, streak = max(fraction * rule["factor"], floor), 0
    return fraction


def step_size(case: Any) -> Any:
    valid = [c for c in case["codes"] if c != -128]
    squares, n = sum(c * c for c in valid), len(valid)
    if squares == 0:
        return 0.0
    lr, warmup, r = case["learning_rate"], case["warmup_rounds"], case["round"]
    if r < warmup:
        lr = lr * (r + 1) / (warmup + 1)
    elif case["schedule"] == "plateau":
        lr = lr * plateau_fraction(case["plateau"], warmup, case["final_fraction"], case["losses"])
    elif case["schedule"] != "constant":
        t = min((r - warmup) / max(case["total"] - warmup, 1), 1.0)
        shape = 1.0 - t
        if case["schedule"] == "cosine":
            x2, c = (t * (math.pi / 2)) * (t * (math.pi / 2)), 1.0
            for k in range(12, 0, -1):
                c = 1.0 - x2 / ((2 * k - 1) * (2 * k)) * c
            shape = c * c
        lr = lr * (case["final_fraction"] + (1.0 - case["final_fraction"]) * shape)
    alpha = lr * case["scale"] / n if case["rule"] == "sgd" else lr / (n * math.sqrt(squares / n))
    return float(np.float32(min(alpha, 2.0**64)))


def new_bits(old: Any, u: Any, item: Any, element: Any, alpha: Any, chunk: Any) -> Any:
    """One element of the update: bit pattern in, bit pattern out."""
    d = np.float32(np.float64(alpha) * 2.0 ** item["exponent"] * u)  # exact in f64, then rounded once
    if item["dtype"] == "float32":
        return f32_bits(np.uint32(old).view(np.float32) - d)
    bits = f32_bits(np.uint32(old << 16).view(np.float32) - d)
    words = philox((element // 8, 4 * item["index"] + 3, chunk, ROUND), (RUN_KEY, U32))
    half = (int(words[element % 8 // 2]) >> (16 * (element % 2))) & 0xFFFF
    return ((bits + half) & U32) >> 16


def base_bits(item: Any) -> Any:
    """Some finite weights: about 0.02 with signs, every bit pattern different, and one zero."""
    bits = [0x3CA00000 + (0x9E3779B1 * (e + item["index"]) & 0x801FFFFF) for e in range(math.prod(item["shape"]))]
    bits[-1] = 0
    return [b >> 16 for b in bits] if item["dtype"] == "bfloat16" else bits


def updated(item: Any, family: Any, slots: Any, counts: Any, codes: Any, alpha: Any) -> Any:
    probes = [(slot, k) for slot, count in zip(slots, counts, strict=True) for k in range(count)]
    bits = base_bits(item)
    for chunk in range(-(-len(probes) // 131072)):
        part = slice(131072 * chunk, 131072 * (chunk + 1))
        if len(probes) > 1000:
            total = vector_sums(item, probes[part], codes[part])
        else:
            rows = [noise_of(item, family, slot, sample) for slot, sample in probes[part]]
            factors = [0 if c == -128 else c for c in codes[part]]
            total = [sum(c * row[e] for c, row in zip(factors, rows, strict=True)) for e in range(len(bits))]
        bits = [new_bits(b, total[e], item, e, alpha, chunk) for e, b in enumerate(bits)]
    return bits


def vector_sums(item: Any, probes: Any, codes: Any) -> Any:
    """The same integer sum for a short vector and very many probes."""
    slots, samples = np.array(probes, np.uint64).T
    factors = np.where(np.array(codes) == -128, 0, codes)
    word = philox((0, 4 * item["index"], samples, ROUND), (RUN_KEY, slots))[0]
    signs = [1 - 2 * ((word >> np.uint64(e)) & np.uint64(1)).astype(np.int64) for e in range(item["shape"][0])]
    return [int((factors * sign).sum()) for sign in signs]


def splitmix64(i: Any) -> Any:
    z = (i + 0x9E3779B97F4A7C15) & U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
    return z ^ (z >> 31)


def tensor_digest(bits: Any) -> Any:
    return sum((splitmix64(i) | 1) * b for i, b in enumerate(bits)) & U64


def run_digest(items: Any, patterns: Any) -> Any:
    state = hashlib.sha256()
    for item, bits in zip(items, patterns, strict=True):
        name, dtype, shape = item["name"].encode(), item["dtype"].encode(), item["shape"]
        state.update(struct.pack("<I", len(name)) + name + struct.pack("<I", len(shape)))
        state.update(b"".join(struct.pack("<Q", extent) for extent in shape))
        state.update(struct.pack("<I", len(dtype)) + dtype + struct.pack("<Q", tensor_digest(bits)))
    return state.hexdigest()


def generator_vectors() -> Any:
    counters = [(0,) * 4, (U32,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (7, 4 * 9 + 2, 3, ROUND)]
    keys = [(0, 0), (U32, U32), (0xA4093822, 0x299F31D0), (RUN_KEY, 5)]
    return [
        {"counter": c, "key": k, "words": [int(w) for w in philox(c, k)]} for c, k in zip(counters, keys, strict=True)
    ]


def layout_vectors() -> Any:
    dense = [planar(e, 4 * 6 + 2, 3, 1) for e in range(2 * 4096)]
    signs = signs_text(linear(e, 4, 3, 1) for e in range(300))
    digest = hashlib.sha256(np.array(dense, np.int8).tobytes()).hexdigest()
    return {
        "linear": {"stream": 4, "slot": 3, "sample": 1, "signs": signs},
        "planar": {
            "index": 6, "slot": 3, "sample": 1, "shape": [64, 128], "first": signs_text(dense[:128]), "sha256": digest,
        },
    }  # fmt: skip


def code_vectors() -> Any:
    g = [0.0, 0.5, 1.5, -2.5, 3.49, -0.99, 126.5, 127.4, 1e30, -1e30, math.nan, math.inf, -math.inf, 5e-324]
    cases = []
    for scale in (1.0, 0.05000000074505806, 2.0**-100):
        words = [int(philox((0, U32, k, ROUND), (RUN_KEY, 5))[0]) for k in range(len(g))]
        texts = [repr(v) for v in g]
        nearest = [code(v, scale, "nearest", 0) for v in g]
        stochastic = [code(v, scale, "stochastic", w) for v, w in zip(g, words, strict=True)]
        cases.append({"scale": scale, "slot": 5, "projected": texts, "nearest": nearest, "stochastic": stochastic})
    return cases


def scale_vectors() -> Any:
    lists = [[32, -32], [1], [0, 0], [127] * 5, [-128, -128], [-128, 64, 3], [40, -31, 17, 5, -88]]
    return [
        {"scale": s, "codes": codes, "next": next_scale(s, codes)}
        for s in (0.05000000074505806, 2.0**-100, 2.0**100)
        for codes in lists
    ]


SCHEDULED = [("constant", 3), ("constant", 50), ("linear", 50), ("linear", 500)]
SCHEDULED += [("cosine", 0), ("cosine", 50), ("cosine", 99)]


def step_vectors() -> Any:
    cases = []
    for rule in ("normalized", "sgd"):
        for schedule, round_ in SCHEDULED:
            for codes in ([40, -31, -128, 5, -88], [0, -128]):
                case = {
                    "rule": rule, "schedule": schedule, "round": round_, "total": 100, "warmup_rounds": 10,
                    "final_fraction": 0.125, "learning_rate": 0.015, "scale": 0.05000000074505806, "codes": codes,
                }  # fmt: skip
                cases.append({**case, "alpha": step_size(case)})
    return cases


def plateau_losses(count: Any) -> Any:
    """Falls for 30 rounds, then stays, in steps that f32 cannot hold exactly; some rounds have no finite loss."""
    losses = [float(np.float32(2 + 1.7 * max(0.0, 1 - r / 30) + 0.013 * (7 * r % 11 - 5))) for r in range(count)]
    for r in (0, 5, 33, *range(40, 44)):
        losses[r] = math.nan if r % 2 else math.inf
    return losses


def plateau_vectors() -> Any:
    """Every round's step size under the plateau schedule; `losses` are those of the sealed rounds, as text."""
    cases = []
    shapes = [(4, 2, 0.5, 1e-3, 3, 0.0), (4, 1, 0.3, 0.02, 0, 0.1), (1, 3, 0.7, 0.0, 0, 0.0), (7, 1, 0.1, 0.5, 2, 0.25)]
    for window, patience, factor, threshold, warmup, floor in shapes:
        losses = plateau_losses(72)
        case = {
            "rule": "normalized", "schedule": "plateau", "total": 0, "warmup_rounds": warmup, "final_fraction": floor,
            "learning_rate": 0.015, "scale": 0.05000000074505806, "codes": [40, -31, -128, 5, -88],
            "plateau": {"window": window, "patience": patience, "factor": factor, "threshold": threshold},
        }  # fmt: skip
        rounds = range(len(losses) + 1)
        alphas = [step_size({**case, "round": r, "losses": losses[:r]}) for r in rounds]
        cases.append({**case, "losses": [repr(v) for v in losses], "alphas": alphas})
    return cases


def update_vectors() -> Any:
    slots, counts = [0, 2, 65535], [3, 1, 4]
    codes = [127, -127, -128, 3, 0, -64, 17, 90]
    alpha = float(np.float32(3.1e-5))
    cases = []
    for family in ("rank1", "dense"):
        for dtype in ("float32", "bfloat16"):
            items = [{**item, "dtype": dtype} for item in TENSORS]
            before = [base_bits(item) for item in items]
            after = [updated(item, family, slots, counts, codes, alpha) for item in items]
            cases.append({
                "family": family, "slots": slots, "counts": counts, "codes": codes, "alpha": alpha, "tensors": items,
                "before": before, "after": after,
                "digest_before": run_digest(items, before), "digest_after": run_digest(items, after),
            })  # fmt: skip
    return cases


def chunk_vectors() -> Any:
    """More probes than one update sums: 131072 + 928, code of probe p = 37 p mod 256 - 128 (voids among them)."""
    slots, counts = [1, 4, 9], [65536, 65536, 928]
    codes = [37 * p % 256 - 128 for p in range(sum(counts))]
    items = [tensor(0, "bias", [5], dtype) for dtype in ("float32", "bfloat16")]
    alpha = float(np.float32(7.7e-6))
    after = [updated(item, "rank1", slots, counts, codes, alpha) for item in items]
    before = [base_bits(item) for item in items]
    return {"slots": slots, "counts": counts, "alpha": alpha, "tensors": items, "before": before, "after": after}


def noise_vectors() -> Any:
    return [
        {"tensor": t, "slot": slot, "sample": k, "family": family, "signs": signs_text(noise_of(t, family, slot, k))}
        for t in TENSORS for family in ("rank1", "dense") for slot, k in ((0, 0), (65535, 4097))
    ]  # fmt: skip


def digest_vectors() -> Any:
    bits = [[(0x9E3779B1 * e) & U32 for e in range(n)] for n in (0, 1, 3, 127, 4097)]
    return [
        {"count": len(b), "digest": tensor_digest(b), "digest16": tensor_digest([x >> 16 for x in b])} for b in bits
    ]


def make() -> Any:
    return {
        "run_key": RUN_KEY, "round": ROUND, "generator": generator_vectors(), "layouts": layout_vectors(),
        "noise": noise_vectors(), "codes": code_vectors(), "scales": scale_vectors(), "steps": step_vectors(),
        "updates": update_vectors(), "chunks": chunk_vectors(), "digests": digest_vectors(),
        "splitmix64": [splitmix64(i) for i in range(4)], "plateaus": plateau_vectors(),
        "mixed": mixed_vectors(), "halves": half_vectors(),
    }  # fmt: skip


def text() -> Any:
    """One line per entry, so that a change shows as few changed lines."""
    parts = []
    for key, value in make().items():
        lines = ",\n  ".join(json.dumps(entry) for entry in value) if isinstance(value, list) else None
        parts.append(f' "{key}": ' + (json.dumps(value) if lines is None else f"[\n  {lines}\n ]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")
