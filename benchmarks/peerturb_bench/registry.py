"""The benchmarks by name, and how one is run. It knows nothing of tables, files or command lines.

A benchmark is a module below `peerturb_bench` with `run(quick: bool) -> list[Row]`; one that draws takes
`out: Path | None` besides, the folder for its files, and without one writes none.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from peerturb_bench.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What a name stands for."""

    summary: str
    """What it measures, against what."""
    is_drawn: bool = False
    """True if it writes a plot (`target` its curves too)."""


BENCHMARKS = {
    "step": Benchmark(summary="A probe's two evaluations, against plain inference on the same tokens.", is_drawn=True),
    "update": Benchmark(
        summary="Applying a round, against seeding a generator and drawing a normal tensor for each probe.",
        is_drawn=True,
    ),
    "memory": Benchmark(summary="Peak memory of probes above that of plain inference.", is_drawn=True),
    "padding": Benchmark(
        summary="Tokens computed over tokens needed, in the engine's batches and in plainly padded ones.", is_drawn=True
    ),
    "replay": Benchmark(summary="Replaying 10 000 rounds, beside what its parts cost alone.", is_drawn=True),
    "target": Benchmark(
        summary="Seconds and forward passes to the loss MeZO ends with, against MeZO; AdamW as the ceiling.",
        is_drawn=True,
    ),
    "learning": Benchmark(
        summary="Held-out loss in equal time and rounds: SPSA, exact projections, MeZO, AdamW on full gradients.",
        is_drawn=True,
    ),
    "exact": Benchmark(
        summary="Time and memory of an exact contribution: its codes beside the backward pass they come from."
    ),
    "sides": Benchmark(
        summary="Held-out loss with one-sided probes and one clean loss, against two-sided, at equal forward passes."
    ),
    "byte": Benchmark(
        summary="Rounds to the same held-out loss with one byte for each projected gradient, against f32 scalars."
    ),
    "scaling": Benchmark(
        summary="Rounds to a held-out loss for 1 to 256 simulated peers; ideal: n peers, an nth of the rounds.",
        is_drawn=True,
    ),
    "tuning": Benchmark(
        summary="What rate, epsilon, probes, examples, rule and schedule do to the held-out loss.", is_drawn=True
    ),
    "sim": Benchmark(summary="What simulating 256 peers of a real model spends its time on, on Ray and in process."),
    "wire": Benchmark(summary="Bytes on the socket for each code, up and down, with all framing."),
    "overhead": Benchmark(
        summary="Milliseconds a round costs when computing costs nothing: real processes, fsync included."
    ),
    "watch": Benchmark(summary="Milliseconds for which page and metrics hold a coordinator's event loop."),
    "page": Benchmark(summary="Milliseconds until the live page of 1 000 peers is drawn in headless Chromium."),
    "load": Benchmark(summary="Memory and processor of a coordinator with 64 peers at a round a second."),
    "join": Benchmark(summary="A peer that joins late: time until it trains, bytes it received."),
}

SUITE = ("step", "update", "memory", "padding", "replay", "target")
"""What `peerturb bench suite` runs, in this order: the engine's speed, memory and learning."""


def measure(name: str, *, quick: bool, out: Path | None = None) -> list[Row]:
    """Run one benchmark.

    Args:
        name: one of `BENCHMARKS`.
        quick: smaller sizes, rougher figures.
        out: folder for the files of one that draws; others write none.
    """
    run = importlib.import_module(f"peerturb_bench.{name}").run
    rows: list[Row] = run(quick, out) if BENCHMARKS[name].is_drawn else run(quick)
    return rows
