"""What tools take out of a log: its spec, its sealed rounds, its evaluations, one line per record."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import assert_never

from peerturb.errors import LogError
from peerturb.ids import short_hex
from peerturb.protocol.records import (
    Evaluated,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.runlog.reader import read_records
from peerturb.spec import RunSpec


def sealed_rounds(records: Iterable[Record]) -> Iterator[RoundSealed]:
    """Yield the records that change weights: what `peerturb.zo.replay.replay` needs."""
    return (record for record in records if isinstance(record, RoundSealed))


def read_spec(path: Path) -> RunSpec:
    """Return the RunSpec of a log.

    Raises:
        LogError: unreadable, damaged, or without a first record.
    """
    first = next(read_records(path), None)
    if not isinstance(first, RunStarted):
        raise LogError(f"{path}: the log does not begin with RunStarted")
    return first.spec


def describe(record: Record) -> str:
    """Say in one line what a record holds, for `peerturb log show`."""
    match record:
        case RunStarted(spec=spec):
            return f"run {spec.name} started, RunSpec {spec.digest.hex()[:16]}, model {spec.model.name}"
        case PeerJoined(slot=slot, key=key, name=name):
            return f"slot {slot} joined: {name} ({key.hex()[:16]})"
        case PeerLeft(slot=slot, reason=reason):
            return f"slot {slot} left: {reason.name.lower().replace('_', ' ')}"
        case RoundOpened(round=round_, scale=scale, deadline_ms=deadline_ms):
            return f"round {round_} opened, scale {scale:.6g}, deadline {deadline_ms} ms"
        case RoundSealed():
            loss = "no loss" if math.isnan(record.loss) else f"loss {record.loss:.6g}"
            slots = ", ".join(f"{slot}:{count}" for slot, count in zip(record.slots, record.counts, strict=True))
            return (
                f"round {record.round} sealed, {loss}, {len(record.codes)} codes (slot:codes {slots}), "
                f"alpha {record.alpha:.6g}, weights {short_hex(record.digest)}"
            )
        case Evaluated():
            accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.2%}"
            return (
                f"slot {record.slot} evaluated after {record.round} rounds: loss {record.loss:.6g}{accuracy} "
                f"({record.examples} examples)"
            )
        case RunFinished(rounds=rounds):
            return f"run finished after {rounds} rounds"
        case _:
            assert_never(record)
