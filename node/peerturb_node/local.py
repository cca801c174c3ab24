"""The local run log and what a node starts from: checkpoint + log tail, or the base weights + the whole log.

Nothing here can be lost for good: what is damaged is set aside, and the coordinator's feed brings it again.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from peerturb.errors import LogError, ModelError, PeerturbError
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.fold import sealed_rounds
from peerturb.runlog.reader import read_records
from peerturb.runlog.writer import LogWriter
from peerturb.spec import RunSpec
from peerturb_node.compute.base import Compute
from peerturb_node.events import Events
from peerturb_node.folder import log_path, set_aside


class LocalLog:
    """The local copy of the run log, open for appending; not synchronised at every record: a lost tail comes again.

    Raises:
        LogError: damaged before its end, not of this run, or not writable.
    """

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        self.path = log_path(folder)
        self.ledger = Ledger()
        self._sealed: list[RoundSealed] = []
        self._writer = LogWriter.open(self.path, on_record=self._fold)
        found = self.ledger.spec
        if found is not None and found.digest != spec.digest:
            self._writer.close()
            raise LogError(
                f"{self.path} is the log of run {found.name!r} (RunSpec {found.digest.hex()[:16]}), "
                f"not of {spec.name!r} ({spec.digest.hex()[:16]})"
            )

    def _fold(self, record: Record) -> None:
        self.ledger.apply(record)
        if isinstance(record, RoundSealed):
            self._sealed.append(record)

    @property
    def chain(self) -> bytes:
        """Chain hash at the end."""
        return self._writer.chain

    @property
    def position(self) -> int:
        """Number of records."""
        return self._writer.position

    @property
    def cut_bytes(self) -> int:
        """Bytes of a torn tail that opening cut off."""
        return self._writer.cut_bytes

    def take_tail(self, rounds: int) -> list[RoundSealed]:
        """Return the sealed rounds found at opening from number `rounds` on, and forget them."""
        tail, self._sealed = self._sealed[rounds:], []
        return tail

    def append(self, records: Sequence[Record]) -> None:
        """Write records at the end.

        Raises:
            LogError: the file cannot be written, for instance on a full disk.
        """
        for record in records:
            self._writer.append(record)

    def sync(self) -> None:
        """Wait until what is appended now is on the disk. May be called from any thread."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Synchronise and close."""
        self._writer.close()


def open_log(folder: Path, spec: RunSpec, events: Events) -> LocalLog:
    """Open the local log; set a damaged one aside and begin a new one."""
    try:
        log = LocalLog(folder, spec)
    except LogError as error:
        if not log_path(folder).exists():
            raise
        kept = set_aside(log_path(folder))
        events.emit(
            "notice",
            code="log_set_aside",
            text=f"the local log cannot be used ({error}); it is kept as {kept.name}, the coordinator sends it again",
        )
        return LocalLog(folder, spec)
    if log.cut_bytes:
        events.emit(
            "notice",
            code="torn_tail",
            text=f"the local log ended in {log.cut_bytes} bytes of a record that was not written whole; they are cut",
        )
    return log


def restore(folder: Path, log: LocalLog, compute: Compute, events: Events) -> list[RoundSealed]:
    """Load the checkpoint if there is a usable one; return the sealed rounds of the log that the weights lack."""
    path = folder / compute.checkpoint_name
    sealed = log.ledger.sealed_rounds
    rounds = 0
    try:
        if path.exists():
            rounds = compute.restore(path)
            if rounds > sealed:
                raise ModelError(f"it is of round {rounds}, the local log has only {sealed}")
    except PeerturbError as error:
        kept = set_aside(path)
        compute.reset()
        rounds = 0
        events.emit(
            "notice",
            code="checkpoint_set_aside",
            text=f"the checkpoint cannot be used ({error}); it is kept as {kept.name}, "
            "the weights are rebuilt from base weights and log",
        )
    if sealed:
        events.emit("restored", round=sealed, position=log.ledger.position, checkpoint=rounds)
    return log.take_tail(rounds)


def replay_into(path: Path, compute: Compute) -> None:
    """Apply every sealed round of a log to base weights."""
    for sealed in sealed_rounds(read_records(path)):
        compute.apply(sealed)
