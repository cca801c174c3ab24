"""What decoding refuses, by example, and with which code."""

import struct

import pytest

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.messages import Contribution, Hello, Records, Refusal
from peerturb.protocol.records import PeerJoined, RoundOpened, RoundSealed
from peerturb.wire import WireError
from peerturb.wire.messages import encode_from_peer, encode_to_peer, parse_from_peer, parse_to_peer
from peerturb.wire.records import RecordDecoder, decode_record, encode_record
from peerturb.wire.v1 import coordinator_pb2, record_pb2


def refused(data: bytes) -> RejectCode:
    with pytest.raises(WireError) as caught:
        parse_from_peer(data)
    return caught.value.code


def hello(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "protocol": 1,
        "key": bytes(32),
        "name": "n",
        "token": "",
        "spec_digest": bytes(32),
        "base_digest": bytes(32),
        "manifest_digest": bytes(32),
        "position": 0,
        "chain": bytes(32),
    }
    return coordinator_pb2.FromPeer(hello=coordinator_pb2.Hello(**(fields | changes))).SerializeToString()  # type: ignore[arg-type]


def test_a_hello_in_order_passes() -> None:
    assert isinstance(parse_from_peer(hello()), Hello)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": bytes(31)},
        {"key": b""},
        {"name": ""},
        {"name": "x" * (limits.NAME_CHARS_MAX + 1)},
        {"name": "a\x1b[2Jb"},
        {"token": "x" * (limits.TOKEN_CHARS_MAX + 1)},
        {"spec_digest": bytes(33)},
        {"base_digest": b""},
        {"manifest_digest": bytes(1)},
        {"chain": bytes(20)},
        {"position": 2**63},
    ],
)
def test_a_hello_out_of_bounds_is_malformed(changes: dict[str, object]) -> None:
    assert refused(hello(**changes)) is RejectCode.MALFORMED


def test_the_size_of_a_contribution_is_bounded_at_both_layers() -> None:
    most = Contribution(
        round=RoundNumber(2**32 - 1), codes=b"\x80" * limits.PROBES_PER_CONTRIBUTION_MAX, loss=1.0, digest=1
    )
    data = encode_from_peer(most).SerializeToString()
    assert len(data) <= limits.CLIENT_MESSAGE_BYTES_MAX
    assert parse_from_peer(data) == most
    more = coordinator_pb2.FromPeer(codes=bytes(limits.PROBES_PER_CONTRIBUTION_MAX + 1)).SerializeToString()
    assert refused(more) is RejectCode.TOO_MANY_CODES
    assert refused(bytes(limits.CLIENT_MESSAGE_BYTES_MAX + 1)) is RejectCode.OVERSIZED


def test_an_empty_message_is_an_empty_contribution() -> None:
    assert refused(b"") is RejectCode.EMPTY_CONTRIBUTION


def test_a_message_is_one_thing_only() -> None:
    both = coordinator_pb2.FromPeer(codes=b"\x01", leave=coordinator_pb2.Leave()).SerializeToString()
    assert refused(both) is RejectCode.MALFORMED


def test_a_contribution_costs_at_most_twenty_bytes_beyond_its_codes() -> None:
    message = Contribution(round=RoundNumber(100_000), codes=bytes(256), loss=2.5, digest=2**32 - 1)
    assert len(encode_from_peer(message).SerializeToString()) <= 256 + 20


SEALED = RoundSealed(
    round=RoundNumber(4),
    alpha=0.5,
    loss=2.0,
    digest=9,
    slots=(Slot(0), Slot(3)),
    counts=(2, 2),
    codes=b"\x01\x80\x03\xff",
)


def test_equal_counts_are_not_on_the_wire() -> None:
    uneven = RoundSealed(
        round=RoundNumber(4), alpha=0.5, loss=2.0, digest=9, slots=SEALED.slots, counts=(1, 3), codes=SEALED.codes
    )
    assert len(encode_record(uneven)) == len(encode_record(SEALED)) + 4
    for record in (SEALED, uneven):
        assert decode_record(encode_record(record), sealed_rounds=4) == record


