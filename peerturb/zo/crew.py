"""Run machine code on the threads that torch itself uses on a CPU.

Threads of our own would wait for a core while torch's spin between two operations, so inside a forward they cost more
than they bring. torch's come from the OpenMP library it was linked with, and that library takes anybody's work. Knows
nothing of the work.
"""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def run(body: int, task: bytes) -> None:
    """Call `body(task)` on as many threads as torch uses, at once, and return when all have.

    Args:
        body: address of a C function that takes a pointer and does the share of the work that is its thread's: number
            `thread_number()` of `thread_count()`.
        task: what the pointer leads to: a copy of this.
    """
    place = ctypes.create_string_buffer(task, len(task))
    threads = torch.get_num_threads()
    if threads == 1:
        _plain(body)(place)
    else:
        _openmp().GOMP_parallel(body, place, threads, 0)


def is_usable() -> bool:
    """Tell whether torch's threads can be used."""
    return _openmp() is not None


def thread_number() -> Any:
    """Return the C function that tells a share of the work which it is, from 0 on."""
    return _openmp().omp_get_thread_num


def thread_count() -> Any:
    """Return the C function that tells a share of the work how many there are."""
    return _openmp().omp_get_num_threads


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return GNU OpenMP as torch's own code finds it; None where torch was linked with another."""
    try:
        # Looked up among what libtorch_cpu is linked with: a second copy of OpenMP would have threads of its own.
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        parallel, number, count = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    for asked in (number, count):
        asked.restype, asked.argtypes = ctypes.c_int, []
    return library


@lru_cache(maxsize=64)
def _plain(body: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
