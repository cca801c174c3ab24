"""The one loop around a machine, shared by the services, the tests and the simulator.

A machine decides, its shell does. `drive` hands out what is to be done, in order, and applies records once they are
persisted. Records that stand next to each other come as one `Persist`: one transaction.

    async with lock:                                    # one owner: nobody else may touch the machine meanwhile
        for effect in drive(machine, machine.receive(session, message, now_ms), now_ms):
            match effect:
                case Persist(records=records):
                    await store.append(records)         # an exception ends the loop here: nothing has changed
                case Send() | Reject() | Notice():
                    ...

Resuming the generator after a `Persist` says that its records are durable. If the store fails, let the exception end
the loop: the machine has not changed and decides the same again at the next `advance` (wait a moment before it).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

from peerturb.protocol.outputs import Append
from peerturb.protocol.records import Record

Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)


class Machine(Protocol[Output_co]):
    """What the loop needs of a machine."""

    def advance(self, now_ms: int) -> Sequence[Output_co]:
        """Decide what is to be done now; empty when there is nothing."""

    def apply(self, record: Record) -> None:
        """Take in a persisted record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make these records durable, all or none."""

    records: tuple[Record, ...]


def drive(machine: Machine[Output], outputs: Sequence[Output], now_ms: int) -> Iterator[Output | Persist]:
    """Yield what is to be done for `outputs` and for everything the machine decides after them, until it is content.

    Args:
        machine: a `CoordinatorMachine` or a `PeerMachine`.
        outputs: what `receive`, `completed`, ... has just returned; empty to only let time pass.
        now_ms: the machine's time.
    """
    while True:
        for is_append, group in groupby(outputs, key=lambda output: isinstance(output, Append)):
            if not is_append:
                yield from group
                continue
            records = tuple(output.record for output in group if isinstance(output, Append))
            yield Persist(records=records)
            for record in records:
                machine.apply(record)
        outputs = machine.advance(now_ms)
        if not outputs:
            return
