"""Distinct types for the integers and byte strings that must not be mixed; how a short digest is shown."""

from typing import NewType

Slot = NewType("Slot", int)
"""A peer's small integer in a run; given once, never reused for another identity."""

RoundNumber = NewType("RoundNumber", int)
"""Rounds count from 0; round r turns weights r into weights r + 1."""

Position = NewType("Position", int)
"""Number of records before a point of the run log; record 0 is `RunStarted`."""

PeerKey = NewType("PeerKey", bytes)
"""A peer's raw Ed25519 public key, 32 bytes: its identity."""

RunKey = NewType("RunKey", int)
"""First four bytes, little endian, of the RunSpec digest: first word of every Philox key."""


def short_hex(digest: int) -> str:
    """Return a short digest (u32, little endian) as people see it: the beginning of the whole one."""
    return digest.to_bytes(4, "little").hex()
