"""Full check of a log: bytes, chain, order of records, step sizes and scales. Weights are `replay`'s business."""

from dataclasses import dataclass
from pathlib import Path

from peerturb.errors import LogError
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.runlog.reader import LogEnd, read_entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A sound log."""

    ledger: Ledger
    chain: bytes
    """Chain hash of all its records: two logs are equal if this is."""
    size: int
    """Bytes of whole records, header included."""
    torn_bytes: int
    """Bytes at the end that belong to a record that was not written whole; not part of the log."""


def verify(path: Path) -> Verified:
    """Check a log from its first byte to its last.

    CRC and hash chain of every record; that records decode, in their one encoding; that each may follow those before it
    (slots, rounds, counts); step sizes and scales recomputed from the codes.

    Raises:
        LogError: names the first bad record, its byte offset and the rule it breaks.
    """
    ledger, end = Ledger(), LogEnd()
    for entry, record in read_entries(path, end):
        try:
            ledger.apply(record)
        except IllegalRecordError as error:
            raise LogError(f"{path}: byte {entry.offset}: {error}") from error
    if not end.records:
        raise LogError(f"{path}: the log is empty: it has no whole record")
    return Verified(ledger=ledger, chain=end.chain, size=end.size, torn_bytes=end.torn_bytes)
