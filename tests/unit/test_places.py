"""Half-open handshakes and sessions: two limits that do not touch each other."""

import pytest

from peerturb.ids import PeerKey
from peerturb.protocol.outputs import SessionId
from peerturb_coordinator.feed import Feed
from peerturb_coordinator.places import Places
from peerturb_coordinator.session import Session
from peerturb_coordinator.store import MemoryLogStore
from peerturb_coordinator.traffic import Traffic

KEYS = [PeerKey(bytes([number]) * 32) for number in range(3)]


@pytest.fixture
def streams() -> list[Session]:
    feed = Feed(MemoryLogStore())

    async def write(data: bytes) -> None:
        raise AssertionError("places write nothing")

    return [Session(SessionId(number), feed, write, traffic=Traffic(), stall_timeout_s=1.0) for number in range(9)]


def test_the_oldest_handshake_gives_way(streams: list[Session]) -> None:
    places = Places(sessions_max=1, half_open_max=3)
    assert [places.enter(stream) for stream in streams[:3]] == [None] * 3
    assert places.enter(streams[3]) is streams[0]
    places.leave(streams[0])  # its stream ends later; its place went long ago
    places.leave(streams[2])
    assert places.enter(streams[4]) is None
    assert places.enter(streams[5]) is streams[1]


def test_an_admitted_session_is_no_handshake_any_more(streams: list[Session]) -> None:
    places = Places(sessions_max=2, half_open_max=1)
    assert places.enter(streams[0]) is None
    places.admit(streams[0], KEYS[0])
    assert places.enter(streams[1]) is None
    assert places.enter(streams[2]) is streams[1], "never the session"


def test_handshakes_take_no_session(streams: list[Session]) -> None:
    places = Places(sessions_max=1, half_open_max=8)
    for stream in streams[:8]:
        places.enter(stream)
    assert places.has_room_for(KEYS[0])
    places.admit(streams[3], KEYS[0])
    assert not places.has_room_for(KEYS[1])
    places.leave(streams[4])
    assert not places.has_room_for(KEYS[1])
    places.leave(streams[3])
    assert places.has_room_for(KEYS[1])


def test_an_identity_takes_its_own_place(streams: list[Session]) -> None:
    places = Places(sessions_max=1, half_open_max=8)
    for stream in streams[:2]:
        places.enter(stream)
    places.admit(streams[0], KEYS[0])
    assert places.has_room_for(KEYS[0])
    places.admit(streams[1], KEYS[0])
    places.leave(streams[0])  # the older stream ends after the newer one was admitted
    assert not places.has_room_for(KEYS[1])
    places.leave(streams[1])
    assert places.has_room_for(KEYS[1])
