"""The gRPC service: decodes, checks who is there, hands messages to the runner. Rules of the run are not made here.

Whatever arrives is hostile until decoded; nothing that a peer sends may raise beyond this module.
"""

import asyncio
import contextlib
import time
from typing import Any

import grpc
import grpc.aio

from peerturb import __version__, limits
from peerturb.errors import LogError, RejectCode
from peerturb.ids import Position
from peerturb.protocol.messages import Challenge, FromPeer, Hello, Leave, Proof
from peerturb.spec import PROTOCOL_VERSION
from peerturb.wire.channel import FEED_COMPRESSION, TOKEN_METADATA_KEY
from peerturb.wire.errors import WireError
from peerturb.wire.messages import parse_from_peer
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb_coordinator.auth import Gate
from peerturb_coordinator.events import Events
from peerturb_coordinator.places import Places
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.session import Session
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_coordinator.status import to_wire
from peerturb_coordinator.store import LogStore

SERVICE_NAME = "peerturb.wire.v1.Coordinator"

_STOPPING = "the coordinator stops; come back later"
_TOO_MANY_HANDSHAKES = f"more than {limits.HALF_OPEN_MAX} handshakes at once; try again"
_TOO_SLOW = "you read too slowly; reconnect and continue from your position"

_Context = grpc.aio.ServicerContext[object, bytes]
"""Session messages are bytes here, both ways; what is read may also be the end of the stream."""


