"""What coordinator and node share of Prometheus: a registry of their own, and the page that is scraped."""

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder

from peerturb import __version__
from peerturb.wire.http import Handler

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Bounds of histograms: from a toy's rounds to those of large models on slow cards."""


def new_registry() -> CollectorRegistry:
    """Return a registry with the process's own figures (processor, memory, open files) and nothing global."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    return registry


def scrape_page(registry: CollectorRegistry) -> Handler:
    """Return the handler of `/metrics`: text or OpenMetrics, as the scraper asks."""

    async def answer(request: web.Request) -> web.StreamResponse:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": kind})

    return answer


def build_info() -> Metric:
    """Return the program's version, as a figure that is always 1."""
    made = Metric("peerturb_build", "Version of peerturb.", "info")
    made.add_sample("peerturb_build_info", {"version": __version__}, 1.0)
    return made
