"""Unary calls to a coordinator: what a node asks before it joins, and what the log commands read.

It turns gRPC's failures into the project's errors; the session itself lives in `peerturb_node.link`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from peerturb.errors import PeerturbError, RefusedError, RejectCode, UnreachableError
from peerturb.spec import PROTOCOL_VERSION, RunSpec
from peerturb.wire.channel import Security, open_channel, security_for, token_metadata
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

_CALL_TIMEOUT_S = 10.0
_RANGE_TIMEOUT_S = 60.0
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A coordinator and how to trust it."""

    target: str
    """HOST:PORT."""
    security: Security
    token: str = ""

    @classmethod
    def of(
        cls,
        target: str,
        *,
        insecure: bool = False,
        fingerprint: str = "",
        authority_file: Path | None = None,
        token: str = "",
    ) -> "Address":
        """Build one from a person's flags: plaintext on loopback where nothing else was asked for."""
        security = security_for(target, insecure=insecure, fingerprint=fingerprint, authority_file=authority_file)
        return cls(target=target, security=security, token=token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A coordinator's answer to "what run is this?"."""

    spec: RunSpec
    head: int
    needs_token: bool
    version: str


async def describe(address: Address, *, wait_s: float = 0.0) -> Description:
    """Ask for the RunSpec; try again for `wait_s` seconds while nobody answers.

    Raises:
        UnreachableError: nobody answered in that time, or the certificate is another one.
        RefusedError: the coordinator speaks another protocol version.
        SpecError: what it sent is no RunSpec.
    """
    give_up_s = time.monotonic() + wait_s
    while True:
        try:
            return await _describe_once(address)
        except UnreachableError:
            if time.monotonic() + _PAUSE_S > give_up_s:
                raise
            await asyncio.sleep(_PAUSE_S)


async def _describe_once(address: Address) -> Description:
    async with await open_channel(address.target, address.security) as channel:
        stub = stub_of(channel)
        try:
            answer = await stub.Describe(pb.DescribeRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise explain(error, address) from error
    if answer.protocol != PROTOCOL_VERSION:
        raise RefusedError(
            RejectCode.PROTOCOL_VERSION,
            f"the coordinator at {address.target} (peerturb {answer.version}) speaks protocol {answer.protocol}, "
            f"this node protocol {PROTOCOL_VERSION}; install the same version of peerturb",
        )
    return Description(
        spec=RunSpec.from_canonical(answer.spec),
        head=answer.head,
        needs_token=answer.needs_token,
        version=answer.version,
    )


async def head_and_chain(address: Address) -> tuple[int, bytes]:
    """Ask for the number of records in the log, and the chain hash after them.

    Raises:
        UnreachableError: the coordinator went away.
        RefusedError: the token is wrong.
    """
    async with await open_channel(address.target, address.security) as channel:
        try:
            status = await stub_of(channel).Status(
                pb.StatusRequest(), timeout=_CALL_TIMEOUT_S, metadata=token_metadata(address.token)
            )
        except grpc.aio.AioRpcError as error:
            raise explain(error, address) from error
    return status.head, status.chain


async def record_batches(address: Address, *, first: int = 0, last: int = 0) -> AsyncIterator[list[bytes]]:
    """Yield the log's encoded records in batches, from position `first` up to `last`; 0: the head when asking.

    Raises:
        UnreachableError: the coordinator went away.
        RefusedError: it does not hand out the log to us.
    """
    async with await open_channel(address.target, address.security) as channel:
        stub = stub_of(channel)
        while True:
            try:
                batch = await stub.Range(
                    pb.RangeRequest(first=first, last=last),
                    timeout=_RANGE_TIMEOUT_S,
                    metadata=token_metadata(address.token),
                )
            except grpc.aio.AioRpcError as error:
                raise explain(error, address) from error
            if not batch.records:
                return
            yield list(batch.records)
            first += len(batch.records)
            if first >= (last or batch.head):
                return


def stub_of(channel: grpc.aio.Channel) -> "CoordinatorAsyncStub":
    """Return the typed stub of an asynchronous channel."""
    stub: CoordinatorAsyncStub = CoordinatorStub(channel)
    return stub


def explain(error: grpc.aio.AioRpcError, address: Address) -> PeerturbError:
    """Return the project's error for a failed call."""
    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        hint = "is the coordinator running there, the port open?"
        if not address.security.insecure and ("SSL" in details or "handshake" in details.lower()):
            hint = (
                "the TLS handshake failed: is it a peerturb coordinator with TLS? Its join command carries the "
                "fingerprint; a coordinator without TLS needs --insecure"
            )
        if address.security.insecure and "Socket closed" in details:
            hint = "if it serves with TLS, give the --fingerprint of its join command"
        return UnreachableError(f"cannot reach {address.target}: {details or code.name}; {hint}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UnreachableError(f"{address.target} answers, but it is no peerturb coordinator ({details})")
    if code is grpc.StatusCode.UNAUTHENTICATED or code is grpc.StatusCode.PERMISSION_DENIED:
        return RefusedError(RejectCode.BAD_TOKEN, f"{address.target} refuses: {details}; give --token or --token-file")
    return UnreachableError(f"{address.target} answered with an error: {code.name}: {details}")
