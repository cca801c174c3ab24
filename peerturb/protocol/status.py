"""What a coordinator's machine tells about itself: for the status call, metrics and displays."""

from dataclasses import dataclass, field

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, Slot
from peerturb.protocol.sealing import SealReason


@dataclass(slots=True)
class Counters:
    """Counts since the process started. Labels are few and bounded."""

    seals: dict[SealReason, int] = field(default_factory=lambda: dict.fromkeys(SealReason, 0))
    rejects: dict[RejectCode, int] = field(default_factory=lambda: dict.fromkeys(RejectCode, 0))
    digest_mismatches: int = 0
    """Contributions left out of a sealed round because they were measured on other weights."""
    repeated_contributions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """One identity."""

    slot: Slot
    key: PeerKey
    name: str
    state: str
    """connected, lagging, away or left."""
    probes: int
    """Codes in sealed rounds, over the whole run."""
    last_round: int
    """Newest sealed round with a contribution of this peer; -1 if there is none."""
    loss: float
    """Of its newest contribution to this process; NaN if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStatus:
    """What is going on now."""

    name: str
    spec_digest: bytes
    round: int
    """Number of sealed rounds; also the number of the open round while one is open."""
    head: Position
    peers: tuple[PeerState, ...]
    reason: SealReason | None
    """None when no round is open."""
    waiting_for: str
    connected: int
    probes: int
    """Codes in all sealed rounds."""
    void_codes: int
    loss: float
    """Of the newest sealed round; NaN before the first."""
    scale: float
    alpha: float
    digest: int
    is_finished: bool
