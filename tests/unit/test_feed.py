"""The feed and a session's outgoing side: whatever the cursor, the same bytes in the same order, in bounded memory."""

import asyncio
from collections.abc import Iterator

import pytest

from peerturb.errors import RejectCode
from peerturb.ids import Position, Slot
from peerturb.protocol.messages import Challenge, Welcome
from peerturb.protocol.outputs import SessionId
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb_coordinator.feed import BATCH_BYTES, Feed
from peerturb_coordinator.session import OUTBOX_MESSAGES_MAX, Session
from peerturb_coordinator.store import Entry, MemoryLogStore
from peerturb_coordinator.traffic import Traffic


class Log:
    """A store and its feed, written like the runner writes them."""

    def __init__(self, *, tail_bytes_max: int, old: int = 0) -> None:
        self.store = MemoryLogStore()
        self.payloads: list[bytes] = []
        self._write(old, size=100)
        self.feed = Feed(self.store, tail_bytes_max=tail_bytes_max)

    def add(self, count: int, size: int = 100) -> None:
        self.feed.publish(self._write(count, size=size))

    def _write(self, count: int, *, size: int) -> list[bytes]:
        new = [(len(self.payloads) + index).to_bytes(4, "big") * (size // 4) for index in range(count)]
        self.store.append([Entry(kind="RoundSealed", round=None, payload=payload) for payload in new])
        self.payloads += new
        return new


@pytest.fixture(params=[0, 500, 10_000_000], ids=["no tail", "short tail", "long tail"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    log = Log(tail_bytes_max=request.param, old=10)
    yield log
    log.feed.close()


async def read_from(feed: Feed, cursor: int) -> list[list[bytes]]:
    """Return the messages from `cursor` to the head."""
    messages = []
    while cursor < feed.head:
        message, cursor = await feed.batch(Position(cursor))
        messages.append(list(pb.ToPeer.FromString(message).records))
    return messages


async def test_every_cursor_reads_the_same_log(log: Log) -> None:
    for count in (1, 2, 1, 5, 2):
        log.add(count)
    for cursor in range(log.feed.head):
        messages = await read_from(log.feed, cursor)
        assert [payload for message in messages for payload in message] == log.payloads[cursor:]


async def test_who_keeps_up_gets_each_publication_as_one_message(log: Log) -> None:
    for count in (2, 3):
        before = log.feed.head
        log.add(count)
        assert await read_from(log.feed, before) == [log.payloads[before:]]


async def test_catching_up_comes_in_batches(log: Log) -> None:
    log.add(50, size=BATCH_BYTES // 4)
    log.add(1)
    messages = await read_from(log.feed, 0)
    assert [payload for message in messages for payload in message] == log.payloads
    assert max(sum(map(len, message)) for message in messages) < 2 * BATCH_BYTES
    assert len(messages) > 10


class Wire:
    """Collects what a session writes; takes nothing while `is_stuck`."""

    def __init__(self) -> None:
        self.messages: list[pb.ToPeer] = []
        self.is_stuck = False
        self._written = asyncio.Event()

    async def write(self, data: bytes) -> None:
        if self.is_stuck:
            await asyncio.Event().wait()
        self.messages.append(pb.ToPeer.FromString(data))
        self._written.set()

    async def until(self, records: int) -> None:
        while len(self.records) < records:
            self._written.clear()
            await self._written.wait()

    @property
    def records(self) -> list[bytes]:
        return [payload for message in self.messages for payload in message.records]


def session_on(log: Log, wire: Wire, *, position: int = 0, stall_timeout_s: float = 60.0) -> Session:
    session = Session(SessionId(1), log.feed, wire.write, traffic=Traffic(), stall_timeout_s=stall_timeout_s)
    session.position = Position(position)
    return session


async def test_nothing_flows_before_the_welcome_and_everything_after_it(log: Log) -> None:
    wire = Wire()
    session = session_on(log, wire, position=4)
    pump = asyncio.create_task(session.pump())
    await asyncio.sleep(0)
    assert not wire.messages
    session.send(Welcome(slot=Slot(3), head=log.feed.head))
    await wire.until(records=6)
    log.add(2)
    session.refuse(RejectCode.SHUTTING_DOWN, "later", closes=False)
    await wire.until(records=8)
    session.close()
    await pump
    assert wire.messages[0].welcome.slot == 3
    assert wire.records == log.payloads[4:]
    assert sum(message.HasField("refusal") for message in wire.messages) == 1


async def test_a_closing_refusal_is_the_last_message(log: Log) -> None:
    wire = Wire()
    session = session_on(log, wire)
    session.refuse(RejectCode.BAD_TOKEN, "no", closes=True)
    session.send(Welcome(slot=Slot(0), head=log.feed.head))
    await session.pump()
    assert [message.WhichOneof("kind") for message in wire.messages] == ["refusal"]


async def test_a_peer_that_takes_nothing_is_dropped(log: Log) -> None:
    wire = Wire()
    wire.is_stuck = True
    session = session_on(log, wire, stall_timeout_s=0.01)
    session.send(Welcome(slot=Slot(0), head=log.feed.head))
    with pytest.raises(TimeoutError):
        await session.pump()


@pytest.mark.parametrize("is_stuck", [True, False])
async def test_a_stream_that_is_cut_ends_at_once_and_says_nothing_more(log: Log, is_stuck: bool) -> None:
    wire = Wire()
    session = session_on(log, wire)
    pump = asyncio.create_task(session.pump())
    await asyncio.sleep(0)
    wire.is_stuck = is_stuck
    if is_stuck:
        session.send(Challenge(nonce=b"n" * 32))
        await asyncio.sleep(0)
    session.cut("no room")
    session.send(Welcome(slot=Slot(0), head=log.feed.head))
    with pytest.raises(TimeoutError):
        await pump
    assert not wire.messages
    assert session.is_closing


async def test_unread_refusals_do_not_pile_up(log: Log) -> None:
    wire = Wire()
    session = session_on(log, wire)
    for _ in range(10 * OUTBOX_MESSAGES_MAX):
        session.refuse(RejectCode.STALE_ROUND, "late", closes=False)
    assert session.is_closing
    await session.pump()
    assert len(wire.messages) == OUTBOX_MESSAGES_MAX + 1
