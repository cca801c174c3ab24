"""Log records <-> bytes. The bytes are what the hash chain covers, so every record has exactly one encoding."""

from typing import assert_never

from google.protobuf.message import DecodeError

from peerturb import limits
from peerturb.errors import RejectCode, SpecError
from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.ledger import shape_objection
from peerturb.protocol.records import (
    Evaluated,
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.spec import RunSpec
from peerturb.wire import checks
from peerturb.wire.errors import WireError
from peerturb.wire.v1 import record_pb2 as pb


def encode_record(record: Record) -> bytes:
    """Return the record's bytes. `decode_record(encode_record(r), sealed_rounds=...) == r`."""
    message = pb.Record()
    match record:
        case RoundSealed(counts=counts):
            message.alpha, message.loss, message.digest = record.alpha, record.loss, record.digest
            bits = _slot_bits(record.slots)
            if bits is not None:
                message.slot_bits = bits
            else:
                message.slots.extend(record.slots)
            if counts.count(counts[0]) != len(counts):
                message.counts.extend(counts)
            message.codes = record.codes
            message.exact_bits = _exact_bits(record)
        case RoundOpened(scale=scale, deadline_ms=deadline_ms, exact_scale=exact_scale):
            message.scale, message.deadline_ms, message.exact_scale = scale, deadline_ms, exact_scale
        case RunStarted(spec=spec):
            message.run_started.spec = spec.canonical
        case PeerJoined(slot=slot, key=key, name=name):
            message.peer_joined.CopyFrom(pb.PeerJoined(slot=slot, key=key, name=name))
        case PeerLeft(slot=slot, reason=reason):
            message.peer_left.CopyFrom(pb.PeerLeft(slot=slot, reason=pb.LeaveReason.ValueType(int(reason))))
        case Evaluated():
            evaluated = message.evaluated
            evaluated.CopyFrom(
                pb.Evaluated(round=record.round, slot=record.slot, loss=record.loss, examples=record.examples)
            )
            if record.accuracy is not None:
                evaluated.accuracy = record.accuracy
        case RunFinished(rounds=rounds):
            message.run_finished.CopyFrom(pb.RunFinished(rounds=rounds))
        case _:
            assert_never(record)
    return message.SerializeToString(deterministic=True)


def decode_record(data: bytes, *, sealed_rounds: int) -> Record:
    """Read one record and check everything that can be checked without the rest of the log.

    Args:
        data: the record's bytes.
        sealed_rounds: number of sealed rounds before it: the number of a round it opens or seals, which is not in the
            bytes. `RecordDecoder` keeps count.

    Raises:
        WireError: not a record, beyond a limit, or not in its one encoding.
    """
    if len(data) > limits.RECORD_BYTES_MAX:
        why = f"a record has {len(data)} bytes; at most {limits.RECORD_BYTES_MAX} are allowed"
        raise WireError(RejectCode.OVERSIZED, why)
    try:
        message = pb.Record.FromString(data)
    except DecodeError as error:
        raise checks.malformed(f"a record's bytes do not decode: {error}") from error
    record = _from_message(message, sealed_rounds)
    if encode_record(record) != data:
        raise checks.malformed(f"a {type(record).__name__} record is not in its canonical encoding")
    return record


class RecordDecoder:
    """Decodes consecutive records of one log and numbers the rounds."""

    def __init__(self, sealed_rounds: int = 0) -> None:
        self._sealed_rounds = sealed_rounds

    def decode(self, data: bytes) -> Record:
        """Read the next record.

        Raises:
            WireError: see `decode_record`; the decoder is unchanged.
        """
        record = decode_record(data, sealed_rounds=self._sealed_rounds)
        if isinstance(record, RoundSealed):
            self._sealed_rounds += 1
        return record


def _from_message(message: pb.Record, sealed_rounds: int) -> Record:
    if message.codes:
        return _sealed(message, checks.round_number(sealed_rounds))
    if message.scale:
        round_ = checks.round_number(sealed_rounds)
        exact = message.exact_scale
        return RoundOpened(
            round=round_,
            scale=checks.positive(message.scale, "the scale"),
            deadline_ms=message.deadline_ms,
            exact_scale=checks.positive(exact, "the exact scale") if exact else 0.0,
        )
    match message.WhichOneof("kind"):
        case "run_started":
            try:
                return RunStarted(spec=RunSpec.from_canonical(message.run_started.spec))
            except SpecError as error:
                raise checks.malformed(str(error)) from error
        case "peer_joined":
            joined = message.peer_joined
            return PeerJoined(
                slot=checks.slot(joined.slot), key=PeerKey(checks.key(joined.key)), name=checks.name(joined.name)
            )
        case "peer_left":
            left = message.peer_left
            try:
                reason = LeaveReason(int(left.reason))
            except ValueError:
                raise checks.malformed(f"{int(left.reason)} is not a reason to leave") from None
            return PeerLeft(slot=checks.slot(left.slot), reason=reason)
        case "evaluated":
            return _evaluated(message.evaluated)
        case "run_finished":
            return RunFinished(rounds=checks.round_number(message.run_finished.rounds))
        case None:
            raise checks.malformed("a record of no known kind")
        case kind:
            assert_never(kind)


def _sealed(message: pb.Record, round_: RoundNumber) -> RoundSealed:
    if len(message.slot_bits) > limits.SLOTS_MAX // 8:
        raise checks.malformed(f"a sealed round has {len(message.slot_bits)} bytes of slot bits")
    bits = int.from_bytes(message.slot_bits, "little")
    contributions = len(message.slots) + bits.bit_count()
    if not 1 <= contributions <= limits.SESSIONS_MAX:
        raise checks.malformed(
            f"a sealed round has {contributions} contributions; 1 to {limits.SESSIONS_MAX} are allowed"
        )
    slots = tuple(map(Slot, message.slots)) or _slots_of(message.slot_bits)
    equal = (len(message.codes) // contributions,) * contributions
    record = RoundSealed(
        round=round_,
        alpha=message.alpha,
        loss=checks.loss(message.loss),
        digest=message.digest,
        slots=slots,
        counts=tuple(message.counts) or equal,
        codes=message.codes,
        exact=_exact_of(message.exact_bits, slots),
    )
    why = shape_objection(record)
    if why is not None:
        raise checks.malformed(f"a sealed round {why}")
    return record


def _exact_bits(record: RoundSealed) -> bytes:
    """Return which contributions are exact as a bitmap over their order; empty for none."""
    exact = set(record.exact)
    bits = sum(1 << number for number, slot in enumerate(record.slots) if slot in exact)
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")


def _exact_of(bits: bytes, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    if 8 * len(bits) >= len(slots) + 8:
        raise checks.malformed(f"a sealed round of {len(slots)} contributions has {len(bits)} bytes of exact bits")
    numbers = _slots_of(bits)
    if numbers and numbers[-1] >= len(slots):
        raise checks.malformed(f"a sealed round calls contribution {numbers[-1]} of {len(slots)} exact")
    return tuple(slots[number] for number in numbers)


def _slot_bits(slots: tuple[Slot, ...]) -> bytes | None:
    """Return the slots as a bitmap, None where a packed list is at most as long."""
    length = slots[-1] // 8 + 1
    if length > 3 * len(slots):  # a packed slot has at most three bytes: do not build what cannot be shorter
        return None
    packed = sum(1 + (slot >= 1 << 7) + (slot >= 1 << 14) for slot in slots)
    if length >= packed:
        return None
    return sum(1 << slot for slot in slots).to_bytes(length, "little")


def _slots_of(bits: bytes) -> tuple[Slot, ...]:
    return tuple(
        Slot(8 * index + bit) for index, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
    )


def _evaluated(message: pb.Evaluated) -> Evaluated:
    return Evaluated(
        round=RoundNumber(message.round),
        slot=checks.slot(message.slot),
        loss=checks.loss(message.loss),
        accuracy=checks.fraction(message.accuracy, "the accuracy") if message.HasField("accuracy") else None,
        examples=message.examples,
    )
