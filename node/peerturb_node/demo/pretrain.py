"""Pretrain the demo's base model with ordinary backprop: `python -m peerturb_node.demo.pretrain --out DIR`.

What the model sees: the Python sources of the standard library it runs on, docstrings and comments included, as they
stand in the files. What it never sees: the documentation of `pydoc_data`, the packages that the demo's `code` class is
cut from (`peerturb_node.demo.task.TASK_PACKAGES`), tests, IDLE, and the codec tables. So no topic and no file of the
demo's task, training or held-out, was in the pretraining, and only the demo's rounds teach the model which label word
names which kind of text.

The tokenizer (byte-level BPE) is trained on the same text. Equal seeds on the same machine and Python give equal files;
the folder that is committed fixes the demo's base weights for everybody.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peerturb.errors import DataError, ModelError, PeerturbError
from peerturb_node.demo.task import TASK_PACKAGES, standard_library_files

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
"""Separates files in the pretraining; also the padding token."""

VOCABULARY_SIZE = 1024
CONTEXT_TOKENS = 256
"""Positions the model is made for."""
HIDDEN = 128
INTERMEDIATE = 352
LAYERS = 4
HEADS = 4
KEY_VALUE_HEADS = 2
"""0.87 M parameters with tied embeddings: 1024*128 + 4*(128*(128+64+64+128) + 3*128*352 + 2*128) + 128 = 869 504."""

WINDOW_TOKENS = 128
BATCH_WINDOWS = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
HELDOUT_WINDOWS = 64
"""Windows kept back from the end of the shuffled corpus to measure the loss at the end."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainResult:
    """What a pretraining came to."""

    parameters: int
    tokens: int
    """Tokens in the corpus."""
    characters: int
    """Characters in the corpus."""
    heldout_loss: float
    """Mean loss per token, in nats, on windows the model was not trained on."""


def corpus_texts() -> list[str]:
    """Return the sources that the base model may see, in a fixed order.

    Raises:
        DataError: this Python carries no sources.
    """
    texts = []
    for name, path in standard_library_files():
        if name.split("/")[0] not in TASK_PACKAGES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocabulary_size: int = VOCABULARY_SIZE) -> "Tokenizer":
    """Return a byte-level BPE tokenizer trained on `texts`; token 0 is `END_OF_TEXT`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return tokenizer


def pretrain(out: Path, *, steps: int, seed: int, threads: int, progress: Progress | None = None) -> PretrainResult:
    """Train tokenizer and model and write them to `out` in the Hugging Face format.

    Args:
        out: folder to write; files of the same names are replaced.
        steps: AdamW steps of `BATCH_WINDOWS` windows of `WINDOW_TOKENS` tokens.
        seed: of the initial weights and of the order of the windows.
        threads: CPU threads.
        progress: a running display, or None for silence.

    Raises:
        DataError: this Python carries no sources, or too few of them.
        ModelError: the folder cannot be written.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    texts = corpus_texts()
    random.Random(seed).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    windows = _windows(tokenizer, texts)
    if len(windows) < HELDOUT_WINDOWS + BATCH_WINDOWS:
        raise DataError(f"the standard library's sources give only {len(windows)} windows of {WINDOW_TOKENS} tokens")
    model = _new_model()
    _fit(model, windows[:-HELDOUT_WINDOWS], steps=steps, seed=seed, progress=progress)
    with torch.inference_mode():
        heldout = float(_loss(model.eval(), windows[-HELDOUT_WINDOWS:]))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    try:
        model.save_pretrained(out)
        fast.save_pretrained(out)
    except OSError as error:
        raise ModelError(f"cannot write the model to {out}: {error.strerror or error}") from error
    return PretrainResult(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=windows.numel(),
        characters=sum(map(len, texts)),
        heldout_loss=heldout,
    )


def _windows(tokenizer: "Tokenizer", texts: list[str]) -> "Tensor":
    """Return the corpus as int64 windows, shape (windows, WINDOW_TOKENS); the ragged end is dropped."""
    import torch

    end: int = tokenizer.encode(END_OF_TEXT).ids[0]
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        tokens.extend(encoding.ids)
        tokens.append(end)
    whole = len(tokens) // WINDOW_TOKENS * WINDOW_TOKENS
    return torch.tensor(tokens[:whole], dtype=torch.int64).view(-1, WINDOW_TOKENS)


def _new_model() -> Any:
    """Return a Llama with fresh weights from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
        )
    )


def _loss(model: Any, batch: "Tensor") -> "Tensor":
    """Return the mean next-token loss of windows (batch, tokens), in nats."""
    import torch.nn.functional as F

    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _fit(model: Any, windows: "Tensor", *, steps: int, seed: int, progress: Progress | None) -> None:
    """Run AdamW with linear warm-up and cosine decay to a tenth over shuffled passes through the windows."""
    import torch

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    task = progress.add_task("pretraining", total=steps, loss=math.nan) if progress else None
    model.train()
    for batch in _batches(windows, steps, torch.Generator().manual_seed(seed)):
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None and task is not None:
            progress.update(task, advance=1, loss=loss.item())


def _rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the highest."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def _batches(windows: "Tensor", steps: int, generator: "torch.Generator") -> Iterator["Tensor"]:
    """Yield `steps` batches; every pass over the windows has its own order."""
    import torch

    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH_WINDOWS:
            order = torch.randperm(len(windows), generator=generator).tolist()
        taken, order = order[:BATCH_WINDOWS], order[BATCH_WINDOWS:]
        yield windows[taken]


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the model and its tokenizer.")],
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps; 1800 take about five minutes on two cores.")
    ] = 1800,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the data.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Pretrain the demo's base model on this Python's standard library and write it in the Hugging Face format."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            result = pretrain(out, steps=steps, seed=seed, threads=threads, progress=progress)
    except PeerturbError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(error.exit_code) from error
    console.print(
        f"{result.parameters:,} parameters, {result.characters:,} characters in {result.tokens:,} tokens, "
        f"held-out loss {result.heldout_loss:.3f} nats per token; written to {out}"
    )


if __name__ == "__main__":
    app()
