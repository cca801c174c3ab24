"""Conversions are total, exact and never raise anything but `WireError`."""

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from peerturb.ids import Position
from peerturb.protocol.messages import FromPeer, Records, ToPeer
from peerturb.protocol.records import Record
from peerturb.wire import WireError
from peerturb.wire.messages import encode_from_peer, encode_to_peer, parse_from_peer, parse_to_peer
from peerturb.wire.records import RecordDecoder, decode_record, encode_record
from tests.property.strategies import FROM_PEER, TO_PEER, U32, records


@given(U32.flatmap(lambda round_: st.tuples(st.just(round_), records(round_))))
def test_records_survive_the_wire(pair: tuple[int, Record]) -> None:
    round_, record = pair
    data = encode_record(record)
    decoded = decode_record(data, sealed_rounds=round_)
    assert repr(decoded) == repr(record)
    assert encode_record(decoded) == data


@given(FROM_PEER)
def test_messages_of_peers_survive_the_wire(message: FromPeer) -> None:
    data = encode_from_peer(message).SerializeToString()
    assert repr(parse_from_peer(data)) == repr(message)


@given(TO_PEER)
def test_messages_of_the_coordinator_survive_the_wire(message: ToPeer) -> None:
    data = encode_to_peer(message).SerializeToString()
    assert parse_to_peer(data, first=Position(0), decoder=RecordDecoder()) == message


@given(st.lists(records(0), min_size=1, max_size=5), st.integers(0, 100))
def test_record_batches_survive_the_wire(batch: list[Record], first: int) -> None:
    message = Records(first=Position(first), records=tuple(batch[:1]))
    data = encode_to_peer(message).SerializeToString()
    decoded = parse_to_peer(data, first=Position(first), decoder=RecordDecoder())
    assert repr(decoded) == repr(message)


@given(st.binary(max_size=200), U32)
def test_any_bytes_are_a_record_or_a_wire_error(data: bytes, round_: int) -> None:
    try:
        record = decode_record(data, sealed_rounds=round_)
    except WireError:
        return
    assert encode_record(record) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    for parse in (parse_from_peer, lambda data: parse_to_peer(data, first=Position(0), decoder=RecordDecoder())):
        with suppress(WireError):  # any other exception fails the test
            parse(data)


@given(records(3), st.data())
def test_a_changed_byte_is_noticed_or_gives_another_record(record: Record, data: st.DataObject) -> None:
    payload = bytearray(encode_record(record))
    index = data.draw(st.integers(0, len(payload) - 1))
    payload[index] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = decode_record(bytes(payload), sealed_rounds=3)
    except WireError:
        return
    assert encode_record(decoded) == bytes(payload)


@given(FROM_PEER, st.data())
def test_changed_messages_never_raise_anything_else(message: FromPeer, data: st.DataObject) -> None:
    payload = bytearray(encode_from_peer(message).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        if payload:
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):  # any other exception fails the test
        parse_from_peer(bytes(payload))
