"""The coordinator's disk: a file in the real log format, and what a crash in the middle of a write leaves of it."""

from collections.abc import Sequence
from pathlib import Path

from peerturb.protocol.records import Record
from peerturb.runlog import format
from peerturb_sim.log import SharedLog, frame_bytes, read_whole


class DiskFullError(Exception):
    """The store refuses for now; nothing was written."""


class TornWriteError(Exception):
    """The machine lost power while it wrote; what follows a part of the records is not there."""


class Disk:
    """Appends records to a log file, all or none unless power is lost.

    The file is open only while it is written: a world may end anywhere.
    """

    def __init__(self, path: Path, log: SharedLog) -> None:
        """Begin a new log file; an old one there is replaced."""
        self.path = path
        self.refuses = False
        self.tear_at: float | None = None
        """Part (0..1) of the next write after which power is lost; None for a whole write."""
        self._log = log
        path.write_bytes(format.HEADER)

    def append(self, records: Sequence[Record]) -> None:
        """Make records durable in one transaction.

        Raises:
            DiskFullError: not now.
            TornWriteError: power was lost meanwhile.
        """
        if self.refuses:
            raise DiskFullError
        payloads, frames = frame_bytes(records, self._log.chains[-1])
        data = b"".join(frames)
        if self.tear_at is not None:
            self._write(data[: int(len(data) * self.tear_at)])
            self.tear_at = None
            raise TornWriteError
        self._write(data)
        for payload in payloads:
            self._log.append(payload)

    def recover(self) -> int:
        """Read the file as after a restart, cut what was not written whole; return the number of records left.

        Raises:
            LogError: damaged before its end.
        """
        data = self.path.read_bytes()
        payloads, end = read_whole(data, source=str(self.path))
        self.path.write_bytes(data[: max(end, len(format.HEADER))])
        kept = min(len(payloads), len(self._log.payloads))
        assert payloads[:kept] == self._log.payloads[:kept], "the file holds other records than were written"
        self._log.truncate(kept)
        for payload in payloads[kept:]:  # whole before the power went, though the coordinator never learnt of it
            self._log.append(payload)
        return len(payloads)

    def _write(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(data)
