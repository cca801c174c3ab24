"""What a figure was measured on: processor, threads, versions. It names no path, host or user."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import peerturb

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_int8", "amx_bf16",
                "asimddp", "bf16", "i8mm", "sve")  # fmt: skip
"""Sets that decide how fast matrix products and sums of small integers are, as Linux names them."""

_CPU_INFO = Path("/proc/cpuinfo")


def describe() -> dict[str, Any]:
    """Return what a reader of a figure must know; None where it is not known or not there."""
    model, flags = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "peerturb": peerturb.__version__,
        "commit": commit(Path(peerturb.__file__)),
    }


def commit(file: Path) -> str | None:
    """Return the git commit of the checkout that `file` belongs to, `-dirty` if tracked files were changed.

    None where there is no git, no checkout, or one of something else around an installed package.
    """
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    ended = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def _cpu() -> tuple[str | None, frozenset[str]]:
    """Return the processor's name and its flags."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.processor() or None), frozenset(flags.split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
