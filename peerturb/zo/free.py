"""How many bytes are free on a device, as far as the system tells. Knows nothing of models.

On a CPU memory that runs out seldom raises an error: the system first slows down and then kills a process. So what is
free is asked for before a forward, not only after one that failed.
"""

from pathlib import Path

import torch

from peerturb.zo import heap

PROC, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
"""Where Linux tells of this process and of the limits of its control groups."""

V1, V2 = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("memory.max", "memory.current", "inactive_file"),
)
"""By version of control groups: the limit's file, the usage's, and the field of memory.stat that counts file pages not
used lately. They are part of the usage, and dropped when memory is needed."""


def free_bytes(device: torch.device) -> int | None:
    """Return what a forward can still take; None where nothing tells.

    Includes what the process holds itself, unused: torch's allocator on CUDA, the heap on a CPU (in pieces, so not all
    of it can be had at once).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [value for value in (_available(), cgroup_bytes(), _address_space()) if value is not None]
    return max(0, min(known)) + heap.free_bytes() if known else None


def cgroup_bytes(proc: Path = PROC, root: Path = CGROUPS) -> int | None:
    """Return what the tightest memory limit of the process's control groups leaves; None without a limit."""
    found: list[int] = []
    for line in _text(proc / "cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base, files = (root / "memory", V1) if controllers else (root, V2)
        folder = base / path.lstrip("/")
        # Limits of the groups around it hold too. In a container the path may be the host's: what is mounted counts.
        found += [
            left
            for group in (folder, *folder.parents)
            if group.is_relative_to(base) and (left := _left(group, *files)) is not None
        ]
    return min(found, default=None)


def _left(group: Path, limit: str, usage: str, droppable: str) -> int | None:
    limited, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not limited.isdigit() or not used.isdigit():  # "max", or a folder that is not a group
        return None
    fields = dict(line.partition(" ")[::2] for line in _text(group / "memory.stat").splitlines())
    return int(limited) - int(used) + int(fields.get(droppable, 0))


def _available() -> int | None:
    """What the system can give to programs without swapping."""
    try:
        import psutil
    except ImportError:  # an extra of the package; the numerics work without
        return None
    return int(psutil.virtual_memory().available)


def _address_space() -> int | None:
    """What the limit on the process's address space (`ulimit -v`) leaves."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(PROC / "statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0]) * resource.getpagesize()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
