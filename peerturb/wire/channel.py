"""How two programs of a run reach each other: gRPC options and TLS in one place, for both ends.

Everything that shapes bytes on the socket below the messages is decided here, so that it can be measured and tuned
without touching a service or a client. It knows addresses and certificates; it knows no message.
"""

import asyncio
import hashlib
import ipaddress
import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from peerturb import limits
from peerturb.errors import SpecError, UnreachableError

Options = list[tuple[str, Any]]

FINGERPRINT_PREFIX = "sha256:"
TOKEN_METADATA_KEY = "peerturb-token"
"""Metadata of unary calls that hand out the log; sessions carry the token in their Hello."""

KEEPALIVE_MS = 30_000
"""Silence after which a side asks whether the other lives; routers forget idle NAT entries after about a minute."""
KEEPALIVE_TIMEOUT_MS = 20_000
"""Unanswered pings end the connection after this."""

SERVER_MESSAGE_BYTES_MAX = limits.RECORD_BATCH_BYTES + limits.RECORD_BYTES_MAX
"""A batch ends with the record that passes RECORD_BATCH_BYTES, and one record may have RECORD_BYTES_MAX."""

CLIENT_MESSAGE_SLACK_BYTES = 64 * 1024
"""What gRPC lets a peer's message have above CLIENT_MESSAGE_BYTES_MAX. gRPC drops a stream without a word of ours; a
message a bit too large shall be refused by the protocol, with its code, and be counted."""

FEED_COMPRESSION = grpc.Compression.Deflate
"""Of what a coordinator sends in a session: 11 bytes less on a round of 512 codes, 17 % less in catch-up (docs/LOG.md).
What peers send is too short to gain."""

_WINDOW_BYTES = 4 * 1024 * 1024
"""HTTP/2 receive window of a stream. Every credit the receiver returns is a WINDOW_UPDATE frame of 13 bytes against the
sender's traffic; a large window returns credit rarely."""

