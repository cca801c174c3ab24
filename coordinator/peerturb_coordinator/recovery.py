"""A machine from a store: start-up and restart are one path, the fold of the log.

It knows the order of records as bytes; what they mean is the machine's affair.
"""

from collections.abc import Callable

from peerturb import limits
from peerturb.errors import LogError
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.ledger import IllegalRecordError
from peerturb.protocol.records import Record, RunStarted
from peerturb.spec import RunSpec
from peerturb.wire.errors import WireError
from peerturb.wire.records import RecordDecoder
from peerturb_coordinator.store import LogStore, read_all


def recover(
    spec: RunSpec, store: LogStore, *, hear: Callable[[Record], None] = lambda record: None
) -> CoordinatorMachine:
    """Return the machine that has folded the store's log; a new one for an empty store.

    Args:
        spec: the run's.
        store: its log.
        hear: is told every record before the machine folds it.

    Raises:
        LogError: the log is another RunSpec's (the message has both digests), or a record is damaged or out of place.
    """
    machine = CoordinatorMachine(spec)
    decoder = RecordDecoder()
    for position, payload in enumerate(read_all(store, limits.RECORD_BATCH_BYTES)):
        try:
            record = decoder.decode(payload)
            if isinstance(record, RunStarted) and record.spec.digest != spec.digest:
                raise LogError(
                    f"the data folder holds the run {record.spec.name!r}, RunSpec digest {record.spec.digest.hex()}; "
                    f"given is {spec.name!r}, digest {spec.digest.hex()}. A RunSpec cannot change during a run: "
                    "give the one the run began with, or choose another --data-dir"
                )
            hear(record)
            machine.apply(record)
        except (WireError, IllegalRecordError) as error:
            raise LogError(f"record {position} of the log cannot be taken in: {error}") from error
    return machine
