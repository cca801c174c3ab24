"""A node's identity: one Ed25519 key, made at first start, kept in its state folder.

It knows nothing of sessions; `peerturb_node.session` asks it to sign the coordinator's challenge.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peerturb.errors import SpecError
from peerturb.ids import PeerKey

FILE_NAME = "identity.key"
KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A private key and the public key that names the peer."""

    private: Ed25519PrivateKey
    public: PeerKey

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of `data`."""
        return self.private.sign(data)

    @property
    def short(self) -> str:
        """First 8 hex digits of the public key, for people."""
        return self.public.hex()[:8]

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        """Build an identity from a 32-byte private seed."""
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(private=private, public=PeerKey(private.public_key().public_bytes_raw()))


def load_or_create(folder: Path) -> Identity:
    """Read the identity of a state folder, making it at first start.

    The file holds the 32-byte private seed as hex, readable by its owner only.

    Raises:
        SpecError: the file cannot be read or made, is damaged, or others may read it.
    """
    path = folder / FILE_NAME
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _create(path)
    except OSError as error:
        raise SpecError(
            f"cannot make the identity key {path}: {error.strerror or error}; choose another --state"
        ) from error
    return _read(path)


def _read(path: Path) -> Identity:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SpecError(f"cannot read the identity key {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(_damaged(path)) from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SpecError(
            f"others may read the identity key {path} (mode {stat.S_IMODE(mode):04o}); "
            f"run `chmod 600 {path}`, or delete it to take part under a new identity"
        )
    try:
        seed = bytes.fromhex(text.strip())
    except ValueError as error:
        raise SpecError(_damaged(path)) from error
    if len(seed) != KEY_BYTES:
        raise SpecError(_damaged(path))
    return Identity.from_seed(seed)


def _create(path: Path) -> None:
    """Write a new key under a temporary name and link it into place: a crash leaves no half key, a race one winner."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if not path.exists():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _damaged(path: Path) -> str:
    return (
        f"the identity key {path} is damaged (expected {2 * KEY_BYTES} hex digits); "
        "restore it from a backup, or delete it to take part under a new identity"
    )
