"""An HTTP server that strangers fill with connections: they get its places, not the process's, and keep nobody out."""

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from peerturb.wire import http_site
from peerturb.wire.http import HttpServer

PLACES = 8


@contextlib.asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, gate: asyncio.Event, full: asyncio.Barrier | None = None
) -> AsyncIterator[HttpServer]:
    """Serve few places; `/slow` is answered once the gate is open, and those who ask for it meet at the barrier."""
    monkeypatch.setattr(http_site, "CONNECTIONS_MAX", PLACES)

    async def slow(_request: web.Request) -> web.StreamResponse:
        if full is not None:
            await full.wait()
        await gate.wait()
        return web.Response(text="at last\n")

    server = HttpServer(
        "127.0.0.1:0", routes=[("/slow", slow)], readiness=lambda: "", on_failure=lambda path, error: None
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def knock(server: HttpServer, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return reader, writer


async def hang_up(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def said(reader: asyncio.StreamReader) -> bytes:
    """Return all until the end; nothing where the connection is refused."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


def ask(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode()


async def test_half_sent_requests_give_way_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, asyncio.Event()) as server:
        strangers = [await knock(server, b"GET /healthz HTTP/1.1\r\n") for _ in range(3 * PLACES)]
        reader, writer = await knock(server, ask("/healthz"))
        assert (await said(reader)).endswith(b"alive\n")
        for reader_of_old, _ in strangers[:PLACES]:
            assert await said(reader_of_old) == b""
        await hang_up(writer, *(stream for _, stream in strangers))


async def test_who_is_being_answered_keeps_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, full = asyncio.Event(), asyncio.Barrier(PLACES + 1)
    async with serving(monkeypatch, gate, full) as server:
        served = [await knock(server, ask("/slow")) for _ in range(PLACES)]
        await full.wait()
        refused, writer = await knock(server, ask("/healthz"))
        assert await said(refused) == b"", "there is no place"
        await hang_up(writer)
        gate.set()
        for reader, stream in served:
            assert (await said(reader)).endswith(b"at last\n")
            await hang_up(stream)
        reader, writer = await knock(server, ask("/healthz"))
        assert (await said(reader)).endswith(b"alive\n"), "places are free again"
        await hang_up(writer)


@pytest.mark.parametrize(("soft", "expected"), [(-1, 256), (20_000, 256), (512, 128), (2, 1)])
def test_places_leave_most_files_to_the_run(monkeypatch: pytest.MonkeyPatch, soft: int, expected: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert http_site.places() == expected
