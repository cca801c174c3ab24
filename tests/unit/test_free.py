"""What is free: the tightest of the system's memory, control groups and the address space, read from faked files."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerturb.zo import free, heap

MIB = 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    return folder


def test_the_tightest_group_of_version_2_counts(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    (proc / "cgroup").write_text("0::/user/app\n")
    group(root / "user", memory__max="1000", memory__current="700", memory__stat="anon 500\ninactive_file 150")
    group(root / "user/app", memory__max="max", memory__current="400", memory__stat="inactive_file 10")
    assert free.cgroup_bytes(proc, root) == 450
    group(root / "user/app", memory__max="500", memory__current="400", memory__stat="inactive_file 10")
    assert free.cgroup_bytes(proc, root) == 110


def test_version_1_is_read_too(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    (proc / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    files = {"memory__limit_in_bytes": "900", "memory__usage_in_bytes": "300"}
    # Within a container the path is the host's, and what is mounted is the container's own group.
    group(root / "memory", **files, memory__stat="inactive_file 1\ntotal_inactive_file 50")
    assert free.cgroup_bytes(proc, root) == 650


@pytest.mark.parametrize("text", ["", "0::/\n", "nonsense\n", "4:memory:/a\n0::/b\n"])
def test_without_a_limit_nothing_is_said(text: str, tmp_path: Path, proc: Path) -> None:
    (proc / "cgroup").write_text(text)
    assert free.cgroup_bytes(proc, tmp_path / "cgroup") is None
    assert free.cgroup_bytes(tmp_path / "nowhere", tmp_path / "cgroup") is None


def test_the_smallest_figure_and_the_heaps_own_make_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, int | None] = {"_available": 900, "cgroup_bytes": 500, "_address_space": None}
    for name, value in figures.items():
        monkeypatch.setattr(free, name, lambda value=value: value)
    monkeypatch.setattr(heap, "free_bytes", lambda: 30)
    assert free.free_bytes(CPU) == 530
    monkeypatch.setattr(free, "cgroup_bytes", lambda: -7)  # a group above its limit
    assert free.free_bytes(CPU) == 30
    for name in figures:
        monkeypatch.setattr(free, name, lambda: None)
    assert free.free_bytes(CPU) is None
    assert free.free_bytes(torch.device("meta")) is None


def test_cuda_counts_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 9_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 600)
    assert free.free_bytes(CUDA) == 1_100


def test_without_psutil_the_rest_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free._available() is None
    monkeypatch.undo()
    assert (free._available() or 0) > MIB


LIMITED = """
import resource
from peerturb.zo import free
resource.setrlimit(resource.RLIMIT_AS, (1 << 33, resource.RLIM_INFINITY))
print(free._address_space())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_the_limit_of_the_address_space_is_known() -> None:
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert free._address_space() is None
    ended = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, timeout=60)
    assert 0 < int(ended.stdout) < 1 << 33
