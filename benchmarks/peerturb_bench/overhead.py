"""What a round costs when computing costs nothing: real coordinator and node processes on two cores of one computer.

Everything is in it: measuring (a stub's table look-up), both gRPC hops, the coordinator's fsync, every node's own log
and digest. Rounds are timed by a session that only listens, on the same two cores.

value: median milliseconds per round. reference: the method's reference code on two cores. ratio: reference / value.
"""

import asyncio
import os
import statistics
from itertools import pairwise

from peerturb_bench.cluster import cluster, stub_for
from peerturb_bench.observer import sealed_rounds
from peerturb_bench.rows import Row

REFERENCE_MS = {2: 180.0, 4: 290.0, 8: 800.0}
"""Nodes -> milliseconds per round of the method's reference code."""
CORES = 2
PROBES = 128
WARM_UP_ROUNDS = 50


def run(quick: bool = False) -> list[Row]:
    """Measure and return the rows `2 nodes`, `4 nodes`, `8 nodes`."""
    rounds = 200 if quick else 1_000
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:CORES]))
    try:
        return [_row(nodes, asyncio.run(_median_ms(nodes, rounds))) for nodes in REFERENCE_MS]
    finally:
        os.sched_setaffinity(0, before)


def _row(nodes: int, value_ms: float) -> Row:
    reference_ms = REFERENCE_MS[nodes]
    return Row(
        name=f"{nodes} nodes",
        value=round(value_ms, 3),
        unit="ms/round",
        reference=reference_ms,
        ratio=round(reference_ms / value_ms, 1),
    )


async def _median_ms(nodes: int, rounds: int) -> float:
    """Return the median time between two sealed rounds, all nodes taking part."""
    async with cluster(probes=PROBES) as run_, stub_for(run_.address) as stub:
        for _ in range(nodes):
            run_.start_node(run_.address)
        begin = (await run_.until(stub, round_=WARM_UP_ROUNDS, peers=nodes)).round
        arrived_s = []
        async for round_, at_s in sealed_rounds(stub):
            # Earlier rounds are the observer's catching up.
            if round_ > begin + WARM_UP_ROUNDS:
                arrived_s.append(at_s)
            if len(arrived_s) > rounds:
                break
        await run_.until(stub, round_=begin + rounds, peers=nodes)
    return statistics.median(later - earlier for earlier, later in pairwise(arrived_s)) * 1_000
