"""One log for a whole world: bytes, chain and fold are kept once, and thousands of peers stand at positions in it.

A peer's local log is a beginning of the coordinator's, or something is badly wrong; `SharedLedger` checks just that,
record by record, and stands where a fold of the peer's own would.
"""

import io
from bisect import bisect_left
from collections.abc import Sequence

from peerturb.ids import Position
from peerturb.protocol.ledger import IllegalRecordError, Ledger
from peerturb.protocol.records import PeerJoined, PeerLeft, Record, RoundOpened, RoundSealed
from peerturb.runlog import format
from peerturb.runlog.chain import CHAIN_START, chain_after
from peerturb.runlog.reader import LogReader
from peerturb.spec import RunSpec
from peerturb.wire.messages import encode_payloads
from peerturb.wire.records import RecordDecoder, encode_record

_State = tuple[RunSpec | None, RoundOpened | None, int, bool]

MEMBERSHIP = (PeerJoined, PeerLeft)


class SharedLog:
    """What the coordinator has written, and the fold of what it has announced.

    Attributes:
        payloads: bytes of every record on disk.
        chains: chain hash before record 0, 1, ... and after the last one.
        records: the announced ones, decoded from their bytes once.
        sealed: the sealed rounds among them, by their numbers.
        ledger: fold of `records`, by the production rules.
    """

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.chains = [CHAIN_START]
        self.records: list[Record] = []
        self.sealed: list[RoundSealed] = []
        self.ledger = Ledger()
        self._decoder = RecordDecoder()
        self._states: list[_State] = [(None, None, 0, False)]
        self._others: list[int] = []
        """Positions of records that are neither joins nor leaves."""
        self._ends = [0]
        """Bytes of the stream messages that carry the first records."""

    def append(self, payload: bytes) -> None:
        """Take in a record that is on disk."""
        self.payloads.append(payload)
        self.chains.append(chain_after(self.chains[-1], payload))

    def truncate(self, position: int) -> None:
        """Forget what a crash took; nothing announced can be."""
        assert position >= len(self.records), "an announced record is lost"
        del self.payloads[position:]
        del self.chains[position + 1 :]

    def announce(self) -> Sequence[Record]:
        """Decode and fold the records that are new on disk, and return them: peers may see them from now on.

        Raises:
            IllegalRecordError, WireError: the coordinator wrote what no peer would accept.
        """
        first = len(self.records)
        for payload in self.payloads[first:]:
            record = self._decoder.decode(payload)
            self.ledger.apply(record)
            self.records.append(record)
            if not isinstance(record, MEMBERSHIP):
                self._others.append(len(self.records) - 1)
            if isinstance(record, RoundSealed):
                self.sealed.append(record)
            ledger = self.ledger
            self._states.append((ledger.spec, ledger.open, ledger.sealed_rounds, ledger.is_finished))
            # A message with several records is the concatenation of messages with one each.
            self._ends.append(self._ends[-1] + len(encode_payloads([payload]).SerializeToString()))
        return self.records[first:]

    def message_bytes(self, first: int, last: int) -> int:
        """Return the length of the stream message that carries records first..last - 1."""
        return self._ends[last] - self._ends[first]

    def batch_end(self, first: int, bytes_max: int) -> int:
        """Return where a message from `first` ends: after the record that passes `bytes_max`, or at the head."""
        last = bisect_left(self._ends, self._ends[first] + bytes_max, lo=first + 1)
        return min(last, len(self.records))

    def after_membership(self, first: int, last: int) -> int:
        """Return the first position of first..last - 1 that holds no join or leave; `last` if all do."""
        index = bisect_left(self._others, first)
        return min(self._others[index], last) if index < len(self._others) else last

    def state(self, position: int) -> _State:
        """Return what peers look up: RunSpec, open round, sealed rounds, whether the run is finished."""
        return self._states[position]


class SharedLedger(Ledger):
    """A peer's position in the shared log, in the shape of a fold of its own."""

    __slots__ = ("_log",)

    def __init__(self, log: SharedLog, position: int) -> None:
        shared = log.ledger
        super().__init__(members=shared.members, slot_of=shared.slot_of, plateau=shared.plateau, trend=shared.trend)
        self._log = log
        self.stand(position)

    def objection(self, record: Record) -> str | None:
        """Say why the record may not come next: it is another than the coordinator announced."""
        records, position = self._log.records, self.position
        if position < len(records) and (record is records[position] or record == records[position]):
            return None
        return "is not the one that the coordinator announced"

    def apply(self, record: Record) -> None:
        """Take in the next record.

        Raises:
            IllegalRecordError: it is another; nothing has changed.
        """
        why = self.objection(record)
        if why is not None:
            raise IllegalRecordError(f"record {self.position} ({type(record).__name__}) {why}")
        self.stand(self.position + 1)

    def stand(self, position: int) -> None:
        """Stand at a position, as after taking in everything before it."""
        self.position = Position(position)
        self.spec, self.open, self.sealed_rounds, self.is_finished = self._log.state(position)


def read_whole(data: bytes, *, source: str) -> tuple[list[bytes], int]:
    """Return the records of a log file's bytes and where the last whole one ends: what a restart finds.

    Raises:
        LogError: damaged before its end.
    """
    reader = LogReader(io.BytesIO(data), source=source)
    payloads = [entry.payload for entry in reader]
    return payloads, reader.end


def frame_bytes(records: Sequence[Record], chain: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return payloads and file frames of records that follow a log whose chain hash is `chain`."""
    payloads = [encode_record(record) for record in records]
    frames = []
    for payload in payloads:
        chain = chain_after(chain, payload)
        frames.append(format.frame(payload, chain))
    return payloads, frames
