"""Write files and folders so that nobody ever sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from peerturb.errors import ModelError


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, and put it in place of the old one.

    Raises:
        ModelError: the file cannot be written; the old one is as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None], *, marker: str) -> None:
    """Let `write` fill a temporary folder beside `folder`, then put it in its place.

    Args:
        marker: a file by which an earlier result is known; any other non-empty folder is left alone.

    Raises:
        ModelError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / marker).is_file())):
        raise ModelError(f"{folder} exists and has no {marker} in it; name an empty or a new folder")
    draft: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        draft.chmod(0o755)  # what mkdir gives; mkdtemp is for private things
        write(draft)
        for file in sorted(draft.rglob("*")):
            _sync(file)
        _exchange(draft, folder)
        _sync(folder.parent)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _exchange(draft: Path, folder: Path) -> None:
    """Put `draft` in the place of `folder`; a folder cannot replace one that has files."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / "folder")
    try:
        draft.rename(folder)
    except OSError:
        (old / "folder").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