class CoordinatorService:
    """Serves one run."""

    def __init__(
        self, runner: Runner, store: LogStore, gate: Gate, settings: CoordinatorSettings, events: Events
    ) -> None:
        """Serve what `runner` drives."""
        self._runner = runner
        self._store = store
        self._gate = gate
        self._settings = settings
        self._events = events
        self._places = Places(sessions_max=settings.sessions_max)
        self._began_s = time.monotonic()
        self._is_stopping = False

    def stop(self) -> None:
        """Turn newcomers away from now on, and tell the sessions that the coordinator stops."""
        self._is_stopping = True
        self._runner.stop(_STOPPING)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service's methods. Session messages stay bytes: they are decoded, and encoded once, here."""
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Session": grpc.stream_stream_rpc_method_handler(self.session),
                "Describe": unary(self.describe, pb.DescribeRequest.FromString, pb.Description.SerializeToString),
                "Status": unary(self.status, pb.StatusRequest.FromString, pb.RunStatus.SerializeToString),
                "Range": unary(self.range, pb.RangeRequest.FromString, pb.RecordBatch.SerializeToString),
            },
        )

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def session(self, _requests: object, context: _Context) -> None:
        """Serve one peer from its Hello until either side ends the stream."""
        context.set_compression(FEED_COMPRESSION)
        session = Session(
            self._runner.next_session_id(),
            self._runner.feed,
            context.write,
            traffic=self._runner.traffic,
            stall_timeout_s=self._settings.stall_timeout_ms / 1000,
        )
        self._runner.opened(session)
        if (oldest := self._places.enter(session)) is not None:
            self._runner.drop(oldest, RejectCode.RUN_FULL, _TOO_MANY_HANDSHAKES)
        reader = asyncio.create_task(self._read(session, context), name=f"session {session.id}")
        try:
            await session.pump()
        except TimeoutError:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(session.cut_why or _TOO_SLOW)
            if not session.cut_why:
                self._runner.counts["dropped_slow_readers"] += 1
                self._events.info("slow_reader_dropped", session=session.id, lag=session.lag)
        except LogError as error:
            self._events.error("log_not_readable", why=str(error))
            context.set_code(grpc.StatusCode.DATA_LOSS)
            context.set_details("the coordinator cannot read its log there")
        finally:
            self._places.leave(session)
            self._runner.closed(session)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, session: Session, context: _Context) -> None:
        """Take in what the peer sends; ends the session when it stops or breaks the rules."""
        try:
            if self._is_stopping:
                session.refuse(RejectCode.SHUTTING_DOWN, _STOPPING, closes=True)
            elif await self._handshake(session, context):
                while not session.is_closing and isinstance(data := await context.read(), bytes):
                    message = self._parsed(data)
                    self._runner.receive(session, message)
                    if isinstance(message, Leave):
                        break
        except WireError as error:
            self._runner.refuse(session, error.code, error.why)
        except grpc.aio.BaseError as error:
            # Message beyond gRPC's own limit, reset stream, lost connection: gRPC has ended the call already.
            self._events.debug("stream_broken", session=session.id, why=repr(error))
        except Exception as error:
            # Not foreseen: the session ends, the coordinator and the run do not.
            self._runner.counts["bugs"] += 1
            self._events.error("session_failed", session=session.id, why=repr(error), exc_info=True)
        finally:
            session.close()

    async def _handshake(self, session: Session, context: _Context) -> bool:
        """Check token, log position and identity; hand the Hello to the machine. Return False if it was refused."""
        try:
            async with asyncio.timeout(self._settings.handshake_timeout_ms / 1000):
                refusal = await self._greet(session, context)
        except TimeoutError:
            refusal = (RejectCode.NOT_JOINED, "the handshake took too long")
        if refusal is not None:
            self._runner.refuse(session, *refusal)
        return refusal is None

    async def _greet(self, session: Session, context: _Context) -> tuple[RejectCode, str] | None:
        """Hold the handshake; return what to refuse the peer with, None if the machine may decide."""
        data = await context.read()
        if not isinstance(data, bytes):
            session.close()
            return None
        hello = self._parsed(data)
        if not isinstance(hello, Hello):
            return RejectCode.NOT_JOINED, f"a {type(hello).__name__.lower()} came before the hello"
        if hello.protocol != PROTOCOL_VERSION:
            # The machine would say so too, but a stranger's handshake may differ from ours in what follows.
            why = f"the peer speaks protocol version {hello.protocol}, the coordinator {PROTOCOL_VERSION}"
            return RejectCode.PROTOCOL_VERSION, f"{why}: update the older side"
        if not self._gate.admits_token(hello.token):
            given = "is wrong" if hello.token else "is missing"
            return RejectCode.BAD_TOKEN, f"the join token {given}; the coordinator's operator has it"
        divergence = self._divergence(hello)
        if divergence is not None:
            return RejectCode.LOG_DIVERGED, divergence
        nonce = self._gate.new_nonce()
        session.send(Challenge(nonce=nonce))
        data = await context.read()
        if not isinstance(data, bytes):
            session.close()
            return None
        proof = self._parsed(data)
        if not isinstance(proof, Proof):
            return RejectCode.NOT_JOINED, f"a {type(proof).__name__.lower()} came where a proof was due"
        if not self._gate.admits_proof(key=hello.key, nonce=nonce, signature=proof.signature):
            return RejectCode.BAD_SIGNATURE, f"the proof does not verify with the identity {hello.key.hex()[:16]}"
        if session.is_closing:  # cut off meanwhile
            return None
        if not self._places.has_room_for(hello.key):
            sessions = self._settings.sessions_max
            return RejectCode.RUN_FULL, f"all {sessions} sessions of this coordinator are taken; try again later"
        session.position = hello.position
        self._runner.receive(session, hello)
        if not session.is_closing:
            self._places.admit(session, hello.key)
        return None

    def _parsed(self, data: bytes) -> FromPeer:
        """Decode a message and count its bytes.

        Raises:
            WireError: it is none.
        """
        message = parse_from_peer(data)
        self._runner.traffic.count("up", type(message).__name__.lower(), len(data))
        return message

    def _divergence(self, hello: Hello) -> str | None:
        """Say why the peer's log is not a beginning of ours, None if it is."""
        ours = self._store.chain_at(hello.position)
        if ours is None:
            return (
                f"the peer's log has {hello.position} records, the run's {self._store.head}: it is another run's, "
                "or the run was restored from an older copy"
            )
        if ours != hello.chain:
            return (
                f"after {hello.position} records the peer's log has chain {hello.chain.hex()[:16]}, "
                f"the run's {ours.hex()[:16]}: it is another run's or damaged; move it away and join from the start"
            )
        return None

    # --- unary calls ------------------------------------------------------------------------------------------------

    async def describe(self, _request: pb.DescribeRequest, _context: object) -> pb.Description:
        """Answer with the RunSpec."""
        return pb.Description(
            protocol=PROTOCOL_VERSION,
            spec=self._runner.machine.spec.canonical,
            head=self._store.head,
            needs_token=self._gate.needs_token,
            version=__version__,
        )

    async def status(
        self, _request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.RunStatus]
    ) -> pb.RunStatus:
        """Answer with what is going on; whole identity keys only for those who have the token."""
        shown = _shown_token(context)
        is_admitted = self._gate.admits_token(shown)
        if shown and not is_admitted:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the join token is wrong")
        return to_wire(
            self._runner.status(),
            counters=self._runner.machine.counters,
            chain=self._store.chain,
            fault=self._runner.fault,
            uptime_ms=int((time.monotonic() - self._began_s) * 1000),
            with_keys=is_admitted,
        )

    async def range(
        self, request: pb.RangeRequest, context: grpc.aio.ServicerContext[pb.RangeRequest, pb.RecordBatch]
    ) -> pb.RecordBatch:
        """Answer with a piece of the log, to whoever has the token: log and base weights together are the model."""
        if not self._gate.admits_token(_shown_token(context)):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the join token is missing or wrong")
        head = self._store.head
        last = min(request.last or head, head)
        if request.first > last:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"the log has {head} records; {request.first}..{last} is no piece of it"
            )
        read = self._store.read
        try:
            records = await asyncio.to_thread(read, Position(request.first), limits.RECORD_BATCH_BYTES)
        except LogError as error:
            self._events.error("log_not_readable", why=str(error))
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        return pb.RecordBatch(first=request.first, records=records[: last - request.first], head=head)


def _shown_token(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return the join token that came with a unary call, empty if none did."""
    shown = dict(context.invocation_metadata() or ()).get(TOKEN_METADATA_KEY, "")
    return shown if isinstance(shown, str) else ""
