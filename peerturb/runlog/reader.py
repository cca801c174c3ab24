"""Reading a log file record by record, in bounded memory: at most one record at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from peerturb import limits
from peerturb.errors import LogError
from peerturb.ids import Position
from peerturb.protocol.records import Record
from peerturb.runlog import format
from peerturb.runlog.chain import ChainHash
from peerturb.wire.errors import WireError
from peerturb.wire.records import RecordDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record's bytes, CRC and chain checked."""

    position: Position
    offset: int
    """Byte offset of its frame in the file."""
    payload: bytes
    chain: bytes
    """Chain hash after it."""


class LogReader:
    """Iterates the whole records of an open file.

    After the iteration `torn_bytes` says how many bytes at the end belong to a record that was never written whole, and
    `end` where the last whole record ends.

    Raises (while iterating):
        LogError: damage before the end; the message names the file, the record and its byte offset.
    """

    def __init__(self, file: BinaryIO, *, source: str) -> None:
        self._file = file
        self._source = source
        self._chain = ChainHash()
        self.end = 0
        self.torn_bytes = 0

    @property
    def chain(self) -> bytes:
        """Chain hash after the records read so far."""
        return self._chain.value

    @property
    def position(self) -> Position:
        """Number of records read so far."""
        return self._chain.position

    def __iter__(self) -> Iterator[Entry]:
        if not self._read_header():
            return
        while True:
            entry = self._read_frame()
            if entry is None:
                return
            yield entry

    def _read_header(self) -> bool:
        """Return False if the file ends inside the header: nothing was ever written."""
        header = self._file.read(len(format.HEADER))
        if len(header) < len(format.HEADER) and format.HEADER.startswith(header):
            self.torn_bytes = len(header)
            return False
        try:
            format.check_header(header)
        except LogError as error:
            raise LogError(f"{self._source}: {error}") from None
        self.end = len(header)
        return True

    def _read_frame(self) -> Entry | None:
        prefix = self._file.read(format.PREFIX_BYTES)
        if len(prefix) < format.PREFIX_BYTES:
            self.torn_bytes = len(prefix)
            return None
        length, crc, chain = format.split_prefix(prefix)
        if not any(prefix):
            zeros = self._count_zeros()
            if zeros is not None:  # the file system made room for a record and lost power before writing it
                self.torn_bytes = len(prefix) + zeros
                return None
        if not 1 <= length <= limits.RECORD_BYTES_MAX:
            raise self._error(f"its length field says {length} bytes: it is damaged")
        payload = self._file.read(length)
        previous = self._chain.value
        if len(payload) < length:
            if format.true_length(payload, crc=crc, chain=chain, previous=previous) is not None:
                raise self._error(f"its length field says {length} bytes, more than the file has: it is damaged")
            self.torn_bytes = len(prefix) + len(payload)
            return None
        why = format.objection(payload, crc=crc, chain=chain, previous=previous)
        if why is not None:
            raise self._error(why)
        entry = Entry(position=self._chain.position, offset=self.end, payload=payload, chain=chain)
        self._chain.extend(payload)
        self.end += len(prefix) + length
        return entry

    def _count_zeros(self) -> int | None:
        """Read to the end; return how many bytes that was if all are zero."""
        count = 0
        while block := self._file.read(1 << 16):
            if any(block):
                return None
            count += len(block)
        return count

    def _error(self, why: str) -> LogError:
        return LogError(f"{self._source}: record {self._chain.position} at byte {self.end}: {why}")


@dataclass(slots=True, kw_only=True)
class LogEnd:
    """What reading a log found at its end."""

    records: int = 0
    chain: bytes = b""
    size: int = 0
    """Bytes up to the end of the last whole record."""
    torn_bytes: int = 0
    """Bytes after it that belong to a record that was not written whole."""


def read_entries(path: Path, end: LogEnd | None = None) -> Iterator[tuple[Entry, Record]]:
    """Yield every whole record with its place in the file; fill `end` when all are read.

    Raises:
        LogError: the file cannot be read, or is damaged before its end.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LogError(f"cannot read the log {path}: {error.strerror or error}") from error
    decoder = RecordDecoder()
    with file:
        reader = LogReader(file, source=str(path))
        for entry in reader:
            try:
                record = decoder.decode(entry.payload)
            except WireError as error:
                raise LogError(f"{path}: record {entry.position} at byte {entry.offset}: {error.why}") from error
            yield entry, record
        if end is not None:
            end.records, end.chain = reader.position, reader.chain
            end.size, end.torn_bytes = reader.end, reader.torn_bytes


def read_records(path: Path) -> Iterator[Record]:
    """Yield every whole record of a log; a torn tail is left out.

    Raises:
        LogError: the file cannot be read, or is damaged before its end.
    """
    return (record for _, record in read_entries(path))
