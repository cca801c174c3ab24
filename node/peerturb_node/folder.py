"""A node's state folder: its identity, and for every run a sub-folder with local log and checkpoint.

One process at a time. It knows file names and locks, not what the files mean.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from peerturb.errors import SpecError
from peerturb.spec import RunSpec
from peerturb_node.identity import Identity, load_or_create

if os.name == "posix":
    import fcntl

_LOCK_FILE = "lock"
_LOG_FILE = "local.runlog"
_RUN_DIGITS = 16


class StateFolder:
    """The opened, locked folder.

    Raises:
        SpecError: it cannot be made, or another node uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[str] = (self.path / _LOCK_FILE).open("a", encoding="ascii")
        except OSError as error:
            raise SpecError(f"cannot use the state folder {self.path}: {error.strerror or error}") from error
        if os.name == "posix":
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise SpecError(
                    f"another node uses the state folder {self.path}; give each node its own with --state"
                ) from error
        self.identity: Identity = load_or_create(self.path)

    def run_folder(self, spec: RunSpec) -> Path:
        """Return the folder of a run, making it."""
        folder = self.path / f"run-{spec.digest.hex()[:_RUN_DIGITS]}"
        folder.mkdir(exist_ok=True)
        return folder

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log_path(run_folder: Path) -> Path:
    """Return the file of the local log."""
    return run_folder / _LOG_FILE


def set_aside(path: Path) -> Path:
    """Rename a damaged file so that it is out of the way but not lost; return its new path."""
    number = 1
    while (kept := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    return path.replace(kept)
