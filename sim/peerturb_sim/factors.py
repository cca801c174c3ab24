"""Figures that a plan multiplies by, each with where it comes from: they are printed with every plan that uses them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A number, and the measurement or publication that it was taken from."""

    value: float
    source: str


GPU_EFFICIENCY = Factor(
    value=0.39,
    source=(
        "part of a GPU's peak that forwards reach: MeZO on an A100, 13 billion parameters, 123 of 312 TFLOP/s over "
        "whole steps (computed from arXiv 2305.17333, table of times). Smaller ones reach less: 0.13 at 1.3 billion"
    ),
)
CPU_EFFICIENCY_SINGLE = Factor(
    value=0.81,
    source=(
        "part of a CPU's peak at its base clock that forwards reach in float32: stories3m, one core of 2.1 GHz (3.06 "
        "under load, so 0.56 of what it could do then), docs/LOG.md, 2026-11-26"
    ),
)
CPU_EFFICIENCY_HALF = Factor(
    value=0.51,
    source=(
        "part of a CPU's peak that forwards reach in half precision: products take 44 of 86 ms of inference "
        "(docs/LOG.md, 2026-11-25, MiniLM in bfloat16), and are counted as if they ran at the peak"
    ),
)
STEP_SINGLE = Factor(
    value=1.06,
    source="a probe step by plain inference in float32, the largest of three models on a CPU (docs/LOG.md, 2026-11-26)",
)
STEP_HALF = Factor(
    value=1.12,
    source=(
        "a probe step by plain inference in half precision, the largest of three models on a CPU (docs/LOG.md, "
        "2026-11-26); not measured on a GPU yet"
    ),
)
CPU_UPDATE_RATE = Factor(
    value=78e9,
    source=(
        "parameters x probes a second and core in an update: stories3m, 512 probes, two threads, 10.2 ms (docs/LOG.md, "
        "2026-11-24)"
    ),
)
SEAL_S = Factor(
    value=0.85e-3,
    source="seconds a round and peer to seal and tell: 6.8 ms with 8 nodes (docs/LOG.md, 2026-11-24, bench overhead)",
)
FRAMING_BYTES = Factor(
    value=40,
    source="bytes of HTTP/2 and gRPC about a message, on the socket (README.md, byte budget); TCP/IP and TLS not in it",
)
