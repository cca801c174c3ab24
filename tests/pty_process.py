"""A command in a real pseudo-terminal: what it shows is read, what a person would type is written."""

import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.conftest import REPOSITORY


class PtyProcess:
    """`peerturb ARGUMENTS` in a terminal of its own; ends with the block it is made for."""

    def __init__(self, arguments: Sequence[str], *, folder: Path, columns: int = 120, rows: int = 40) -> None:
        self.shown = ""
        self._seen = 0
        self._master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.resize(columns, rows)
        paths = [str(REPOSITORY / name) for name in (".", "node", "coordinator", "sim", "benchmarks")]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peerturb.cli", *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment, start_new_session=True,
            preexec_fn=_be_in_front,
        )  # fmt: skip
        self._slave = slave

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for handle in (self._master, self._slave):
            with contextlib.suppress(OSError):
                os.close(handle)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size; the process gets SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Type a text; `\\r` is the return key."""
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, *, timeout_s: float = 60.0) -> str:
        """Read until the pattern stands in what has been shown since the last match; return what led up to it."""
        end_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.shown[self._seen :])):
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"{pattern!r} was never shown in: {self.shown[self._seen :][-2_000:]}"
            if not self._read(min(left_s, 0.2)) and self.process.poll() is not None and not self._read(0.2):
                raise AssertionError(f"it ended ({self.process.returncode}) before {pattern!r}: {self.shown[-2_000:]}")
        text = self.shown[self._seen : self._seen + found.end()]
        self._seen += found.end()
        return text

    def end(self, *, timeout_s: float = 60.0) -> int:
        """Read to the end; return the exit code."""
        end_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end_s, f"it does not end: {self.shown[-2_000:]}"
            self._read(0.1)
        while self._read(0.1):
            pass
        return self.process.returncode

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal turns it into SIGINT for the process in front."""
        self.type("\x03")

    @property
    def settings(self) -> list[object]:
        """The terminal's settings now, to compare with `before`."""
        return termios.tcgetattr(self._slave)

    def _read(self, timeout_s: float) -> bool:
        """Take in what there is; False if nothing came."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError as error:
            if error.errno == errno.EIO:  # how Linux tells that the other side is closed
                return False
            raise
        self.shown += data.decode(errors="replace")
        return bool(data)


def _be_in_front() -> None:
    """In the new process: make the terminal its own, and let Ctrl-C reach it even if tests run in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
