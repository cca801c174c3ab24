"""Measuring a round's probes, against plain inference over the same tokens: what the perturbation costs.

Both compute the loss of the same sequences in the same micro-batches, one right after the other and in changing order,
so that a noisy machine slows both alike. Every pair is another round: its signs are made anew, within the time of the
probes. value: ms of a probe step, the median. reference: ms of plain inference, the median. ratio: the median of
value / reference over the pairs, with its quartiles; at most 1.15.

On a CUDA device both are played from recordings (`peerturb.zo.recorded`); a note tells what inference takes without.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.model import build_manifest
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.recorded import SEEN_BEFORE
from peerturb_bench import plots
from peerturb_bench.rows import Row
from peerturb_bench.shapes import GIANT, LLAMA, MINILM, STORIES3M, Shape, build

LIMIT = 1.15
"""Probes over inference, at most."""
PAIRS, QUICK_PAIRS = 11, 3
WARM_UP = 1 + SEEN_BEFORE
"""Pairs before those that count: a CUDA device's forwards are recorded in the last of them."""
SHORT = {"float32": "f32", "bfloat16": "bf16"}
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with random weights, and a round of probes of one sequence each."""

    shape: Shape
    dtype: DType
    probes: int
    tokens: int
    """Of each sequence."""


CASES = (
    *(Case(shape=STORIES3M, dtype=dtype, probes=64, tokens=64) for dtype in DTYPES),
    *(Case(shape=shape, dtype=dtype, probes=32, tokens=32) for shape in (MINILM, LLAMA) for dtype in DTYPES),
)
QUICK_CASES = tuple(Case(shape=shape, dtype="float32", probes=8, tokens=32) for shape in (STORIES3M, MINILM, LLAMA))
GPU_CASES = (
    Case(shape=MINILM, dtype="bfloat16", probes=256, tokens=32),
    Case(shape=LLAMA, dtype="bfloat16", probes=256, tokens=64),
    Case(shape=GIANT, dtype="bfloat16", probes=160, tokens=128),
)


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure and return rows `cpu f32 ...` and `cpu bf16 ...`, and `cuda bf16 ...` where there is such a device."""
    pairs = QUICK_PAIRS if quick else PAIRS
    rows = [measure(case, pairs=pairs) for case in (QUICK_CASES if quick else CASES)]
    if torch.cuda.is_available():
        rows += [measure(case, pairs=pairs, device="cuda") for case in GPU_CASES]
    if out is not None:
        draw(rows, out / "step.png")
    return rows


def measure(case: Case, *, pairs: int, device: str = "cpu") -> Row:
    """Time probes and plain inference in turn. Both read their losses, so a GPU has finished."""
    engine = build_engine(case, device)
    timed = [_pair(engine, case, number) for number in range(pairs + WARM_UP)][WARM_UP:]
    ratios = [probe_ms / plain_ms for probe_ms, plain_ms in timed]
    low, ratio, high = np.percentile(ratios, (25, 50, 75)).tolist()
    millions = sum(tensor.numel() for _, tensor in engine.evaluator.parameters) / 1e6
    return Row(
        name=f"{device} {SHORT[case.dtype]} {case.shape.name}, {millions:.3g} M parameters, "
        f"{case.probes} probes x {case.tokens} tokens",
        value=statistics.median(probe_ms for probe_ms, _ in timed),
        unit="ms",
        reference=statistics.median(plain_ms for _, plain_ms in timed),
        ratio=ratio,
        low=low,
        high=high,
        note="" if device == "cpu" else _unrecorded(engine, case),
    )


def _unrecorded(engine: ProbeEngine[TokenSequence], case: Case) -> str:
    """Say what inference takes that calls each operation from Python."""
    runner = engine.evaluator
    assert isinstance(runner, Runner)
    drawn = engine.drawn(RoundNumber(0), Slot(0), case.probes)
    batches = [runner.objective.rows(batch) for batch in plain_batches(engine, drawn)]

    def infer() -> None:
        for rows in batches:
            placed = runner.place(rows)
            runner.objective.losses(runner.logits(placed), placed).cpu()

    failure = None if runner.recorder is None else runner.recorder.failure
    spent = statistics.median(timed_ms(infer) for _ in range(1 + QUICK_PAIRS))
    return f"inference without a recording: {spent:.4g} ms" + (f"; not recorded: {failure}" if failure else "")


def _pair(engine: ProbeEngine[TokenSequence], case: Case, number: int) -> tuple[float, float]:
    """Return ms of one round's probes and of inference over its sequences, every other time in the other order."""
    round_number, slot = RoundNumber(number), Slot(0)
    batches = plain_batches(engine, engine.drawn(round_number, slot, case.probes))

    def probe() -> None:
        engine.measure(round_number, slot=slot)

    def infer() -> None:
        for batch in batches:
            engine.evaluator.losses(batch).cpu()

    if number % 2:
        plain_ms = timed_ms(infer)
        return timed_ms(probe), plain_ms
    return timed_ms(probe), timed_ms(infer)


def plain_batches(engine: ProbeEngine[TokenSequence], drawn: NDArray[np.int64]) -> list[list[TokenSequence]]:
    """Return the sequences of each micro-batch, every one twice: what inference must read to do the same.

    Args:
        drawn: [samples, examples per probe] numbers of examples, as `ProbeEngine.drawn` returns them.
    """
    return [
        [engine.items[index] for examples in units.examples.tolist() for _ in range(2) for index in examples]
        for units in engine.micro_batches(drawn)
    ]


def build_engine(case: Case, device: str = "cpu") -> ProbeEngine[TokenSequence]:
    """Return an engine over random weights and random tokens."""
    model: Any = build(case.shape, case.dtype, positions=case.tokens)
    is_bert = case.shape.kind == "bert"
    kind: dict[str, Any] = {"kind": "classes", "classes": ("0", "1")} if is_bert else {"kind": "text"}
    spec = RunSpec(
        name="step",
        model=ModelSpec(name=case.shape.name, digest="0" * 64, dtype=case.dtype),
        round=RoundSpec(probes_max=case.probes),
        objective=ObjectiveSpec(tokens_max=case.tokens, **kind),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokens = np.random.default_rng(0).integers(1, case.shape.vocabulary, (case.probes, case.tokens), dtype=np.int32)
    objective = Objective.of(spec.objective, model, tokenizer)
    runner = Runner(model.to(device), build_manifest(model, spec.model), objective)
    start = case.tokens if is_bert else 1
    items = [TokenSequence(tokens=row, start=start, answer=number % 2) for number, row in enumerate(tokens)]
    return ProbeEngine(runner, spec, items)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ratios."""
    found = [
        plots.Bar(label=row.name, value=row.ratio, low=row.low, high=row.high, target=LIMIT)
        for row in rows
        if row.ratio is not None
    ]
    plots.bars(path, found, title="A probe step, against plain inference of the same tokens", axis="times inference")


def timed_ms(work: Callable[[], None]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
