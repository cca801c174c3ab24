"""Let glibc keep the large blocks that every forward asks for and gives back, for a process that does little else.

By default glibc takes a block of 32 MiB or more (at first of 128 KiB) from the kernel by `mmap` and unmaps it when it
is freed, and it gives back the end of its heap beyond 64 MiB. So a forward's large activations are mapped, zeroed page
by page and unmapped again in every forward. A thread other than the first, such as the one a node computes on, has a
heap in pieces of 64 MiB at most, which come and go in the same way.

Called by commands, which own their process, never by the library.
"""

import ctypes
import os
import sys
from collections.abc import Mapping

KEPT_BYTES = 2**30
"""Larger blocks are still mapped by themselves, and free memory beyond this at the heap's end is still given back."""

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8
"""What `mallopt` calls them (malloc.h)."""

TUNABLES = ("arena_max", "mmap_max", "mmap_threshold", "top_pad", "trim_threshold")
"""What a person may have set by MALLOC_ARENA_MAX, MALLOC_TRIM_THRESHOLD_ and so on, or in GLIBC_TUNABLES."""


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def keep_large_blocks() -> bool:
    """Keep freed blocks for the next forward; return False where that is not glibc's to do or a person set otherwise.

    The process then holds what its largest forward needed, and at most `KEPT_BYTES` beyond what is in use at its heap's
    end. To be called before threads are started: those that have a heap of their own already keep it.
    """
    libc = _glibc()
    if libc is None or is_tuned(os.environ):
        return False
    # One heap for all threads: theirs would be cut into pieces. What they wait for each other is little, since torch,
    # numpy and Python itself take small blocks from pools of their own or hold the interpreter's lock.
    libc.mallopt(ARENA_MAX, 1)
    libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
    # Older releases refuse a threshold above 32 MiB; there no block at all is mapped by itself.
    return bool(libc.mallopt(MMAP_THRESHOLD, KEPT_BYTES) or libc.mallopt(MMAP_MAX, 0))


def is_tuned(environment: Mapping[str, str]) -> bool:
    """True if the environment sets one of glibc's values that matter here: then all of them stay as they are."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    names = {name.rstrip("_") for name in environment}
    return any(f"glibc.malloc.{name}=" in tunables or f"MALLOC_{name.upper()}" in names for name in TUNABLES)


def free_bytes() -> int:
    """Return how much of what the process has taken from the kernel its heap holds unused; 0 where nothing tells."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    return int(libc.mallinfo2().fordblks)


def _glibc() -> ctypes.CDLL | None:
    """Return the process's C library if it is glibc; musl knows no `mallopt`, Android's means other things by it."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
    except OSError:  # a program linked without a dynamic C library
        return None
