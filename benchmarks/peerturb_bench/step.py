"""Measuring a round's probes, against plain inference over the same tokens: what the perturbation costs.

Both compute the loss of the same sequences in the same micro-batches, one right after the other, repeatedly, so that a
noisy machine slows both alike. The probes include making their signs. value: ms of a probe step, the median.
reference: ms of plain inference, the median. ratio: the median of value / reference over the pairs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.model import build_manifest, prepare
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb_bench.rows import Row

SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A Llama of some shape with random weights, and a round of probes."""

    name: str
    dtype: DType
    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    tokens: int
    probes: int


SMALL: dict[str, Any] = {
    "name": "stories3m",
    "width": 192,
    "layers": 6,
    "heads": 6,
    "key_value_heads": 2,
    "inner": 512,
    "vocabulary": 4096,
    "tokens": 64,
}
LARGE: dict[str, Any] = {
    "name": "llama-40m",
    "width": 512,
    "layers": 8,
    "heads": 8,
    "key_value_heads": 4,
    "inner": 1376,
    "vocabulary": 16384,
    "tokens": 64,
}
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
CASES = (
    *(Case(dtype=dtype, probes=64, **SMALL) for dtype in DTYPES),
    *(Case(dtype=dtype, probes=16, **LARGE) for dtype in DTYPES),
)
GIANT: dict[str, Any] = {
    "name": "llama-1b",
    "width": 2048,
    "layers": 16,
    "heads": 32,
    "key_value_heads": 8,
    "inner": 8192,
    "vocabulary": 32_000,
    "tokens": 128,
}
GPU_CASES = (Case(dtype="bfloat16", probes=256, **LARGE), Case(dtype="bfloat16", probes=160, **GIANT))
QUICK_CASES = tuple(Case(dtype=dtype, probes=16, **SMALL) for dtype in DTYPES)


def run(quick: bool = False) -> list[Row]:
    """Measure and return rows `cpu f32 ...` and `cpu bf16 ...`, and `cuda bf16 ...` where there is such a device."""
    rows = [measure(case, repeats=3 if quick else 9) for case in (QUICK_CASES if quick else CASES)]
    if torch.cuda.is_available():
        rows += [measure(case, repeats=3 if quick else 9, device="cuda") for case in GPU_CASES]
    return rows


def measure(case: Case, repeats: int, device: str = "cpu") -> Row:
    """Time probes and plain inference in turn. Both read their losses, so a GPU has finished."""
    engine = build_engine(case, device)
    slot = Slot(0)
    drawn = engine.drawn(RoundNumber(0), slot, case.probes)
    batches = [
        [engine.items[drawn[sample, 0]] for sample in samples for _ in range(2)]
        for samples in engine.micro_batches(drawn)
    ]

    def probe() -> None:
        engine.measure(RoundNumber(0), slot=slot)

    def infer() -> None:
        for batch in batches:
            engine.evaluator.losses(batch).cpu()

    probe()
    infer()
    pairs = [(timed_ms(probe), timed_ms(infer)) for _ in range(repeats)]
    return Row(
        name=f"{device} {SHORT[case.dtype]} {case.name}, {case.probes} probes x {case.tokens} tokens",
        value=statistics.median(probe_ms for probe_ms, _ in pairs),
        unit="ms",
        reference=statistics.median(plain_ms for _, plain_ms in pairs),
        ratio=statistics.median(probe_ms / plain_ms for probe_ms, plain_ms in pairs),
    )


def build_engine(case: Case, device: str = "cpu") -> ProbeEngine[TokenSequence]:
    """Return an engine over random weights and random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        intermediate_size=case.inner,
        max_position_embeddings=case.tokens,
        tie_word_embeddings=True,
    )
    model: Any = prepare(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), case.dtype)
    spec = RunSpec(
        name="step",
        model=ModelSpec(name=case.name, digest="0" * 64, dtype=case.dtype),
        round=RoundSpec(probes_max=case.probes),
        objective=ObjectiveSpec(tokens_max=case.tokens),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokens = np.random.default_rng(0).integers(0, case.vocabulary, (case.probes, case.tokens), dtype=np.int32)
    manifest = build_manifest(model, spec.model)
    runner = Runner(model.to(device), manifest, Objective(spec.objective, tokenizer))
    return ProbeEngine(runner, spec, [TokenSequence(tokens=row, start=1) for row in tokens])


def timed_ms(work: Callable[[], None]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
