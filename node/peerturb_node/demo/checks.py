"""Compares two models file by file. It knows files, no tensors: equal means every byte."""

from pathlib import Path

_CHUNK_BYTES = 1 << 20


def are_same_models(first: Path, second: Path) -> bool:
    """Return whether two Hugging Face folders hold the same files, byte for byte; a folder without weights is none."""
    names = {path.name for path in first.iterdir()}
    return (
        any(name.endswith(".safetensors") for name in names)
        and names == {path.name for path in second.iterdir()}
        and all(are_same_bytes(first / name, second / name) for name in sorted(names))
    )


def are_same_bytes(first: Path, second: Path) -> bool:
    """Return whether two files hold the same bytes."""
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as left, second.open("rb") as right:
        while chunk := left.read(_CHUNK_BYTES):
            if chunk != right.read(_CHUNK_BYTES):
                return False
    return True
