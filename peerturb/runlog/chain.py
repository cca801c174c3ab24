"""The hash chain over record bytes: one 32-byte value names a whole log up to a position."""

import hashlib

from peerturb.ids import Position

CHAIN_START = hashlib.sha256(b"peerturb run log v1\0").digest()
"""Chain hash of the empty log."""


def chain_after(previous: bytes, payload: bytes) -> bytes:
    """Return the chain hash after one more record: SHA-256 of the previous hash and the record's bytes."""
    digest = hashlib.sha256(previous)
    digest.update(payload)
    return digest.digest()


class ChainHash:
    """Running chain hash. Invariant: `value` covers exactly the first `position` records."""

    __slots__ = ("position", "value")

    def __init__(self, value: bytes = CHAIN_START, position: int = 0) -> None:
        assert len(value) == len(CHAIN_START)
        self.value = value
        self.position = Position(position)

    def extend(self, payload: bytes) -> bytes:
        """Take in the next record's bytes; return the new value."""
        self.value = chain_after(self.value, payload)
        self.position = Position(self.position + 1)
        return self.value
