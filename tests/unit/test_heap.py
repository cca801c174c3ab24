"""Large blocks: used again without new pages once glibc is told so, on the thread a node computes on too."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from peerturb.zo import heap

BLOCK_BYTES = 2**26

# Takes blocks, writes to each of their pages if asked to, and frees them, twice, on the first thread or another. Prints
# the pages each time had to get from the kernel, and what the heap then holds unused.
PROBE = """
import ctypes, json, resource, sys, threading
from peerturb.zo import heap

_, do, thread, touch, *sizes = sys.argv
kept = heap.keep_large_blocks() if do == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults = []

def fill():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [libc.malloc(int(size)) for size in sizes]
        for block, size in zip(blocks, sizes):
            if touch == "touch":
                ctypes.memset(block, 1, int(size))
        for block in blocks:
            libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if thread == "other":
    other = threading.Thread(target=fill)
    other.start()
    other.join()
else:
    fill()
print(json.dumps({"kept": kept, "faults": faults, "free": heap.free_bytes()}))
"""

needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")


def probe(*words: str | int, **variables: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=clean | variables,
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@needs_glibc
@pytest.mark.parametrize("thread", ["first", "other"])
def test_a_freed_block_is_used_again_without_new_pages(thread: str) -> None:
    kept, plain = (probe(do, thread, "touch", BLOCK_BYTES) for do in ("keep", "leave"))
    assert kept["kept"] is True
    first, again = kept["faults"]
    assert first > 0
    assert again < first / 100
    assert kept["free"] >= BLOCK_BYTES
    first, again = plain["faults"]
    assert again > first / 2
    assert plain["free"] < BLOCK_BYTES


@needs_glibc
@pytest.mark.parametrize("sizes", [[heap.KEPT_BYTES + BLOCK_BYTES], [heap.KEPT_BYTES // 4] * 6])
def test_more_than_is_kept_goes_back(sizes: list[int]) -> None:
    assert probe("keep", "first", "only", *sizes)["free"] <= heap.KEPT_BYTES


@needs_glibc
@pytest.mark.parametrize(
    "variables", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}]
)
def test_what_a_person_has_set_stays(variables: dict[str, str]) -> None:
    assert heap.is_tuned(variables)
    found = probe("keep", "first", "only", BLOCK_BYTES, **variables)
    assert found["kept"] is False
    assert found["free"] < BLOCK_BYTES


def test_other_variables_are_not_about_this() -> None:
    assert not heap.is_tuned({"MALLOC_CONF": "x", "MALLOC_PERTURB_": "1", "GLIBC_TUNABLES": "glibc.malloc.check=3"})
    assert heap.is_tuned({"MALLOC_ARENA_MAX": "2"})
    assert heap.is_tuned({"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.arena_max=1"})


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    assert heap.keep_large_blocks() is False
    assert heap.free_bytes() == 0


class OldLibrary:
    """A glibc that takes no large threshold, as releases before 2.35 did."""

    def __init__(self) -> None:
        self.set: dict[int, int] = {}

    def mallopt(self, name: int, value: int) -> int:
        if name == heap.MMAP_THRESHOLD and value > 2**25:
            return 0
        self.set[name] = value
        return 1


def test_an_old_glibc_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    library = OldLibrary()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    monkeypatch.setattr(heap, "is_tuned", lambda _: False)
    assert heap.keep_large_blocks()
    assert library.set == {heap.ARENA_MAX: 1, heap.TRIM_THRESHOLD: heap.KEPT_BYTES, heap.MMAP_MAX: 0}
