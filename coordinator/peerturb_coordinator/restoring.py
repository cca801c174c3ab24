"""A coordinator's data folder from a run log: the backup, or what a peer has kept.

Every peer keeps the whole log, so the newest copy of a run often lies with one of them. It knows files and the order of
records, nothing of networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from peerturb.errors import LogError
from peerturb.ids import Position
from peerturb.runlog.reader import read_entries
from peerturb.runlog.verify import Verified, verify
from peerturb_coordinator.store import DATABASE_FILE, Entry, SqliteLogStore, StoreFault

_BATCH = 4096
"""Records of one transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A data folder that was made."""

    log: Path
    """The log it was made from: the longest."""
    verified: Verified


def restore(logs: Sequence[Path], folder: Path) -> Restored:
    """Make a coordinator's data folder from the longest of some logs of one run.

    The folder appears whole or not at all.

    Args:
        logs: .runlog files; every other one must be a beginning of the longest.
        folder: must not hold a run yet.

    Raises:
        LogError: a log is damaged, they are not of one run, the folder is in use, or it cannot be written.
    """
    if not logs:
        raise LogError("name at least one .runlog file to restore from")
    found = {path: verify(path) for path in logs}
    longest = max(logs, key=lambda path: found[path].ledger.position)
    _check_beginnings(found, longest)
    _check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as name:
            draft = Path(name) / folder.name
            _fill(draft, longest, found[longest])
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
    except (OSError, StoreFault) as error:
        raise LogError(f"cannot write the data folder {folder}: {error}") from error
    return Restored(log=longest, verified=found[longest])


def _check_beginnings(found: dict[Path, Verified], longest: Path) -> None:
    """Compare the end of every log with the longest one there."""
    ends: dict[Position, list[Path]] = {}
    for path, verified in found.items():
        ends.setdefault(verified.ledger.position, []).append(path)
    for entry, _ in read_entries(longest):
        for path in ends.get(Position(entry.position + 1), ()):
            if found[path].chain != entry.chain:
                raise LogError(
                    f"{path} and {longest} part within their first {entry.position + 1} records: they are logs of "
                    f"different runs. `peerturb sim compare {path} {longest}` says where; restore from one of them"
                )


def _check_free(folder: Path) -> None:
    if (folder / DATABASE_FILE).exists():
        raise LogError(f"{folder} holds a run already; move it away, or choose another --data-dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LogError(f"{folder} exists and is not an empty folder; choose another --data-dir")


def _fill(folder: Path, log: Path, verified: Verified) -> None:
    """Write all records of a log into a new store.

    Raises:
        LogError: the log changed since it was verified, or the medium refuses.
    """
    store = SqliteLogStore(folder)
    try:
        entries = (Entry.of(record, entry.payload) for entry, record in read_entries(log))
        while batch := list(islice(entries, _BATCH)):
            store.append(batch)
        if (store.head, store.chain) != (verified.ledger.position, verified.chain):
            raise LogError(f"{log} changed while it was read; take a copy that nobody writes to, and restore from that")
    finally:
        store.close()
