"""A connection to Ray: a cluster of this machine that ends with this process, or one that runs already.

It says quickly and plainly what is wrong; Ray itself waits long for a cluster that is not there.
"""

import logging
import os
import socket
from typing import Any

from peerturb.errors import PeerturbError
from peerturb.wire.channel import split_address

ANSWER_S = 5.0
"""Time in which the head of a cluster has to take a connection."""
AUTO = "auto"
"""In place of an address: the cluster that `ray start` began on this machine."""


class RayError(PeerturbError):
    """Ray is missing, its cluster cannot be reached, or its workers die again and again."""


def connect(address: str, *, processors: int | None = None) -> Any:
    """Return Ray's module, connected.

    Args:
        address: HOST:PORT of a cluster's head, or `auto`; empty: a cluster of this machine, for this process.
        processors: that a cluster for this process says it has; None: as many as there are.

    Raises:
        RayError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        # Ray would tell its makers of every start.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError as error:
        raise RayError("compute.kind is ray, which is not installed: pip install 'peerturb[sim]'") from error
    if address and address != AUTO:
        _knock(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            num_cpus=None if address else processors,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RayError(f"no cluster of Ray at {address or 'this machine'}: {first}; {_remedy(address)}") from error
    return ray


def _knock(address: str) -> None:
    """Make sure that something takes connections there.

    Raises:
        RayError: nothing does, or that is no address.
    """
    if "://" in address:
        raise RayError(
            f"compute.address {address!r} is of Ray's client, which is not used here: give HOST:PORT of the cluster's "
            "head, or auto for the cluster of this machine"
        )
    try:
        host, port = split_address(address)
    except PeerturbError as error:
        raise RayError(
            f"compute.address {address!r} is not HOST:PORT, for instance 127.0.0.1:6379, nor auto"
        ) from error
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise RayError(f"no cluster of Ray at {address}: {why}; {_remedy(address)}") from error


def _remedy(address: str) -> str:
    if not address:
        return "is there enough memory, and room in /tmp?"
    port = address.rpartition(":")[2] if address != AUTO else "6379"
    here = f"`ray start --head --port={port}`"
    if address == AUTO:
        return f"begin one with {here}"
    return (
        f"is {here} running there, has this machine joined it with `ray start --address={address}`, and are Python and "
        "Ray of the same versions?"
    )
