"""Make `log.json`: a log file byte by byte, from the description in docs/log-format.md, with no code of the package.

    python tests/golden/make_log_vectors.py

Protobuf fields, frames, chain, step sizes and scales are written out here by hand; only the standard library is used.
"""

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

SPEC = {
    "model": {"digest": "efbeadde" + "ab" * 28, "dtype": "float32", "exclude": [], "exponents": {}, "name": "toy"},
    "name": "golden",
    "objective": {
        "completion": "",
        "eval_every": 10,
        "examples_per_probe": 1,
        "kind": "text",
        "label_field": "label",
        "labels": {},
        "template": "{text}",
        "tokens_max": 64,
    },
    "perturbation": {"epsilon": 0.001, "family": "rank1", "initial_scale": 0.5, "rounding": "nearest"},
    "protocol": 1,
    "round": {
        "budget_ms": 0,
        "count": 3,
        "deadline_ms_max": 120000,
        "deadline_ms_min": 1000,
        "lease_ms": 60000,
        "min_peers": 1,
        "probes_max": 128,
    },
    "seed": 7,
    "step": {
        "final_fraction": 0.0,
        "learning_rate": 0.015,
        "rule": "normalized",
        "schedule": "constant",
        "warmup_rounds": 0,
    },
}


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def tagged(field: int, kind: int) -> bytes:
    return varint(field << 3 | kind)


def number(field: int, value: int) -> bytes:
    """A uint32; zero is not written."""
    return tagged(field, 0) + varint(value) if value else b""


def block(field: int, data: bytes) -> bytes:
    return tagged(field, 2) + varint(len(data)) + data


def single(field: int, value: float) -> bytes:
    return tagged(field, 5) + struct.pack("<f", value)


def f32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def signed(codes: bytes) -> list[int]:
    """Valid codes."""
    return [code - 256 if code > 127 else code for code in codes if code != 128]


def rms(codes: bytes) -> float:
    values = signed(codes)
    return math.sqrt(sum(value * value for value in values) / len(values))


def main() -> None:
    spec = json.dumps(SPEC, sort_keys=True, separators=(",", ":")).encode()
    first, second = b"\x05\x80\xfe\x40", b"\x7f\x81\x01"
    scale0 = f32(0.5)
    scale1 = f32(scale0 * min(max(math.sqrt(rms(first) / 32), 0.25), 2.0))
    scale2 = f32(scale1 * min(max(math.sqrt(rms(second) / 32), 0.25), 2.0))
    alpha0 = f32(0.015 / (3 * rms(first)))
    alpha1 = f32(0.015 / (3 * rms(second)))
    records = [
        block(1, block(1, spec)),
        block(2, block(2, b"a" * 32) + block(3, b"ann")),  # slot 0 is not written
        block(2, number(1, 1) + block(2, b"b" * 32) + block(3, b"bob")),
        single(6, scale0) + number(7, 120000),
        single(8, alpha0) + single(9, 2.5) + tagged(10, 5) + struct.pack("<I", 0xDEADBEEF)
        + block(13, first) + block(14, b"\x03"),  # equal counts are not written; slots 0 and 1 as a bitmap
        block(4, number(1, 1) + number(2, 1) + single(3, 1.5) + single(4, 0.0) + number(5, 8)),
        single(6, scale1) + number(7, 4000),
        single(8, alpha1) + single(9, 2.25) + tagged(10, 5) + struct.pack("<I", 17)
        + block(12, varint(2) + varint(1)) + block(13, second) + block(14, b"\x03"),
        single(6, scale2) + number(7, 4000),
        single(9, math.nan) + tagged(10, 5) + struct.pack("<I", 18)  # step zero is not written
        + block(11, varint(1)) + block(13, b"\x80\x80"),  # one slot: a bitmap is not shorter
        block(5, number(1, 3)),
        block(3, number(1, 1) + number(2, 2)),
    ]  # fmt: skip
    chain = hashlib.sha256(b"peerturb run log v1\0").digest()
    data = b"peerturb.log" + struct.pack("<I", 1)
    chains = []
    for payload in records:
        chain = hashlib.sha256(chain + payload).digest()
        chains.append(chain.hex())
        data += struct.pack("<II", len(payload), zlib.crc32(chain + payload)) + chain + payload
    vectors = {
        "records": [payload.hex() for payload in records],
        "chains": chains,
        "file": data.hex(),
        "file_sha256": hashlib.sha256(data).hexdigest(),
        "spec_sha256": hashlib.sha256(spec).hexdigest(),
        "alphas": [alpha0, alpha1],
        "scales": [scale0, scale1, scale2],
    }
    Path(__file__).with_name("log.json").write_text(json.dumps(vectors, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
