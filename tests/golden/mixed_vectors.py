"""Known answers for section 11 of the numerics (docs/numerics.md), for `make_vectors.py`; no code of the package."""

import math
from itertools import product
from typing import Any

import numpy as np


def mixed_scales(scales: Any, parts: Any) -> Any:
    """Next scales where both estimators are allowed: `parts` are the codes of each."""
    low = min(scales)
    factors: list[Any] = []
    for s, codes in zip(scales, parts, strict=True):
        valid = [c for c in codes if c != -128]
        if valid:
            target = max(32 * math.sqrt(low / s), 4.0)
            rms = math.sqrt(sum(c * c for c in valid) / len(valid))
            factors.append(min(max(math.sqrt(rms / target), 0.25), 2.0))
        else:
            factors.append(None)
    other = next((f for f in factors if f is not None), 1.0)
    moved = [s * (f or other) for s, f in zip(scales, factors, strict=True)]
    return [float(np.float32(min(max(s, 2.0**-100), 2.0**100))) for s in moved]


def mixed_step(case: Any) -> Any:
    valid = [[c for c in codes if c != -128] for codes in case["codes"]]
    squares, low = sum(c * c for part in valid for c in part), min(case["scales"])
    if squares == 0:
        return 0.0
    worth = len(valid[0]) * (low / case["scales"][0]) + len(valid[1]) * (low / case["scales"][1])
    whole = worth + case["half_codes"]
    sgd, normalized = case["learning_rate"] * low / whole, case["learning_rate"] / (whole * math.sqrt(squares / worth))
    return float(np.float32(min(sgd if case["rule"] == "sgd" else normalized, 2.0**64)))


def mixed_vectors() -> Any:
    """Scales and step sizes of rounds with codes of both estimators, `spsa` first."""
    small, large = 0.05000000074505806, 1.2000000476837158
    lists = [([40, -31, -128, 5, -88], [17, -3, 44, 29, -60, 8, 31]), ([], [32, -32, 31]), ([-128], [0, 0]), ([9], [])]
    lists += [([127] * 3, [1, -2, 3, 4, -128]), ([-128], [])]
    pairs = [[small, small], [large, small], [small, large], [2.0**100, 2.0**-100]]
    cases = []
    for scales, codes, (rule, half) in product(pairs, lists, (("normalized", 8192), ("sgd", 3))):
        base = {"scales": scales, "codes": codes, "next": mixed_scales(scales, codes)}
        case = {**base, "rule": rule, "half_codes": half, "learning_rate": 0.015}
        cases.append({**case, "alpha": mixed_step(case)})
    return cases


def half_vectors() -> Any:
    """Step sizes of rounds of one estimator that make a part of their step; without a second one nothing is mixed."""
    codes = [40, -31, -128, 5, -88]
    cases = []
    for rule, half in (("normalized", 1), ("normalized", 8192), ("sgd", 1), ("sgd", 8192)):
        case = {"rule": rule, "half_codes": half, "learning_rate": 0.015, "scale": 0.05000000074505806, "codes": codes}
        alpha = mixed_step({**case, "scales": [case["scale"]] * 2, "codes": [codes, []]})
        cases.append({**case, "alpha": alpha})
    return cases
