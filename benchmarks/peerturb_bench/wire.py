"""Bytes per code on the socket above TCP, between a real coordinator and real nodes, in plaintext.

Counted by a proxy: HTTP/2 frames, window updates, gRPC prefixes, protobuf fields, loss and digest of the report. The
handshake and the first rounds are left out; they are a few hundred bytes once.

value: bytes per code. reference: the limit the project promises. ratio: value / reference (at most 1).
"""

import asyncio

from peerturb_bench.cluster import cluster, stub_for
from peerturb_bench.proxy import CountingProxy
from peerturb_bench.rows import Row

UP_LIMITS = {128: 1.45, 256: 1.25}
"""Codes in a contribution -> bytes per code, at most."""
DOWN_LIMIT = 1.15
DOWN_PEERS, DOWN_PROBES = 4, 128
"""512 codes in a round."""

WARM_UP_ROUNDS = 30


def run(quick: bool = False) -> list[Row]:
    """Measure and return the rows `up 128`, `up 256`, `down 512`."""
    rounds = 200 if quick else 600
    rows = []
    for probes, limit in UP_LIMITS.items():
        up, _ = asyncio.run(_bytes_per_code(peers=1, probes=probes, rounds=rounds))
        rows.append(_row(f"up {probes}", up, limit))
    _, down = asyncio.run(_bytes_per_code(peers=DOWN_PEERS, probes=DOWN_PROBES, rounds=rounds))
    rows.append(_row(f"down {DOWN_PEERS * DOWN_PROBES}", down, DOWN_LIMIT))
    return rows


def _row(name: str, value: float, limit: float) -> Row:
    return Row(name=name, value=round(value, 4), unit="bytes/code", reference=limit, ratio=round(value / limit, 4))


async def _bytes_per_code(*, peers: int, probes: int, rounds: int) -> tuple[float, float]:
    """Return bytes up per code a peer sends, and bytes down per code a peer receives."""
    async with cluster(probes=probes) as run_, CountingProxy("127.0.0.1", run_.port) as proxy:
        for _ in range(peers):
            run_.start_node(proxy.address)
        # Status calls go around the proxy, so that asking is not counted.
        async with stub_for(run_.address) as stub:
            begin = await run_.until(stub, round_=WARM_UP_ROUNDS, peers=peers)
            up, down = proxy.up_bytes, proxy.down_bytes
            end = await run_.until(stub, round_=begin.round + rounds, peers=peers)
            up, down = proxy.up_bytes - up, proxy.down_bytes - down
    codes = end.probes - begin.probes
    return up / codes, down / (codes * peers)
