"""Where the run log lies: one interface, in memory or in an SQLite file. A record that `append` took is never lost.

It orders and keeps bytes. It knows what a record's bytes hash to, not what they mean.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from peerturb.errors import LogError
from peerturb.ids import Position
from peerturb.runlog.chain import CHAIN_START, chain_after

SCHEMA_VERSION = 1
APPLICATION_ID = 0x70747262
"""Marks the file as ours in SQLite's header: "ptrb"."""
DATABASE_FILE = "run.sqlite"
LOCK_FILE = "run.lock"

_SCHEMA = """
CREATE TABLE record (
    position INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    round INTEGER,
    chain BLOB NOT NULL,
    payload BLOB NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record on its way into the log."""

    kind: str
    """Name of the record's class; for people who look into the table."""
    round: int | None
    payload: bytes
    """Encoded record: what the chain covers."""

    @classmethod
    def of(cls, record: object, payload: bytes) -> "Entry":
        """Return a record's entry: its class and round beside its bytes."""
        return cls(kind=type(record).__name__, round=getattr(record, "round", None), payload=payload)


class StoreFault(Exception):
    """The store cannot write now; nothing of the batch was kept. Trying again later is right."""


class LogStore(Protocol):
    """An append-only, hash-chained list of records. One writer; `read` may be called from another thread."""

    @property
    def head(self) -> Position:
        """Number of records."""

    @property
    def chain(self) -> bytes:
        """Chain hash at the head, 32 bytes."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Add all entries or none; they are durable when this returns.

        Raises:
            StoreFault: the medium refuses, for instance a full disk.
        """

    def read(self, first: Position, bytes_max: int) -> list[bytes]:
        """Return payloads from `first` on, ending with the one that passes `bytes_max`; empty at the head.

        Raises:
            LogError: `first` lies beyond the head, or the medium is damaged.
        """

    def chain_at(self, position: Position) -> bytes | None:
        """Return the chain hash of the first `position` records, None beyond the head."""

    def close(self) -> None:
        """Release the medium. Calling it twice is harmless."""


class MemoryLogStore:
    """A log that ends with the process; for tests and simulations."""

    def __init__(self) -> None:
        """Start empty."""
        self._payloads: list[bytes] = []
        self._chains = [CHAIN_START]

    @property
    def head(self) -> Position:
        """Number of records."""
        return Position(len(self._payloads))

    @property
    def chain(self) -> bytes:
        """Chain hash at the head, 32 bytes."""
        return self._chains[-1]

    def append(self, entries: Sequence[Entry]) -> None:
        """Add all entries."""
        for entry in entries:
            self._chains.append(chain_after(self._chains[-1], entry.payload))
            self._payloads.append(entry.payload)

    def read(self, first: Position, bytes_max: int) -> list[bytes]:
        """Return payloads from `first` on, ending with the one that passes `bytes_max`."""
        _check_first(first, self.head)
        return _until(iter(self._payloads[first:]), bytes_max)

    def chain_at(self, position: Position) -> bytes | None:
        """Return the chain hash of the first `position` records, None beyond the head."""
        return self._chains[position] if 0 <= position < len(self._chains) else None

    def close(self) -> None:
        """Do nothing."""


