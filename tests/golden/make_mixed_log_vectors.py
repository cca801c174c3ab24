"""Make `log_mixed.json`: the same description with both estimators in a run, again with no code of the package.

    python tests/golden/make_mixed_log_vectors.py

What `make_log_vectors.py` writes by hand, and the three fields that such a run adds: two in the RunSpec, the scale of
exact codes, and which contributions are exact.
"""

import copy
import hashlib
import json
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.golden.make_log_vectors import SPEC, block, f32, number, signed, single, tagged, varint

CODES = [
    (b"\x05\x80\xfe\x40", b"\x1b\xe2\x28\x11\x30\xd0"),  # 4 of slot 0 by spsa, 6 exact of slot 9
    (b"\x7f\x81\x01\x20", b"\x20\xe1\x2a\x80\x06"),
]
HALF = 64


def spec() -> Any:
    made: dict[str, Any] = copy.deepcopy(dict(SPEC))
    made["perturbation"] |= {"estimators": ["spsa", "exact"], "exact": {"codes": 6, "examples": 16}}
    made["step"] |= {"half_codes": HALF}
    made["round"] |= {"count": 2, "probes_max": 4}
    return made


def after(scales: list[float], parts: tuple[bytes, bytes]) -> Any:
    low, moved = min(scales), []
    for scale, codes in zip(scales, parts, strict=True):
        values = signed(codes)
        rms = math.sqrt(sum(value * value for value in values) / len(values))
        factor = min(max(math.sqrt(rms / max(32 * math.sqrt(low / scale), 4.0)), 0.25), 2.0)
        moved.append(f32(scale * factor))
    return moved


def alpha(scales: list[float], parts: tuple[bytes, bytes]) -> Any:
    low, worth, squares = min(scales), 0.0, 0
    for scale, codes in zip(scales, parts, strict=True):
        values = signed(codes)
        worth += len(values) * (low / scale)
        squares += sum(value * value for value in values)
    return f32(0.015 / ((worth + HALF) * math.sqrt(squares / worth)))


def opened(scales: list[float], deadline_ms: int) -> Any:
    return single(6, scales[0]) + number(7, deadline_ms) + tagged(16, 5) + struct.pack("<f", scales[1])


def sealed(step: float, loss: float, digest: int, parts: tuple[bytes, bytes]) -> Any:
    counts = varint(len(parts[0])) + varint(len(parts[1]))
    head = single(8, step) + single(9, loss) + tagged(10, 5) + struct.pack("<I", digest)
    # Two slots, 0 and 9: a bitmap of two bytes is not shorter than the packed list. Contribution 1 is exact.
    return head + block(11, varint(0) + varint(9)) + block(12, counts) + block(13, b"".join(parts)) + block(15, b"\x02")


def main() -> None:
    document = json.dumps(spec(), sort_keys=True, separators=(",", ":")).encode()
    scales = [[f32(0.5), f32(0.5)]]
    for parts in CODES:
        scales.append(after(scales[-1], parts))
    alphas = [alpha(pair, parts) for pair, parts in zip(scales[:2], CODES, strict=True)]
    joins = [block(2, number(1, slot) + block(2, bytes([97 + slot]) * 32) + block(3, b"p")) for slot in range(10)]
    records = [
        block(1, block(1, document)), *joins, opened(scales[0], 120000), sealed(alphas[0], 2.5, 0xDEADBEEF, CODES[0]),
        opened(scales[1], 4000), sealed(alphas[1], 2.25, 17, CODES[1]), block(5, number(1, 2)),
    ]  # fmt: skip
    chain = hashlib.sha256(b"peerturb run log v1\0").digest()
    data = b"peerturb.log" + struct.pack("<I", 1)
    for payload in records:
        chain = hashlib.sha256(chain + payload).digest()
        data += struct.pack("<II", len(payload), zlib.crc32(chain + payload)) + chain + payload
    vectors = {
        "records": [payload.hex() for payload in records], "file": data.hex(), "alphas": alphas, "scales": scales,
        "spec_sha256": hashlib.sha256(document).hexdigest(), "chain": chain.hex(),
    }  # fmt: skip
    Path(__file__).with_name("log_mixed.json").write_text(json.dumps(vectors, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