@pytest.mark.parametrize(
    ("slots", "is_bitmap"),
    [
        ((0,), False),
        ((0, 1), True),
        ((7, 8), False),
        ((0, 1, 8, 15), True),
        ((5_000, 5_001), False),
        (tuple(range(64)), True),
    ],
)
def test_slots_take_the_shorter_form(slots: tuple[int, ...], is_bitmap: bool) -> None:
    record = RoundSealed(
        round=RoundNumber(4),
        alpha=0.5,
        loss=2.0,
        digest=9,
        slots=tuple(map(Slot, slots)),
        counts=(1,) * len(slots),
        codes=bytes(len(slots)),
    )
    data = encode_record(record)
    assert bool(record_pb2.Record.FromString(data).slot_bits) is is_bitmap
    assert decode_record(data, sealed_rounds=4) == record


def sealed(**changes: object) -> bytes:
    fields: dict[str, object] = {"alpha": 0.5, "loss": 2.0, "digest": 9, "codes": b"\x01\x80\x03\xff"}
    if "slots" not in changes:
        fields["slot_bits"] = b"\x09"
    return record_pb2.Record(**(fields | changes)).SerializeToString(deterministic=True)  # type: ignore[arg-type]


def test_the_plain_sealed_round_is_the_canonical_one() -> None:
    assert sealed() == encode_record(SEALED)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"slots": []}, "0 contributions"),
        ({"slots": [3, 0]}, "ascend"),
        ({"slots": [0, 0]}, "ascend"),
        ({"slots": [0, limits.SLOTS_MAX]}, "outside"),
        ({"slots": [0, 1, 2]}, "counts of 3 in all and 4 codes"),
        ({"slots": list(range(limits.SESSIONS_MAX + 1))}, "contributions"),
        ({"slots": [0, 3]}, "canonical"),
        ({"slot_bits": b"\x09\x00"}, "canonical"),
        ({"slot_bits": b"\xff" * (limits.SLOTS_MAX // 8 + 1)}, "bytes of slot bits"),
        ({"slots": [0, 3], "slot_bits": b"\x09"}, "counts"),
        ({"counts": [2, 2]}, "canonical"),
        ({"counts": [4]}, "1 counts"),
        ({"counts": [0, 4]}, "outside"),
        ({"counts": [1, 4]}, "counts of 5"),
        ({"alpha": float("inf")}, "f32"),
        ({"alpha": float("nan")}, "f32"),
        ({"scale": 1.0}, "canonical"),
        ({"deadline_ms": 1}, "canonical"),
        ({"run_finished": record_pb2.RunFinished(rounds=1)}, "canonical"),
    ],
)
def test_a_sealed_round_out_of_shape_is_malformed(changes: dict[str, object], why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode_record(sealed(**changes), sealed_rounds=4)


@pytest.mark.parametrize(
    "message",
    [
        record_pb2.Record(),
        record_pb2.Record(scale=-1.0),
        record_pb2.Record(scale=float("nan")),
        record_pb2.Record(scale=float("inf")),
        record_pb2.Record(deadline_ms=5),
        record_pb2.Record(peer_joined=record_pb2.PeerJoined(slot=limits.SLOTS_MAX, key=bytes(32), name="n")),
        record_pb2.Record(peer_joined=record_pb2.PeerJoined(slot=1, key=bytes(31), name="n")),
        record_pb2.Record(peer_left=record_pb2.PeerLeft(slot=1)),
        record_pb2.Record(evaluated=record_pb2.Evaluated(slot=1, accuracy=1.5)),
        record_pb2.Record(evaluated=record_pb2.Evaluated(slot=1, accuracy=float("nan"))),
        record_pb2.Record(run_started=record_pb2.RunStarted(spec=b"{}")),
        record_pb2.Record(run_started=record_pb2.RunStarted(spec=b"[" * 10_000)),
        record_pb2.Record(run_started=record_pb2.RunStarted(spec=b" " * (limits.SPEC_BYTES_MAX + 1))),
    ],
    ids=range(13),
)
def test_records_out_of_bounds_are_malformed(message: record_pb2.Record) -> None:
    with pytest.raises(WireError) as caught:
        decode_record(message.SerializeToString(), sealed_rounds=0)
    assert caught.value.code is RejectCode.MALFORMED


def test_a_nan_of_another_bit_pattern_is_not_canonical() -> None:
    odd = struct.unpack("<f", struct.pack("<I", 0x7FC00001))[0]
    data = sealed(loss=odd)
    if b"\x01\x00\xc0\x7f" in data:  # platforms may quieten it on the way
        with pytest.raises(WireError, match="canonical"):
            decode_record(data, sealed_rounds=4)


def test_fields_in_another_order_are_not_canonical() -> None:
    opened = encode_record(RoundOpened(round=RoundNumber(0), scale=1.0, deadline_ms=5))
    assert isinstance(decode_record(opened, sealed_rounds=0), RoundOpened)
    with pytest.raises(WireError, match="canonical"):
        decode_record(opened[5:] + opened[:5], sealed_rounds=0)


def test_unknown_fields_are_refused() -> None:
    joined = encode_record(PeerJoined(slot=Slot(0), key=PeerKey(bytes(32)), name="n"))
    with pytest.raises(WireError, match="canonical"):
        decode_record(joined + b"\xf8\x07\x01", sealed_rounds=0)


def test_the_decoder_numbers_the_rounds() -> None:
    decoder = RecordDecoder(4)
    opened = decoder.decode(encode_record(RoundOpened(round=RoundNumber(99), scale=1.0, deadline_ms=5)))
    assert opened == RoundOpened(round=RoundNumber(4), scale=1.0, deadline_ms=5)
    assert decoder.decode(encode_record(SEALED)) == SEALED
    following = decoder.decode(encode_record(SEALED))
    assert isinstance(following, RoundSealed)
    assert following.round == 5


def test_a_feed_message_carries_records_in_order() -> None:
    records = (RoundOpened(round=RoundNumber(4), scale=1.0, deadline_ms=5), SEALED)
    data = encode_to_peer(Records(first=Position(7), records=records)).SerializeToString()
    decoded = parse_to_peer(data, first=Position(7), decoder=RecordDecoder(4))
    assert decoded == Records(first=Position(7), records=records)


@pytest.mark.parametrize(
    "message",
    [
        coordinator_pb2.ToPeer(),
        coordinator_pb2.ToPeer(records=[b""]),
        coordinator_pb2.ToPeer(records=[encode_record(SEALED)], welcome=coordinator_pb2.Welcome()),
        coordinator_pb2.ToPeer(challenge=coordinator_pb2.Challenge(nonce=b"x")),
        coordinator_pb2.ToPeer(welcome=coordinator_pb2.Welcome(slot=limits.SLOTS_MAX)),
        coordinator_pb2.ToPeer(refusal=coordinator_pb2.Refusal(code=0)),
    ],
    ids=range(6),
)
def test_messages_of_a_strange_coordinator_are_malformed(message: coordinator_pb2.ToPeer) -> None:
    with pytest.raises(WireError):
        parse_to_peer(message.SerializeToString(), first=Position(0), decoder=RecordDecoder())


def test_the_sentence_of_a_refusal_cannot_steer_a_terminal() -> None:
    message = coordinator_pb2.ToPeer(
        refusal=coordinator_pb2.Refusal(code=8, why="a\x1b[2Jb" + "x" * 5_000, closes=True)
    )
    decoded = parse_to_peer(message.SerializeToString(), first=Position(0), decoder=RecordDecoder())
    assert isinstance(decoded, Refusal)
    assert decoded.why.startswith("a?[2Jb")
    assert len(decoded.why) == 1_024


def test_a_refusal_with_lone_surrogates_can_be_sent() -> None:
    refusal = Refusal(code=RejectCode.MALFORMED, why="\ud800", closes=True)
    assert encode_to_peer(refusal).refusal.why == "?"
