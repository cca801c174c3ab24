"""Writes the membership trace, if one is wanted: what the machine is told, before anything that follows is in the log.

It never stops a run: a file that cannot be written ends the trace with one warning. What changed nothing is not
written, so idle time and strangers take no room.
"""

import fcntl
import os
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from peerturb.errors import SpecError
from peerturb.protocol.messages import Contribution, Disconnected, Evaluation, FromPeer, Hello, Leave, Proof
from peerturb.protocol.outputs import SessionId
from peerturb.spec import RunSpec
from peerturb_coordinator import trace_format as lines
from peerturb_coordinator.events import Events

TRACE_BYTES_MAX = 2**32
"""A contribution takes 80 bytes: fifty million of them."""


class Trace:
    """The trace of one process; does nothing if no file is given.

    Use: note an input, `write` before each attempt to write to the log (`refused` where that failed), `settle` when
    the machine is content.
    """

    def __init__(
        self,
        path: Path | None,
        spec: RunSpec,
        events: Events,
        *,
        records: int,
        bytes_max: int = TRACE_BYTES_MAX,
    ) -> None:
        """Begin the file, or go on with it.

        Args:
            path: the file; None: no trace.
            spec: the run's.
            events: for the warning that it ends.
            records: of the log as it is now.
            bytes_max: size at which the trace ends.

        Raises:
            SpecError: the file cannot be used, or is another run's.
        """
        self._events = events
        self._bytes_max = bytes_max
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = 0
        self._noted: bytes | None = None
        self._must_write = False
        self._greeted: set[SessionId] = set()
        """Sessions the machine may know."""
        if path is not None:
            try:
                self._open(path, spec, records)
            except BaseException:
                self.close()
                raise

    # --- inputs -----------------------------------------------------------------------------------------------------

    def started(self, now_ms: int, *, records: int) -> None:
        """The machine begins, with a log of so many records."""
        self._note(lines.Start(now_ms=now_ms, records=records), must_write=True)
        self.write()

    def heard(self, now_ms: int, session: SessionId, message: FromPeer | Disconnected) -> None:
        """A message came."""
        is_known = session in self._greeted
        if isinstance(message, Hello):
            self._greeted.add(session)
            is_known = True
        elif isinstance(message, Disconnected):
            self._greeted.discard(session)
        if self._file is not None:
            self._note(_line(now_ms, session, message), must_write=is_known)

    def ticked(self, now_ms: int) -> None:
        """Time has passed."""
        if self._file is not None:
            self._note(lines.Tick(now_ms=now_ms), must_write=False)

    # --- what came of them ------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write the noted input, if that has not been done."""
        if self._noted is not None:
            noted, self._noted = self._noted, None
            self._put(noted)
            self._must_write = True

    def refused(self, *, records: int) -> None:
        """The log could not be written; it has so many records."""
        if self._must_write:
            self.write()
            self._put(lines.encode(lines.Refused(records=records)))

    def settle(self) -> None:
        """The machine is content: write the input if it may have changed what the machine knows."""
        if self._must_write:
            self.write()
        self._noted, self._must_write = None, False

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- the file ---------------------------------------------------------------------------------------------------

    def _open(self, path: Path, spec: RunSpec, records: int) -> None:
        header = lines.encode(lines.Header(spec=spec.digest.hex()))
        try:
            self._file = file = path.open("a+b", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            first = file.readline(lines.LINE_BYTES_MAX)
            is_new = header.startswith(first) and first != header  # empty, or killed while it was begun
            if is_new:
                file.truncate(0)
            else:
                self._check(path, first, spec)
                self._size, cut_bytes = _cut_tail(file)
        except BlockingIOError:
            raise SpecError(f"--trace {path}: another coordinator writes it; name another file") from None
        except OSError as error:
            raise SpecError(f"--trace {path}: {error.strerror or error}; name a file that can be written to") from error
        if is_new:
            self._put(header)
            if records:
                text = (
                    f"the log has {records} records already: a run can be reproduced only with a trace from its start"
                )
                self._events.warning("trace_begins_late", file=str(path), text=text)
            return
        if not records and self._size > len(header):
            raise SpecError(
                f"--trace {path}: it is of an earlier run of the same RunSpec, this run's log is empty; "
                "name another file, or move it away"
            )
        if cut_bytes:
            text = f"its last line was not written whole; {cut_bytes} bytes are cut"
            self._events.info("trace_torn_tail", file=str(path), text=text)

    def _check(self, path: Path, first: bytes, spec: RunSpec) -> None:
        try:
            header = lines.decode_header(first)
        except lines.TraceFormatError as error:
            raise SpecError(f"--trace {path}:1: {error}; name another file") from error
        if header.spec != spec.digest.hex():
            raise SpecError(
                f"--trace {path}: it is of the run with RunSpec digest {header.spec[:16]}, "
                f"this run's is {spec.digest.hex()[:16]}; name another file"
            )

    def _note(self, line: BaseModel, *, must_write: bool) -> None:
        self._noted, self._must_write = lines.encode(line), must_write

    def _put(self, data: bytes) -> None:
        """Append a line; the trace ends where that fails."""
        file = self._file
        if file is None:
            return
        why = f"it has reached {self._bytes_max} bytes"
        try:
            if self._size + len(data) <= self._bytes_max:
                if file.write(data) == len(data):
                    self._size += len(data)
                    return
                file.truncate(self._size)
                why = "the disk took a part of a line only"
        except OSError as error:
            why = error.strerror or str(error)
        self.close()
        text = "the run goes on, but cannot be reproduced beyond this point"
        self._events.warning("trace_ended", file=str(self._path), why=why, text=text)


def _cut_tail(file: IO[bytes]) -> tuple[int, int]:
    """Cut what follows the last whole line; return the size that is left and what was cut."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - lines.LINE_BYTES_MAX)
    file.seek(start)
    whole = start + file.read(size - start).rfind(b"\n") + 1
    file.truncate(whole)
    return whole, size - whole


def _line(now_ms: int, session: SessionId, message: FromPeer | Disconnected) -> BaseModel:
    """Return what the trace says of a message."""
    match message:
        case Hello():
            return lines.HelloLine(
                now_ms=now_ms, session=session, key=message.key.hex(), name=message.name, protocol=message.protocol,
                spec=message.spec_digest.hex(), base=message.base_digest.hex(),
                manifest=message.manifest_digest.hex(), position=message.position,
            )  # fmt: skip
        case Contribution():
            return lines.ContributionLine(
                now_ms=now_ms, session=session, round=message.round, count=len(message.codes), exact=message.is_exact
            )
        case Evaluation():
            return lines.EvaluationLine(now_ms=now_ms, session=session, round=message.round)
        case Leave():
            return lines.SessionLine(now_ms=now_ms, do="leave", session=session)
        case Proof():
            return lines.SessionLine(now_ms=now_ms, do="proof", session=session)
        case Disconnected():
            return lines.SessionLine(now_ms=now_ms, do="disconnected", session=session)
