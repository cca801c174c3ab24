"""Where the log commands read from: a .runlog file, a coordinator's SQLite folder, or a coordinator on the network."""

import asyncio
import math
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerturb.errors import LogError, SpecError
from peerturb.ids import short_hex
from peerturb.protocol.records import Evaluated, Record, RoundOpened, RoundSealed, RunStarted
from peerturb.runlog.chain import CHAIN_START, chain_after
from peerturb.runlog.fold import describe
from peerturb.runlog.reader import LogEnd, read_entries
from peerturb.runlog.writer import LogWriter
from peerturb.wire import WireError
from peerturb.wire.records import RecordDecoder
from peerturb_node.client import Address, head_and_chain, record_batches

DATABASE_FILE = "run.sqlite"
"""Name of the coordinator's log in its data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One of the three places; the payloads are the same bytes in each."""

    file: Path | None = None
    database: Path | None = None
    address: Address | None = None

    @classmethod
    def of(
        cls,
        log: Path | None,
        *,
        coordinator: str | None,
        token_file: Path | None,
        fingerprint: str,
        is_insecure: bool,
    ) -> "Source":
        """Tell from a command's arguments which it is.

        Raises:
            SpecError: none or two are named, or the token file cannot be read.
            LogError: there is no such file, or the folder holds no log.
        """
        if (log is None) == (coordinator is None):
            raise SpecError("name one log: a .runlog file or a coordinator's data folder, or --coordinator HOST:PORT")
        if coordinator is not None:
            token = ""
            if token_file is not None:
                try:
                    token = token_file.expanduser().read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError) as error:
                    raise SpecError(f"cannot read the token file {token_file}: {error}") from error
            return cls(address=Address.of(coordinator, insecure=is_insecure, fingerprint=fingerprint, token=token))
        assert log is not None
        path = log.expanduser()
        if path.is_dir():
            if not (path / DATABASE_FILE).is_file():
                raise LogError(f"the folder {path} holds no {DATABASE_FILE}: it is not a coordinator's data folder")
            return cls(database=path / DATABASE_FILE)
        if not path.exists():
            raise LogError(f"there is no log {path}")
        return cls(file=path)

    def payloads(self) -> Iterator[bytes]:
        """Yield every record's bytes.

        Raises:
            LogError: the log is damaged or cannot be read.
            UnreachableError, RefusedError: the coordinator does not give it.
        """
        if self.file is not None:
            end = LogEnd()
            for entry, _ in read_entries(self.file, end):
                yield entry.payload
            warn_of_torn_tail(self.file, end)
        elif self.database is not None:
            yield from _from_database(self.database)
        else:
            assert self.address is not None
            # Logs are small (a byte per gradient): one is held whole rather than run a loop on a second thread.
            yield from asyncio.run(_fetch(self.address))

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (position, record).

        Raises:
            LogError: see `payloads`; besides, a record that does not decode.
        """
        decoder = RecordDecoder()
        for position, payload in enumerate(self.payloads()):
            try:
                yield position, decoder.decode(payload)
            except WireError as error:
                raise LogError(f"record {position}: {error.why}") from error

    def write(self, path: Path) -> int:
        """Write the log as a .runlog file; return the number of records.

        Raises:
            LogError: the file exists or cannot be written, or the source is damaged.
        """
        if path.exists():
            raise LogError(f"{path} exists; choose another name or remove it")
        partial = path.with_name(path.name + ".partial")
        try:
            partial.unlink(missing_ok=True)
        except OSError as error:
            raise LogError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            with LogWriter.open(partial) as writer:
                for payload in self.payloads():
                    writer.append_payload(payload)
                count = writer.position
            partial.rename(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)  # half a log must not look like a whole one
        return count

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """Give the log as a file, fetching it into a temporary one where it is not."""
        if self.file is not None:
            yield self.file
            return
        with tempfile.TemporaryDirectory(prefix="peerturb-") as folder:
            path = Path(folder) / "run.runlog"
            self.write(path)
            yield path


def warn_of_torn_tail(path: Path, end: LogEnd) -> None:
    """Say on standard error that the log's last record was never written whole, if so."""
    if end.torn_bytes:
        text = f"{path}: the last {end.torn_bytes} bytes are a record not written whole; they are left out"
        print(text, file=sys.stderr)


def _from_database(path: Path) -> Iterator[bytes]:
    """Read a coordinator's table without disturbing a coordinator that has it open."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT position, chain, payload FROM record ORDER BY position")
            chain = CHAIN_START
            for expected, (position, written, payload) in enumerate(rows):
                if position != expected:
                    raise LogError(f"{path}: record {expected} is missing")
                chain = chain_after(chain, payload)
                if chain != written:
                    raise LogError(f"{path}: record {position} does not hash to the chain written with it")
                yield bytes(payload)
    except sqlite3.Error as error:
        raise LogError(f"cannot read the log in {path}: {error}") from error


async def _fetch(address: Address) -> list[bytes]:
    """Fetch what the coordinator has now, and compare it with the chain that it states.

    A file carries a chain hash with every record; what comes over the network has only this one to be held against.
    """
    head, stated = await head_and_chain(address)
    payloads = [payload async for batch in record_batches(address, last=head) for payload in batch]
    if len(payloads) != head:
        raise LogError(f"{address.target} sent {len(payloads)} of its {head} records")
    chain = CHAIN_START
    for payload in payloads:
        chain = chain_after(chain, payload)
    if chain != stated:
        raise LogError(
            f"the {head} records from {address.target} hash to chain {chain.hex()[:16]}, but it states "
            f"{stated.hex()[:16]}: its log is damaged; `peerturb log verify` on its data folder names the record"
        )
    return payloads


def rounds_between(records: Iterable[tuple[int, Record]], rounds: str | None) -> Iterator[tuple[int, Record]]:
    """Keep the records that belong to rounds A..B of "A:B" (both included); all without one.

    Raises:
        SpecError: not of that form.
    """
    if rounds is None:
        yield from records
        return
    first, mark, last = rounds.partition(":")
    try:
        low = int(first) if first else 0
        high = (int(last) if last else math.inf) if mark else low
    except ValueError as error:
        raise SpecError(f"--rounds {rounds!r} is not of the form A:B, for instance 10:20, 10: or :20") from error
    for position, record in records:
        if isinstance(record, (RoundOpened, RoundSealed, Evaluated)) and low <= record.round <= high:
            yield position, record


def record_row(position: int, record: Record) -> dict[str, Any]:
    """Return a record as a JSON object; codes only as their number."""
    row: dict[str, Any] = {"position": position, "kind": type(record).__name__, "text": describe(record)}
    if isinstance(record, RunStarted):
        row["spec"] = record.spec.model_dump(mode="json")
    if isinstance(record, (RoundOpened, RoundSealed, Evaluated)):
        row["round"] = record.round
    if isinstance(record, (RoundSealed, Evaluated)):
        row["loss"] = record.loss if math.isfinite(record.loss) else None
    if isinstance(record, RoundSealed):
        row |= {
            "alpha": record.alpha,
            "digest": short_hex(record.digest),
            "slots": list(record.slots),
            "counts": list(record.counts),
            "codes": len(record.codes),
        }
    if isinstance(record, Evaluated):
        row |= {"slot": record.slot, "accuracy": record.accuracy, "examples": record.examples}
    return row
