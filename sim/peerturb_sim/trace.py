"""Reads a membership trace: what a coordinator's machine was told, input by input, and where the store stopped it.

It checks each line and that lines fit together; what follows from them is `peerturb_sim.reproduction`'s affair.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerturb.errors import PeerturbError, SpecError
from peerturb.spec import RunSpec
from peerturb_coordinator.trace_format import LINE_BYTES_MAX, Refused, Start, TraceFormatError, decode, decode_header


class TraceError(PeerturbError):
    """A membership trace cannot be used: file, line, why, and what to do."""

    exit_code = 2

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}:{line}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One input of the machine."""

    line: int
    """Its number in the file, from 1."""
    input: Any
    """A line of `peerturb_coordinator.trace_format`, of any kind but `Refused`."""
    records_max: int | None
    """Records beyond which the log did not grow during it: the store refused, or the coordinator was killed."""


class Trace:
    """A trace file, read anew by each `rows`.

    Attributes:
        path: the file.
        lines: number of whole lines, known after `rows` came to its end.
        torn_bytes: what follows them.
    """

    def __init__(self, path: Path, spec: RunSpec) -> None:
        """Open it.

        Raises:
            TraceError: it is none, or another run's.
            SpecError: it cannot be read.
        """
        self.path = path
        self.lines = 0
        self.torn_bytes = 0
        first = next(self._lines(), b"")
        try:
            header = decode_header(first)
        except TraceFormatError as error:
            raise TraceError(path, 1, str(error)) from error
        if header.spec != spec.digest.hex():
            raise TraceError(
                path,
                1,
                f"the trace is of the run with RunSpec digest {header.spec[:16]}, the log's is "
                f"{spec.digest.hex()[:16]}: log and trace must be of one run",
            )

    def rows(self) -> Iterator[Row]:
        """Yield the inputs in order.

        Raises:
            TraceError: naming the first line that cannot be used.
        """
        held: Row | None = None
        for number, line in self._entries():
            if isinstance(line, Refused):
                if held is None or held.records_max is not None:
                    raise TraceError(self.path, number, "the store refused, but no input stands before it")
                held = Row(line=held.line, input=held.input, records_max=line.records)
                continue
            if held is None:
                self._check_first(number, line)
            else:
                # What a killed coordinator decided last may never have been written.
                killed = isinstance(line, Start) and held.records_max is None
                yield Row(line=held.line, input=held.input, records_max=line.records) if killed else held
            held = Row(line=number, input=line, records_max=None)
        if held is None:
            raise TraceError(self.path, 1, "nothing follows the header: the coordinator was never started with it")
        yield held

    def _entries(self) -> Iterable[tuple[int, Any]]:
        for number, data in enumerate(self._lines(), 1):
            self.lines = number
            if number > 1:
                try:
                    yield number, decode(data)
                except TraceFormatError as error:
                    raise TraceError(
                        self.path, number, f"this is no line of a trace: {error}; take a whole copy of the file"
                    ) from error

    def _check_first(self, number: int, line: Any) -> None:
        if not isinstance(line, Start) or line.records:
            found = f"with {line.records} records in its log" if isinstance(line, Start) else f"with a {line.do!r}"
            raise TraceError(
                self.path,
                number,
                f"the trace begins {found}: only a run that was traced from its first record can be reproduced",
            )

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines; note what is torn."""
        try:
            with self.path.open("rb") as file:
                while data := file.readline(LINE_BYTES_MAX + 1):
                    if not data.endswith(b"\n"):
                        if len(data) > LINE_BYTES_MAX:
                            yield data  # whoever reads it says why it is none
                        self.torn_bytes = len(data)
                        return
                    yield data
        except OSError as error:
            raise SpecError(
                f"--trace {self.path}: {error.strerror or error}; name the file that `coordinator serve --trace` wrote"
            ) from error