_SHARED: Options = [
    # Bandwidth probing sends a ping with the data again and again: 17 bytes each way that buy nothing at our rates.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    ("grpc.optimization_target", "latency"),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]

_UNARY_RETRIES = {
    "methodConfig": [
        {
            "name": [
                {"service": "peerturb.wire.v1.Coordinator", "method": method}
                for method in ("Describe", "Status", "Range")
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""Reading calls may be repeated by the library. Sessions are not: the peer's machine decides when to come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How a client trusts a server. The default is TLS with the system's certificate authorities."""

    insecure: bool = False
    """Plaintext: no TLS at all."""
    fingerprint: str = ""
    """`sha256:...` of the only certificate to accept."""
    authority_file: Path | None = None
    """PEM file of certificate authorities to trust in place of the system's."""


def server_options() -> Options:
    """Return the options of a server's socket."""
    return [
        *_SHARED,
        ("grpc.max_receive_message_length", limits.CLIENT_MESSAGE_BYTES_MAX + CLIENT_MESSAGE_SLACK_BYTES),
        ("grpc.max_send_message_length", SERVER_MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", 8 * 1024),
        # A connection without a call is a stranger's, or a status command's that was forgotten.
        ("grpc.max_connection_idle_ms", 5 * 60 * 1_000),
        # A second server on the same port would silently take half of the peers.
        ("grpc.so_reuseport", 0),
        # Peers may ping as often as our own clients do, with room for an early timer.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ]


def client_options() -> Options:
    """Return the options of a client's channel."""
    return [
        *_SHARED,
        ("grpc.max_receive_message_length", SERVER_MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", limits.CLIENT_MESSAGE_BYTES_MAX),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_UNARY_RETRIES)),
        # The peer's own backoff decides; a channel that sleeps for two minutes would miss a restart.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Proxies of the surroundings are for web pages; a session is one long stream.
        ("grpc.enable_http_proxy", 0),
        # Every channel its own connection: two nodes in one process must not share flow control.
        ("grpc.use_local_subchannel_pool", 1),
    ]


async def open_channel(address: str, security: Security, *, timeout_s: float = 10.0) -> grpc.aio.Channel:
    """Return a channel to `address` ("host:port"). With a fingerprint the server's certificate is fetched and compared.

    Raises:
        UnreachableError: nobody answers there, or the certificate is another one; the message has both fingerprints.
        SpecError: address, fingerprint or authority file cannot be used.
    """
    host, _ = split_address(address)
    options = client_options()
    if security.insecure:
        return grpc.aio.insecure_channel(address, options=options)
    if security.fingerprint:
        expected = parse_fingerprint(security.fingerprint)
        certificate = await asyncio.to_thread(fetch_certificate, address, timeout_s=timeout_s)
        roots = _pinned_roots(certificate, expected, address)
        options.append(("grpc.ssl_target_name_override", _name_in(certificate) or host))
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)
    authorities = None
    if security.authority_file is not None:
        try:
            authorities = security.authority_file.read_bytes()
        except OSError as error:
            raise SpecError(f"cannot read the authorities in {security.authority_file}: {error.strerror}") from error
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authorities), options=options)


def security_for(
    address: str, *, insecure: bool = False, fingerprint: str = "", authority_file: Path | None = None
) -> Security:
    """Return the trust that a person's flags mean: plaintext on loopback where nothing else was asked for."""
    plain = insecure or (is_loopback(address) and not fingerprint and authority_file is None)
    return Security(insecure=plain, fingerprint=fingerprint, authority_file=authority_file)


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port".

    Raises:
        SpecError: not of that form.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise SpecError(f"{address!r} is not an address; write HOST:PORT, for instance 192.0.2.7:7470")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return "host:port", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Say whether "host:port" can only be reached from this computer."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fingerprint_of(certificate_der: bytes) -> str:
    """Return `sha256:` and the hex SHA-256 of a DER certificate."""
    return FINGERPRINT_PREFIX + hashlib.sha256(certificate_der).hexdigest()


def parse_fingerprint(text: str) -> str:
    """Return the fingerprint in its one written form; colons between bytes and capitals are accepted.

    Raises:
        SpecError: not a SHA-256 fingerprint.
    """
    digits = text.strip().lower().removeprefix(FINGERPRINT_PREFIX).replace(":", "")
    if len(digits) != 64 or any(digit not in "0123456789abcdef" for digit in digits):
        raise SpecError(f"{text!r} is not a fingerprint; it is {FINGERPRINT_PREFIX} and 64 hexadecimal digits")
    return FINGERPRINT_PREFIX + digits


def fetch_certificate(address: str, *, timeout_s: float) -> bytes:
    """Return the DER certificate that the server at `address` shows, unverified. Blocks.

    Raises:
        UnreachableError: no connection, or the server there speaks no TLS.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The comparison with the pinned fingerprint is the verification.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
        ):
            certificate = secured.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise UnreachableError(
            f"{address} answers but speaks no TLS ({error.reason or error}); does the coordinator run with --insecure?"
        ) from error
    except OSError as error:
        raise UnreachableError(
            f"cannot reach {address}: {error.strerror or error}; is the coordinator running there, the port open?"
        ) from error
    if not certificate:
        raise UnreachableError(f"{address} showed no certificate")
    return certificate


def is_self_signed(certificate_der: bytes) -> bool:
    """Say whether a certificate names itself as its issuer, so that no authority stands behind it."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    return certificate.issuer == certificate.subject


def server_credentials(certificate_pem: bytes, key_pem: bytes) -> grpc.ServerCredentials:
    """Return the server's TLS credentials."""
    return grpc.ssl_server_credentials([(key_pem, certificate_pem)])


def token_metadata(token: str) -> Sequence[tuple[str, str]]:
    """Return the metadata that carries the join token on unary calls."""
    return [(TOKEN_METADATA_KEY, token)] if token else []


def _pinned_roots(certificate_der: bytes, expected: str, address: str) -> bytes:
    """Return the certificate as the only root, if it is the expected one."""
    shown = fingerprint_of(certificate_der)
    if shown != expected:
        raise UnreachableError(
            f"the certificate of {address} is not the expected one: it shows {shown}, expected is {expected}. "
            "Someone else answers there, or the coordinator has new keys: ask for a new join command"
        )
    return x509.load_der_x509_certificate(certificate_der).public_bytes(Encoding.PEM)


def _name_in(certificate_der: bytes) -> str:
    """Return a name the certificate is made out to, since a pinned one may be reached under any address."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    found: list[str] = [*names.get_values_for_type(x509.DNSName)]
    found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return found[0] if found else ""
