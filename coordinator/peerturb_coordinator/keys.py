"""What `peerturb coordinator keys` makes: a self-signed certificate, its private key and a join token.

It knows files and certificates; it knows neither the run nor the service.
"""

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from peerturb import limits
from peerturb.errors import SpecError
from peerturb.wire.channel import fingerprint_of, join_address

CERTIFICATE_FILE = "coordinator.crt"
KEY_FILE = "coordinator.key"
TOKEN_FILE = "join-token"

VALID_DAYS = 3_650
"""Peers pin the certificate itself, so a run must be able to outlive a web certificate."""
TOKEN_BYTES = 24
"""192 random bits: 32 letters in a command line."""

_NAME = "peerturb-coordinator"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A server's identity."""

    certificate_pem: bytes
    key_pem: bytes
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySet:
    """What was made, and where."""

    certificate: Path
    key: Path
    token_file: Path
    fingerprint: str
    token: str


def make_keys(folder: Path, hosts: Sequence[str], *, replace: bool = False) -> KeySet:
    """Write certificate, private key (mode 0600) and token (mode 0600) into `folder`.

    Args:
        folder: created if missing.
        hosts: names and IP addresses peers will use, for the certificate's alternative names.
        replace: overwrite existing files.

    Raises:
        SpecError: the files exist already (peers have pinned them), or the folder cannot be written.
    """
    paths = [folder / name for name in (CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE)]
    present = [path for path in paths if path.exists()]
    if present and not replace:
        raise SpecError(
            f"{present[0]} exists; peers that pinned it could not join with new keys. "
            "Keep it, choose another --out, or pass --replace"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, hosts)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(paths[1], key_pem, mode=0o600)
        _write(paths[2], f"{token}\n".encode(), mode=0o600)
        _write(paths[0], certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    except OSError as error:
        raise SpecError(f"cannot write keys to {folder}: {error.strerror or error}") from error
    return KeySet(
        certificate=paths[0],
        key=paths[1],
        token_file=paths[2],
        fingerprint=fingerprint_of(certificate.public_bytes(serialization.Encoding.DER)),
        token=token,
    )


def ready_keys(folder: Path, hosts: Sequence[str]) -> Path:
    """Make keys in `folder` unless some are there; return the file of the join token.

    Args:
        folder: one that `make_keys` fills, or has filled.
        hosts: for the certificate, if it is made now.

    Raises:
        SpecError: the folder cannot be written, or has only some of the files.
    """
    paths = [folder / name for name in (CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE)]
    missing = [path.name for path in paths if not path.exists()]
    if len(missing) == len(paths):
        return make_keys(folder, hosts).token_file
    if missing:
        raise SpecError(
            f"{folder} has no {' and no '.join(missing)}; bring it back from a copy, or make all anew with "
            f"`peerturb coordinator keys --out {folder} --replace` (volunteers then need a new join command)"
        )
    return folder / TOKEN_FILE


def load_tls(folder: Path) -> TlsFiles:
    """Read certificate and key from `folder`.

    Raises:
        SpecError: missing, unreadable, or the two do not belong together.
    """
    certificate_path, key_path = folder / CERTIFICATE_FILE, folder / KEY_FILE
    try:
        certificate_pem, key_pem = certificate_path.read_bytes(), key_path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"cannot read {error.filename}: {error.strerror}; `peerturb coordinator keys --out {folder}` makes it"
        ) from error
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise SpecError(f"{folder} has a certificate or key that cannot be read: {error}") from error
    if _public_bytes(certificate.public_key()) != _public_bytes(key.public_key()):
        raise SpecError(f"{certificate_path} was not made for {key_path}; make both anew with `--replace`")
    fingerprint = fingerprint_of(certificate.public_bytes(serialization.Encoding.DER))
    return TlsFiles(certificate_pem=certificate_pem, key_pem=key_pem, fingerprint=fingerprint)


def read_token(text: str) -> str:
    """Return the join token: the content of the file `text` names if there is one, else `text` itself.

    Raises:
        SpecError: the file cannot be read, or the token is empty, too long or not one printable word.
    """
    token = text
    if text:
        try:
            # A token is short and has no dot or slash; a path that does not exist has.
            if Path(text).is_file():
                token = Path(text).read_text(encoding="utf-8").strip()
            elif "/" in text or os.sep in text:
                raise SpecError(f"the token file {text} does not exist; `peerturb coordinator keys` makes one")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"cannot read the token in {text}: {error}") from error
        if not token:
            raise SpecError(f"the token file {text} is empty; `peerturb coordinator keys` makes one")
    if len(token) > limits.TOKEN_CHARS_MAX:
        raise SpecError(f"the token has {len(token)} characters, more than the {limits.TOKEN_CHARS_MAX} allowed")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise SpecError("the token must be one word of printable ASCII characters")
    return token


def join_command(address: str, *, fingerprint: str, token: str, token_file: str = "") -> str:
    """Return the line a volunteer types: with the token, or the name of a file that holds it."""
    words = ["peerturb", "node", "run", "--coordinator", address]
    if fingerprint:
        words += ["--fingerprint", fingerprint]
    if token:
        words += ["--token", token]
    if token_file:
        words += ["--token-file", token_file]
    return " ".join([*words, "--data", "FILE"])


def advertised_address(hosts: Sequence[str], port: int) -> str:
    """Return the address for the join command: the first host that was named."""
    return join_address(hosts[0] if hosts else "HOST", port)


def _certificate(key: ec.EllipticCurvePrivateKey, hosts: Sequence[str]) -> x509.Certificate:
    """Return a self-signed certificate that can be its own root."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    alternatives: list[x509.GeneralName] = [x509.DNSName(_NAME)]
    for host in hosts:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            try:
                alternatives.append(x509.DNSName(host))
            except ValueError as error:
                raise SpecError(f"{host!r} is neither a host name nor an IP address") from error
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Peers' clocks may be behind ours.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """Write a new file that never has wider permissions than `mode`."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _public_bytes(key: object) -> bytes:
    """Return a comparable form of a public key."""
    public_bytes = getattr(key, "public_bytes")  # noqa: B009 (each key type has its own class)
    encoded: bytes = public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded
