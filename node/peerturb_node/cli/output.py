"""Files that commands write for people: never over another one, and told before the work rather than after it."""

import os
from pathlib import Path

from peerturb.errors import SpecError


def check_new(path: Path, *, remedy: str = "give --out another name, or remove it") -> Path:
    """Return a file's path, its `~` resolved, if it can be written; `remedy` says what to do if it is there.

    Raises:
        SpecError: it exists, or its folder does not or cannot be written to.
    """
    whole = path.expanduser()
    if whole.exists():
        raise SpecError(f"{path} exists; {remedy}")
    if not whole.parent.is_dir():
        raise SpecError(f"{path} cannot be written: there is no folder {whole.parent}; make it, or name another")
    if not os.access(whole.parent, os.W_OK | os.X_OK):
        raise SpecError(f"{path} cannot be written: {whole.parent} does not allow it; name another folder")
    return whole


def write_new(path: Path, text: str) -> None:
    """Write a text and a line's end.

    Raises:
        SpecError: the file exists by now, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror or error}") from error
