"""Can the coordinator be reached, is it the right one, would it let us in?"""

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from peerturb.errors import PeerturbError, RefusedError, UnreachableError
from peerturb.spec import PROTOCOL_VERSION
from peerturb.wire.channel import (
    fetch_certificate,
    fingerprint_of,
    is_loopback,
    is_self_signed,
    parse_fingerprint,
    split_address,
)
from peerturb_node.client import Address, Description, describe
from peerturb_node.doctor.report import Check, fail, ok, skip
from peerturb_node.settings import NodeSettings

_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Network:
    """Runs the checks in order; `description` holds what the coordinator said, if it did."""

    settings: NodeSettings
    description: Description | None = None

    def checks(self) -> Iterator[Check]:
        """Yield one check after the other; later ones are skipped when an earlier one makes them pointless."""
        reached = self._reach()
        yield reached
        if reached.outcome != "ok":
            for name in ("tls", "protocol", "token"):
                yield skip(name, "the coordinator cannot be reached")
            return
        secured = self._secure()
        yield secured
        if secured.outcome == "fail":
            for name in ("protocol", "token"):
                yield skip(name, "no trusted connection")
            return
        yield self._speak()
        yield self._token()

    def _reach(self) -> Check:
        host, port = split_address(self.settings.coordinator)
        started_s = time.perf_counter()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            return fail("network", f"the name {host} has no address ({error.strerror or error})", "check the host name")
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
        except OSError as error:
            return fail(
                "network",
                f"nothing answers at {found[0][4][0]} port {port} ({error.strerror or error})",
                "is the coordinator running, is the port open in its firewall and router, is the port right?",
            )
        return ok("network", f"{self.settings.coordinator} answers in {1e3 * (time.perf_counter() - started_s):.0f} ms")

    def _secure(self) -> Check:
        settings = self.settings
        if settings.insecure or (is_loopback(settings.coordinator) and not settings.fingerprint):
            if self._speaks_tls():
                return fail(
                    "tls",
                    f"{settings.coordinator} speaks TLS, and this node would not",
                    "give the --fingerprint of the coordinator's join command"
                    + (", and leave --insecure out" if settings.insecure else ""),
                )
            return ok(
                "tls", "not used: " + ("--insecure" if settings.insecure else "the coordinator is on this computer")
            )
        try:
            certificate = fetch_certificate(settings.coordinator, timeout_s=_TIMEOUT_S)
        except UnreachableError as error:
            return fail(
                "tls", str(error), "take the join command from the coordinator; without TLS it needs --insecure"
            )
        shown = fingerprint_of(certificate)
        if not settings.fingerprint:
            if settings.authority_file is None and is_self_signed(certificate):
                return fail(
                    "tls",
                    "the certificate vouches for itself, and no --fingerprint says that it is the right one",
                    "give the --fingerprint of the coordinator's join command",
                )
            return ok("tls", f"the certificate is {shown}; no --fingerprint given, so an authority must vouch for it")
        expected = parse_fingerprint(settings.fingerprint)
        if shown != expected:
            return fail(
                "tls",
                f"the certificate is {shown}, expected was {expected}",
                "someone else answers there, or the coordinator has new keys: ask for a new join command",
            )
        return ok("tls", "the certificate is the expected one")

    def _speaks_tls(self) -> bool:
        try:
            fetch_certificate(self.settings.coordinator, timeout_s=_TIMEOUT_S)
        except UnreachableError:
            return False
        return True

    def _speak(self) -> Check:
        settings = self.settings
        address = Address.of(
            settings.coordinator,
            insecure=settings.insecure,
            fingerprint=settings.fingerprint,
            authority_file=settings.authority_file,
        )
        try:
            self.description = asyncio.run(describe(address))
        except RefusedError as error:
            return fail("protocol", str(error), "install the coordinator's version of peerturb")
        except PeerturbError as error:
            return fail("protocol", str(error), "is it a peerturb coordinator?")
        spec = self.description.spec
        return ok(
            "protocol",
            f"version {PROTOCOL_VERSION} on both sides; run {spec.name!r}, model {spec.model.name}, "
            f"{self.description.head} records",
        )

    def _token(self) -> Check:
        if self.description is None:
            return skip("token", "the coordinator did not describe its run")
        if not self.description.needs_token:
            return ok("token", "the run needs none")
        try:
            token = self.settings.join_token()
        except PeerturbError as error:
            return fail("token", str(error), "ask the run's operator for the token file")
        if not token:
            return fail("token", "the run needs one, none is given", "give --token-file (or --token)")
        return ok("token", "given; the coordinator looks at it when the node joins")
