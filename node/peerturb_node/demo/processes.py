"""Real child processes that never outlive the demo: own process groups, log files, and a clean end in every case.

It knows nothing of what the children do.
"""

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, Signals
from types import TracebackType
from typing import BinaryIO, Self

from peerturb.errors import PeerturbError

LINE_BYTES_MAX = 1 << 20
"""Longest line a child may print on standard output."""
LOG_LINES_SHOWN = 12
"""Lines of a dead child's log that its error message quotes."""
_PR_SET_PDEATHSIG = 1


class ChildError(PeerturbError):
    """A child process ended when it should not have."""


class Child:
    """One process and its log. Made by `Family.start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, reader: "asyncio.Task[None]") -> None:
        self.name = name
        self.log = log
        self._process = process
        self._reader = reader
        self.is_expected_to_end = False
        """Set before it is told to stop, so that nobody is alarmed."""

    @property
    def pid(self) -> int:
        """Process id, which is also its process group's."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.returncode

    def signal(self, number: Signals) -> None:
        """Send a signal to the child's whole process group; a child that is gone is no error."""
        if self.code is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return

    async def end(self, number: Signals, *, timeout_s: float) -> int:
        """Signal the child and wait for it; after `timeout_s` it is killed. Returns the exit code."""
        self.is_expected_to_end = True
        self.signal(number)
        return await self.wait(timeout_s=timeout_s)

    async def wait(self, *, timeout_s: float) -> int:
        """Wait for the child's end and its last line; after `timeout_s` it is killed. Returns the exit code."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self.signal(SIGKILL)
            await self._process.wait()
        await asyncio.wait([self._reader], timeout=2.0)
        assert self.code is not None
        return self.code

    async def exited(self) -> None:
        """Wait for the process's end, however long it takes."""
        await self._process.wait()

    def output(self) -> str:
        """Return everything it has printed on standard output."""
        return self.log.with_suffix(".out").read_text(encoding="utf-8")

    def obituary(self) -> str:
        """Return a message about an unexpected end, with the last lines of the log."""
        how = f"signal {Signals(-self.code).name}" if self.code and self.code < 0 else f"exit code {self.code}"
        tail = last_lines(self.log, LOG_LINES_SHOWN)
        quoted = "\n".join(f"  | {line}" for line in tail) if tail else "  (its log is empty)"
        return f"{self.name} ended with {how}. The last lines of {self.log}:\n{quoted}"


class Family:
    """All children of the demo. Leaving the context ends every one of them, whatever happened."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        # Settings for the user's own node or coordinator are not for the demo's.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PEERTURB_")}
        self._environment = {**kept, **environment}
        self.children: list[Child] = []

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing of value is lost by a hard end: logs are on disk, and a clean stop has been tried before this.
        for child in self.children:
            child.is_expected_to_end = True
            child.signal(SIGKILL)
        if self.children:
            await asyncio.wait([asyncio.ensure_future(child.wait(timeout_s=5.0)) for child in self.children])

    async def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        is_tool: bool = False,
    ) -> Child:
        """Start `command` in its own process group; standard error goes to `logs/NAME.log`.

        Standard output goes line by line to `on_line` and to `logs/NAME.out`. A second child of the same name appends.
        A tool is expected to end by itself; whoever started it looks at its exit code.

        Raises:
            ChildError: it could not be started.
        """
        log = self._logs / f"{name}.log"
        try:
            with log.open("ab") as stderr:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=stderr,
                    env=self._environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                    limit=LINE_BYTES_MAX,
                )
        except OSError as error:
            raise ChildError(f"cannot start {name} ({command[0]}): {error.strerror or error}") from error
        assert process.stdout is not None
        copy = (self._logs / f"{name}.out").open("ab")
        child = Child(name, process, log, asyncio.create_task(_read(process.stdout, copy, on_line)))
        child.is_expected_to_end = is_tool
        self.children.append(child)
        return child

    def raise_for_dead(self) -> None:
        """Raise if a child ended that nobody told to.

        Raises:
            ChildError: the message quotes the end of its log.
        """
        for child in self.children:
            if child.code is not None and not child.is_expected_to_end:
                raise ChildError(child.obituary())


async def _read(stream: asyncio.StreamReader, copy: BinaryIO, on_line: Callable[[str], None] | None) -> None:
    with copy:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than LINE_BYTES_MAX: the reader has dropped it
                continue
            if not line:
                return
            copy.write(line)
            copy.flush()
            if on_line is not None:
                on_line(line.decode("utf-8", errors="replace").rstrip("\n"))


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a new child runs first so that the kernel kills it if the demo itself is killed (Linux only)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(SIGKILL))
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return ask_kernel


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a text file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            return file.read().decode("utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return []
