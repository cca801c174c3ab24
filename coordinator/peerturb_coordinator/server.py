"""Puts the coordinator together: store, machine, runner, service, gRPC server with health and reflection.

It knows every part and no rule.
"""

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from peerturb import limits
from peerturb.errors import UnreachableError
from peerturb.spec import RunSpec
from peerturb.wire.channel import is_loopback, join_address, server_credentials, server_options, split_address
from peerturb_coordinator.auth import Gate
from peerturb_coordinator.events import Events
from peerturb_coordinator.keys import join_command, load_tls
from peerturb_coordinator.recovery import recover
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.service import SERVICE_NAME, CoordinatorService
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_coordinator.store import LogStore
from peerturb_coordinator.trace import Trace
from peerturb_coordinator.watching import Watchers

if TYPE_CHECKING:
    from peerturb_coordinator.monitor import Monitor

_CALLS_MAX = 256
"""Other calls at once, beside sessions and half-open handshakes."""


class Server:
    """A coordinator that peers can reach."""

    def __init__(self, spec: RunSpec, settings: CoordinatorSettings, store: LogStore, events: Events) -> None:
        """Fold the store's log; nothing listens before `start`.

        Raises:
            LogError: the log belongs to another RunSpec, or is damaged; the message names the record.
            SpecError: the trace cannot be written there.
        """
        self.spec = spec
        self.store = store
        self._settings = settings
        self._events = events
        loop = asyncio.get_running_loop()
        watchers = Watchers(events)
        self._monitor = _monitor(settings, watchers, events) if settings.http else None
        machine = recover(
            spec, store, hear=lambda record: watchers.hear(record, now_ms=None, at_s=None, reason="")
        )  # fmt: skip
        self._trace = Trace(settings.trace, spec, events, records=store.head)
        self.runner = Runner(
            machine, store, events, trace=self._trace, watchers=watchers, retry_s=settings.retry_ms / 1000,
            now_s=loop.time,
        )  # fmt: skip
        gate = Gate(token=settings.token_text, spec_digest=spec.digest)
        self._service = CoordinatorService(self.runner, store, gate, settings, events)
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._fingerprint = ""
        self.address = ""

    async def start(self) -> None:
        """Bind, begin the run, let peers in.

        Raises:
            UnreachableError: the address, or that of `http`, cannot be bound.
            SpecError: the TLS files cannot be used.
        """
        host, _ = split_address(self._settings.listen)
        server = grpc.aio.server(
            options=server_options(),
            maximum_concurrent_rpcs=self._settings.sessions_max + limits.HALF_OPEN_MAX + _CALLS_MAX,
        )
        server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if self._settings.tls_dir is None:
                bound = server.add_insecure_port(self._settings.listen)
            else:
                tls = load_tls(self._settings.tls_dir)
                self._fingerprint = tls.fingerprint
                credentials = server_credentials(tls.certificate_pem, tls.key_pem)
                bound = server.add_secure_port(self._settings.listen, credentials)
        except RuntimeError as error:
            raise UnreachableError(
                f"cannot listen on {self._settings.listen}: the port is taken or the address is not this computer's"
            ) from error
        self.address = join_address(host, bound)
        if self._monitor is not None:
            needs_token = bool(self._settings.token_text)
            await self._monitor.start(self.runner, join=self._join_command(""), needs_token=needs_token)
        self.runner.start()
        await server.start()
        self._grpc = server
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._settings.insecure and not is_loopback(self.address):
            self._events.warning("plaintext", text="anybody on the way can read and change what peers send")

    @property
    def introduction(self) -> dict[str, object]:
        """What a script needs to know of a started server, as JSON values. Logs keep it, so the token is not in it."""
        return {
            "address": self.address,
            "run": self.spec.name,
            "run_digest": self.spec.digest.hex(),
            "round": self.runner.status().round,
            "records": self.store.head,
            "tls": bool(self._fingerprint),
            "fingerprint": self._fingerprint,
            "join": self._join_command("", token_file="join-token" if self._settings.token_text else ""),
            "needs_token": bool(self._settings.token_text),
            "http": "" if self._monitor is None else self._monitor.address,
        }

    @property
    def join_command(self) -> str:
        """The line a volunteer types, with the join token."""
        return self._join_command(self._settings.token_text)

    def _join_command(self, token: str, *, token_file: str = "") -> str:
        host, port = split_address(self.address)
        wildcard = "HOST" if host in ("0.0.0.0", "::") else host
        address = join_address(self._settings.advertise or wildcard, port)
        return join_command(address, fingerprint=self._fingerprint, token=token, token_file=token_file)

    async def stop(self) -> None:
        """Turn newcomers away, tell the sessions, wait for their streams to end, close the log. May be repeated."""
        if self._grpc is not None:
            await self._health.enter_graceful_shutdown()
            self._service.stop()
            await self._grpc.stop(self._settings.stop_grace_ms / 1000)
            self._grpc = None
        if self._monitor is not None:
            await self._monitor.stop()
        self.runner.feed.close()
        self._trace.close()
        self.store.close()


def _monitor(settings: CoordinatorSettings, watchers: Watchers, events: Events) -> "Monitor":
    from peerturb_coordinator.monitor import Monitor  # brings aiohttp, which a coordinator without it can do without

    return Monitor(settings.http, watchers, events, data_dir=settings.data_dir)