class SqliteLogStore:
    """A log in one SQLite file: write-ahead journal, full synchronisation at every commit, one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the log in `folder`, or begin one there.

        Raises:
            LogError: another coordinator has it open, it is not a log of this version, or its end is damaged.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = _locked(folder)
        except OSError as error:
            raise LogError(f"cannot use the data folder {folder}: {error.strerror or error}") from error
        self.path = folder / DATABASE_FILE
        try:
            self._writer = _connect(self.path)
            self._reader = _connect(self.path)
            self._reading = threading.Lock()
            self._prepare()
            self._head, self._chain = self._check_tail()
        except sqlite3.Error as error:
            self._lock.close()
            raise LogError(f"{self.path} cannot be opened as a run log: {error}") from error
        except LogError:
            self._lock.close()
            raise

    @property
    def head(self) -> Position:
        """Number of records."""
        return self._head

    @property
    def chain(self) -> bytes:
        """Chain hash at the head, 32 bytes."""
        return self._chain

    def append(self, entries: Sequence[Entry]) -> None:
        """Add all entries in one transaction.

        Raises:
            StoreFault: the disk is full or fails; nothing was kept.
        """
        rows = []
        chain = self._chain
        for position, entry in enumerate(entries, start=self._head):
            chain = chain_after(chain, entry.payload)
            rows.append((position, entry.kind, entry.round, chain, entry.payload))
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            self._writer.executemany("INSERT INTO record VALUES (?, ?, ?, ?, ?)", rows)
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            self._abandon()
            raise StoreFault(f"cannot write {self.path}: {error}") from error
        except BaseException:
            self._abandon()
            raise
        self._head = Position(self._head + len(rows))
        self._chain = chain

    def read(self, first: Position, bytes_max: int) -> list[bytes]:
        """Return payloads from `first` on, ending with the one that passes `bytes_max`.

        Raises:
            LogError: `first` lies beyond the head, or the file is damaged.
        """
        _check_first(first, self.head)
        with self._reading:
            try:
                cursor = self._reader.execute(
                    "SELECT payload FROM record WHERE position >= ? ORDER BY position", (first,)
                )
                found = _until((row[0] for row in cursor), bytes_max)
                cursor.close()
            except sqlite3.Error as error:
                raise LogError(f"cannot read {self.path} at record {first}: {error}") from error
        return found

    def chain_at(self, position: Position) -> bytes | None:
        """Return the chain hash of the first `position` records, None beyond the head."""
        if position == 0:
            return CHAIN_START
        if not 0 < position <= self._head:
            return None
        with self._reading:
            row = self._reader.execute("SELECT chain FROM record WHERE position = ?", (position - 1,)).fetchone()
        return bytes(row[0])

    def close(self) -> None:
        """Fold the journal into the file and let the next process in."""
        self._reader.close()
        self._writer.close()
        self._lock.close()

    def _abandon(self) -> None:
        """Leave a transaction that failed; SQLite may have left it already."""
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except sqlite3.Error:
            # The connection's memory of the file may be stale after an I/O error: begin anew.
            self._writer.close()
            self._writer = _connect(self.path)

    def _prepare(self) -> None:
        """Create the table in a new file, or make sure that an old one is ours."""
        (application,) = self._writer.execute("PRAGMA application_id").fetchone()
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        (tables,) = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            self._writer.execute("BEGIN IMMEDIATE")
            self._writer.execute(_SCHEMA)
            self._writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._writer.execute("COMMIT")
        elif application != APPLICATION_ID:
            raise LogError(f"{self.path} is an SQLite file of another program")
        elif version != SCHEMA_VERSION:
            raise LogError(f"{self.path} has schema version {version}, this program writes version {SCHEMA_VERSION}")

    def _check_tail(self) -> tuple[Position, bytes]:
        """Return head and chain after recomputing the chain of the last records."""
        (count, last) = self._writer.execute("SELECT count(*), max(position) FROM record").fetchone()
        if count == 0:
            return Position(0), CHAIN_START
        if last != count - 1:
            raise LogError(f"{self.path} is damaged: it has {count} records, the last one numbered {last}")
        chain = CHAIN_START
        # All of it: a damaged record must never be served, and hashing is quicker than the fold that follows.
        for position, written, payload in self._writer.execute(
            "SELECT position, chain, payload FROM record ORDER BY position"
        ):
            chain = chain_after(chain, payload)
            if chain != written:
                raise LogError(
                    f"{self.path} is damaged: record {position} does not hash to the chain written with it; "
                    "restore the file from a copy, or rebuild the log from a peer's"
                )
        return Position(count), chain


def read_all(store: LogStore, bytes_max: int) -> Iterator[bytes]:
    """Yield every payload of the log in order, a batch of about `bytes_max` in memory at a time."""
    position = 0
    while position < store.head:
        batch = store.read(Position(position), bytes_max)
        yield from batch
        position += len(batch)


def _connect(path: Path) -> sqlite3.Connection:
    # No implicit transactions; the writer moves between threads, one at a time.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # FULL: the journal is synchronised at every commit, not at checkpoints only.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -512")
    return connection


def _locked(folder: Path) -> IO[str]:
    """Take the folder's lock, which the system releases when the process dies.

    A file of its own: closing any descriptor of an SQLite file would drop SQLite's locks on it.
    """
    path = folder / LOCK_FILE
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise LogError(
            f"{folder} is in use by another coordinator (process {holder}); stop it, or choose another --data-dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _check_first(first: int, head: int) -> None:
    if not 0 <= first <= head:
        raise LogError(f"the log has {head} records, so nothing can be read from record {first}")


def _until(payloads: Iterator[bytes], bytes_max: int) -> list[bytes]:
    """Take payloads up to and including the one that passes `bytes_max`."""
    taken: list[bytes] = []
    size = 0
    for payload in payloads:
        taken.append(payload)
        size += len(payload)
        if size >= bytes_max:
            break
    return taken
