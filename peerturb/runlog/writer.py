"""Appending to a log file. A record is in the file whole or not at all, as far as the disk keeps its word."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from peerturb.errors import LogError
from peerturb.ids import Position
from peerturb.protocol.records import Record
from peerturb.runlog import format
from peerturb.runlog.chain import ChainHash
from peerturb.runlog.reader import LogEnd, read_entries
from peerturb.wire.records import encode_record


class LogWriter:
    """Owns a log file opened for appending. Only one writer may have a file open."""

    def __init__(self, path: Path, *, chain: ChainHash, size: int, cut_bytes: int, syncs: bool) -> None:
        """Use `open`."""
        self.path = path
        self.cut_bytes = cut_bytes
        """Bytes of a torn tail that opening cut off; tell the user if it is not zero."""
        self._syncs = syncs
        self._chain = chain
        self._size = size
        try:
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(size)
            self._file.seek(size)
            if not size:
                self._write(format.HEADER)
        except OSError as error:
            raise LogError(f"cannot write the log {path}: {error.strerror or error}") from error

    @classmethod
    def open(cls, path: Path, *, syncs: bool = False, on_record: Callable[[Record], None] | None = None) -> Self:
        """Open or create a log; check what is there, cut a torn tail.

        Args:
            path: the file; its folder must exist.
            syncs: whether every append waits for the disk (fsync).
            on_record: called with every record found, in order: for instance `ledger.apply`.

        Raises:
            LogError: unreadable, unwritable, or damaged before its end.
        """
        end = LogEnd()
        if path.exists():
            for _, record in read_entries(path, end):
                if on_record is not None:
                    on_record(record)
        else:
            try:
                path.touch()
            except OSError as error:
                raise LogError(f"cannot create the log {path}: {error.strerror or error}") from error
        chain = ChainHash(end.chain, end.records) if end.records else ChainHash()
        return cls(path, chain=chain, size=end.size, cut_bytes=end.torn_bytes, syncs=syncs)

    @property
    def chain(self) -> bytes:
        """Chain hash after the last record: what a Hello carries."""
        return self._chain.value

    @property
    def position(self) -> Position:
        """Number of records in the file."""
        return self._chain.position

    def append(self, record: Record) -> None:
        """Append one record.

        Raises:
            LogError: the file could not be written, for instance on a full disk; it is as it was before.
        """
        self.append_payload(encode_record(record))

    def append_payload(self, payload: bytes) -> None:
        """Append one record given as its bytes; see `append`."""
        chain = ChainHash(self._chain.value, self._chain.position)
        data = format.frame(payload, chain.extend(payload))
        try:
            self._write(data)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)
                self._file.seek(self._size)
            raise LogError(f"cannot write the log {self.path}: {error.strerror or error}") from error
        self._chain = chain

    def close(self) -> None:
        """Make everything durable and close the file; closing twice is harmless."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        """Write all of it; `_size` grows only when all is written."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        if self._syncs:
            os.fsync(self._file.fileno())
        self._size += len(data)


def write_log(path: Path, payloads: list[bytes] | tuple[bytes, ...]) -> None:
    """Write a new log file of these records' bytes.

    Raises:
        LogError: the file exists or cannot be written.
    """
    if path.exists():
        raise LogError(f"{path} exists; choose another name or remove it")
    with LogWriter.open(path) as writer:
        for payload in payloads:
            writer.append_payload(payload)
