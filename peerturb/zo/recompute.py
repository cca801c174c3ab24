"""Activation checkpointing for any stack of layers: keep what enters a block, compute the rest again on the way back.

A block's own forward is wrapped while a context lasts; the model is neither changed nor switched to training. Knows
nothing of gradients or objectives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: members of its outermost lists of two or more modules of one class."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1 and len(set(map(type, child))) == 1:
            found += list(child)
        else:
            found += blocks_of(child)
    return found


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which the blocks keep nothing but their inputs for a backward pass."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            forward = block.forward
            replaced.append((block, block.__dict__.get("forward")))
            # As an attribute of the object it goes before the class's method. No random draws happen in evaluation.
            block.__dict__["forward"] = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, before in reversed(replaced):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before
