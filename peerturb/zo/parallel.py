"""Independent pieces of work side by side: as many threads as torch uses, and inside each one torch runs alone.

A piece that mixes numpy and torch (make signs, multiply, subtract) keeps its core busy from end to end, without the
barriers that torch's own threads meet at after every operation. It knows nothing of the work.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")

_thread = threading.local()


def in_parallel(
    work: Callable[[Item], None], items: Sequence[Item], *, on: str = "cpu", is_shared: bool = True
) -> None:
    """Do `work` on every item, in any order; the items must not touch the same data.

    `on` is the type of the device that works: any but a CPU takes pieces one by one as it is, and several of ours would
    only hold their scratch memory at the same time. Called from inside a piece of work it goes item after item: waiting
    there for other threads could be for ever. Not `is_shared`, one thread does all: pieces of much Python and little
    else make threads wait for the interpreter's lock, and torch's own threads cost more than they bring.
    """
    threads = torch.get_num_threads() if on == "cpu" else 1
    if min(threads, len(items)) <= 1 or getattr(_thread, "is_ours", False):
        for item in items:
            work(item)
        return
    if not is_shared:
        _pool(threads).submit(_each, work, items).result()
        return
    for _ in _pool(threads).map(work, items):  # taking the results raises what a piece raised
        pass


def _each(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    for item in items:
        work(item)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="peerturb-zo")
    started = threading.Barrier(threads + 1)

    def start() -> None:
        _thread.is_ours = True
        torch.set_num_threads(1)
        # A thread keeps the count it has when it is first asked; a later count is only a default for new threads.
        torch.get_num_threads()
        started.wait()

    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)
    return pool


# Threads do not survive a fork: a child makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
