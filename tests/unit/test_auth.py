"""The gate: tokens, and proofs of identity bound to nonce, run and key."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peerturb.ids import PeerKey
from peerturb.protocol.messages import challenge_bytes
from peerturb_coordinator.auth import NONCE_BYTES, Gate

SPEC = b"s" * 32
NONCE = b"n" * NONCE_BYTES


def _identity() -> tuple[Ed25519PrivateKey, PeerKey]:
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    return private, PeerKey(private.public_key().public_bytes_raw())


def test_without_a_token_everybody_may_come() -> None:
    gate = Gate(token="", spec_digest=SPEC)
    assert not gate.needs_token
    assert gate.admits_token("")
    assert gate.admits_token("anything")


@pytest.mark.parametrize("shown", ["", "open", "open-sesame ", "OPEN-SESAME", "open-sesam\ud800"])
def test_a_wrong_token_stays_out(shown: str) -> None:
    gate = Gate(token="open-sesame", spec_digest=SPEC)
    assert gate.needs_token
    assert gate.admits_token("open-sesame")
    assert not gate.admits_token(shown)


def test_a_proof_holds_for_its_nonce_run_and_key_only() -> None:
    private, key = _identity()
    other = PeerKey(Ed25519PrivateKey.from_private_bytes(b"o" * 32).public_key().public_bytes_raw())
    gate = Gate(token="", spec_digest=SPEC)
    signature = private.sign(challenge_bytes(nonce=NONCE, spec_digest=SPEC, key=key))
    assert gate.admits_proof(key=key, nonce=NONCE, signature=signature)
    assert not gate.admits_proof(key=key, nonce=b"m" * NONCE_BYTES, signature=signature)
    assert not gate.admits_proof(key=other, nonce=NONCE, signature=signature)
    assert not Gate(token="", spec_digest=b"t" * 32).admits_proof(key=key, nonce=NONCE, signature=signature)


@given(key=st.binary(max_size=40), signature=st.binary(max_size=80))
def test_hostile_bytes_are_refused_without_an_error(key: bytes, signature: bytes) -> None:
    assert not Gate(token="", spec_digest=SPEC).admits_proof(key=PeerKey(key), nonce=NONCE, signature=signature)


def test_nonces_differ() -> None:
    gate = Gate(token="", spec_digest=SPEC)
    assert len({gate.new_nonce() for _ in range(100)}) == 100
