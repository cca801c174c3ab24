"""What peer and coordinator say to each other in a session, as values. `peerturb.wire` turns them into bytes."""

from dataclasses import dataclass

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Peer: first message of a session. The shell checks token and identity proof before the machine sees it."""

    protocol: int
    key: PeerKey
    name: str
    token: str
    spec_digest: bytes
    base_digest: bytes
    """32 bytes: digest of the base weights the peer loaded."""
    manifest_digest: bytes
    """32 bytes: `peerturb.manifest.manifest_digest` of what it will train."""
    position: Position
    """Records it already has; the feed continues there."""
    chain: bytes
    """32 bytes: chain hash of the log at `position`; proves it is on the same log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """Coordinator: sign `challenge_bytes(...)` with the identity key."""

    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Peer: Ed25519 signature over the challenge."""

    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Coordinator: the peer is a member. Records from its position follow; probing starts at `head`."""

    slot: Slot
    head: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """Peer: its codes for a round, samples 0..len-1. Identified by (round, slot): sending it again is harmless."""

    round: RoundNumber
    codes: bytes
    """int8, two's complement; -128 is void."""
    loss: float
    """Mean of the finite losses: L+ and L-, one-sided L+ and the clean loss; NaN without any."""
    digest: int
    """Short digest (u32) of the weights the probes were measured on."""
    is_exact: bool = False
    """Whether the codes are exact projections of one gradient; estimates by perturbation otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Peer: held-out evaluation of its weights after `round` rounds."""

    round: RoundNumber
    loss: float
    accuracy: float | None
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Peer: goodbye, do not wait for me."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """Shell to machine: the session's stream has ended, for whatever reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Coordinator: records first, first + 1, ... of the log."""

    first: Position
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Coordinator: what was refused and why. `closes`: the session ends with it."""

    code: RejectCode
    why: str
    closes: bool


FromPeer = Hello | Proof | Contribution | Evaluation | Leave
ToPeer = Challenge | Welcome | Records | Refusal


def challenge_bytes(*, nonce: bytes, spec_digest: bytes, key: PeerKey) -> bytes:
    """Return what a peer signs: bound to this coordinator's nonce, this run and this identity."""
    return b"peerturb session v1\0" + nonce + spec_digest + key
