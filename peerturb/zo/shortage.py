"""Memory that ran out: recognised in whatever way torch and its libraries say it, and told so that a person can act."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peerturb.errors import ModelError
from peerturb.zo.free import free_bytes

SAID = re.compile(
    "out of memory|can't allocate memory|not enough memory|bad_alloc|STATUS_ALLOC_FAILED"
    # All that oneDNN says when it finds no memory for its own buffers; without a descriptor it knows no way at all.
    "|could not create a primitive(?! descriptor)|could not create a memory object|could not execute a primitive"
)
"""What stands in a plain RuntimeError of torch's CPU allocator, CUDA, cuBLAS, cuDNN or oneDNN."""

REASON_CHARS = 160
"""Of what torch said, as much is shown."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says, in one of the many ways there are, that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and SAID.search(str(error)) is not None


def no_smaller_forward(error: Exception, device: torch.device, *, rows: int, tokens: int) -> ModelError:
    """Return what to tell when memory ran out in a forward that cannot be made smaller."""
    what = f"{rows} {'row' if rows == 1 else 'rows'} of {tokens:,} tokens"
    return ModelError(
        f"not enough memory on {device} for the smallest forward, {what} ({_facts(error, device)}). Lower "
        "objective.tokens_max, freeze the largest tensors (model.exclude) or train an adapter, compute in a smaller "
        "type (a node's --compute-dtype), choose another --device, or close other programs"
    )


@contextmanager
def memory_for(what: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Context in which memory that runs out is an error a person can act on.

    Raises:
        ModelError: there was not enough memory for `what`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"not enough memory on {device} for {what} ({_facts(error, torch.device(device))}). Close other programs, "
            "or choose another --device"
        ) from error


def _facts(error: Exception, device: torch.device) -> str:
    """What was asked for, in torch's words but for the place in its sources, and what is free."""
    line = (str(error).splitlines() or [""])[0]
    said = re.sub(r"^\[enforce fail at [^\]]*\] err == 0\. ", "", line)[:REASON_CHARS].rstrip(". ")
    free = free_bytes(device)
    left = "what is free is not known" if free is None else f"{free / 2**20:,.0f} MiB free"
    return f"{said or type(error).__name__}; {left}"
