"""Who may come in: the join token and the proof that a peer holds its identity key.

It knows nothing of sessions; the service asks it and turns a refusal into a message.
"""

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from peerturb.ids import PeerKey
from peerturb.protocol.messages import challenge_bytes

NONCE_BYTES = 32


class Gate:
    """Checks tokens and proofs for one run."""

    def __init__(self, *, token: str, spec_digest: bytes) -> None:
        """Remember what to compare with. An empty `token` lets everybody in."""
        self._token_digest = _digest(token) if token else None
        self._spec_digest = spec_digest

    @property
    def needs_token(self) -> bool:
        """Say whether a peer must show a token."""
        return self._token_digest is not None

    def admits_token(self, token: str) -> bool:
        """Say whether the token is the run's. Takes the same time for every wrong token of whatever length."""
        if self._token_digest is None:
            return True
        return hmac.compare_digest(_digest(token), self._token_digest)

    def new_nonce(self) -> bytes:
        """Return fresh random bytes for one challenge."""
        return secrets.token_bytes(NONCE_BYTES)

    def admits_proof(self, *, key: PeerKey, nonce: bytes, signature: bytes) -> bool:
        """Say whether `signature` is the identity's over our nonce and this run. Never raises on hostile bytes."""
        signed = challenge_bytes(nonce=nonce, spec_digest=self._spec_digest, key=key)
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
        except (InvalidSignature, ValueError):
            return False
        return True


def _digest(token: str) -> bytes:
    """Return a fixed-length image of a token, so that comparing tells nothing of its length."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
