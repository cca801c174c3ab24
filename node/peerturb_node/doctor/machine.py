"""Is there enough memory and disk?"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from peerturb.manifest import Manifest
from peerturb_node.doctor.report import Check, fail, ok
from peerturb_node.settings import NodeSettings

_OVERHEAD_BYTES = 600 * 1024 * 1024
"""Interpreter, torch and transformers loaded, measured on Linux: about 450 MB."""
_LOG_BYTES = 64 * 1024 * 1024
"""Room for a local log: 64 MiB are 100 000 rounds of 600 codes."""


def tensor_bytes(*models: Any) -> int:
    """Return the bytes of the models' parameters and buffers, what they share counted once; packed weights as packed.

    A copy in another type (`--compute-dtype`) is another model that shares what is not floating point.
    """
    found: dict[int, int] = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            # bitsandbytes keeps the scales of a packed weight beside it, neither parameter nor buffer.
            state = getattr(tensor, "quant_state", None)
            for part in (tensor,) if state is None else (tensor, state.absmax):
                found[part.data_ptr()] = part.numel() * part.element_size()
    return sum(found.values())


def checkpoint_bytes(manifest: Manifest) -> int:
    """Return the bytes of the tensors in a checkpoint: those that are trained."""
    return sum(entry.elements * (4 if entry.dtype == "float32" else 2) for entry in manifest)


def memory_needed(weights: int, vocabulary: int, width: int, *, tokens: int) -> int:
    """Estimate the least that a node needs: weights (bytes), the smallest pass, the program itself.

    Args:
        tokens: of the smallest pass; larger ones are planned by what is free then.
    """
    # A handful of activations and one set of logits are alive at once.
    activations = tokens * (16 * width + 2 * vocabulary) * 4
    update = 2**26
    return weights + activations + update + _OVERHEAD_BYTES


def check_memory(needed: int, *, is_loaded: bool) -> Check:
    """Compare an estimate with what is free; what a loaded model already uses counts as free."""
    free = psutil.virtual_memory().available + (psutil.Process().memory_info().rss if is_loaded else 0)
    text = f"about {_mebibytes(needed)} needed, {_mebibytes(free)} free"
    if needed > free:
        remedy = "close other programs, lower the run's objective.tokens_max, or use a larger computer"
        return fail("memory", text, remedy)
    return ok("memory", text)


def check_disk(settings: NodeSettings, each_checkpoint: int) -> Iterator[Check]:
    """Compare checkpoints (bytes of one) and log with what the state folder's disk has."""
    folder = settings.state.expanduser()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    needed = 2 * each_checkpoint + _LOG_BYTES
    free = shutil.disk_usage(existing).free
    text = f"about {_mebibytes(needed)} needed under {folder} (two checkpoints and the log), {_mebibytes(free)} free"
    if needed > free:
        yield fail("disk", text, "free some space, or choose another folder with --state")
    elif not _can_write(existing):
        yield fail("disk", f"{existing} cannot be written to", "choose another folder with --state")
    else:
        yield ok("disk", text)


def _can_write(folder: Path) -> bool:
    import os

    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
