"""The counting relay: every byte passes, every byte is counted, and an end on one side is an end on the other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from peerturb_node.demo.proxy import CountingRelay


@contextlib.asynccontextmanager
async def doubling_server() -> AsyncIterator[int]:
    """Serve a port that answers every chunk with twice its bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                writer.write(chunk * 2)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def closed_port() -> int:
    """Return a port nobody listens on."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


@pytest.mark.parametrize("size", [1, 1_000, 3_000_000])
async def test_bytes_pass_and_are_counted_in_both_directions(size: int) -> None:
    async with doubling_server() as port:
        relay = await CountingRelay.open(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        sent = bytes(i % 251 for i in range(size))

        async def send() -> None:
            writer.write(sent)
            await writer.drain()

        _, received = await asyncio.gather(send(), reader.readexactly(2 * size))
        assert len(received) == 2 * size
        assert (relay.count.up, relay.count.down) == (size, 2 * size)
        writer.close()
        await relay.close()


async def test_counts_go_on_over_several_connections() -> None:
    async with doubling_server() as port:
        relay = await CountingRelay.open(port)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            writer.write(b"four")
            assert await reader.readexactly(8) == b"fourfour"
            writer.close()
        assert (relay.count.up, relay.count.down) == (12, 24)
        await relay.close()


async def test_without_a_coordinator_the_node_s_connection_ends_at_once() -> None:
    relay = await CountingRelay.open(await closed_port())
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    assert (relay.count.up, relay.count.down) == (0, 0)
    writer.close()
    await relay.close()


async def test_the_coordinator_s_end_is_the_node_s_end() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        relay = await CountingRelay.open(server.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"x")
        assert await reader.read() == b""
        writer.close()
        await relay.close()


async def test_closing_the_relay_ends_open_connections() -> None:
    async with doubling_server() as port:
        relay = await CountingRelay.open(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"a")
        assert await reader.readexactly(2) == b"aa"
        await relay.close()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
