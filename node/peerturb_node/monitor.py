"""A node's HTTP side: health, readiness and metrics. Training goes on without it."""

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from peerturb.wire.http import HttpServer
from peerturb.wire.metrics import new_registry, scrape_page
from peerturb_node.events import Events
from peerturb_node.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def monitored(address: str, events: Events) -> "AsyncIterator[None]":
    """Answer on an address for as long as the context lasts.

    Args:
        address: HOST:PORT to bind.
        events: what the metrics hear; they are told the address, too.

    Raises:
        UnreachableError: the address cannot be bound.
    """
    registry = new_registry()
    metrics = Metrics(registry)

    def failed(path: str, error: Exception) -> None:
        events.emit("notice", code="monitor", text=f"the page {path} failed, training goes on: {error!r}")

    server = HttpServer(
        address, routes=[("/metrics", scrape_page(registry))], readiness=lambda: metrics.why_not, on_failure=failed
    )  # fmt: skip
    await server.start()
    events.add(metrics)
    events.emit("monitor", address=server.address)
    try:
        yield
    finally:
        await server.stop()
