"""What a coordinator's machine tells about itself: for the status call, metrics and displays."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, Slot
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.membership import Membership
from peerturb.protocol.sealing import SealDecision, SealReason
from peerturb.spec import RunSpec


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
    warning: str
    """Why the run seems to diverge and what to do; empty while it does not."""


def describe_run(
    spec: RunSpec, ledger: Ledger, members: Membership, losses: Mapping[Slot, float], decision: SealDecision | None
) -> CoordinatorStatus:
    """Put together what log, sessions and seal rule say.

    Args:
        spec: the run's.
        ledger: fold of the log.
        members: sessions and leases.
        losses: of each slot's newest contribution to this process.
        decision: what the seal rule says about the open round, None if there is none.
    """
    if decision is not None:
        waiting_for = decision.text
    else:
        waiting_for = "the run is finished" if ledger.is_finished else "no round is open yet"
    peers = tuple(
        PeerState(
            slot=member.slot,
            key=member.key,
            name=member.name,
            state=members.state(member.slot, is_joined=member.is_joined),
            probes=member.probes,
            last_round=member.last_round,
            loss=losses.get(member.slot, float("nan")),
        )
        for member in ledger.members
    )
    return CoordinatorStatus(
        name=spec.name,
        spec_digest=spec.digest,
        round=ledger.sealed_rounds,
        head=ledger.position,
        peers=peers,
        reason=None if decision is None else decision.reason,
        waiting_for=waiting_for,
        connected=members.connected,
        probes=ledger.probes,
        void_codes=ledger.void_codes,
        loss=ledger.loss,
        scale=ledger.scale if ledger.open is None else ledger.open.scale,
        alpha=ledger.alpha,
        digest=ledger.digest,
        is_finished=ledger.is_finished,
        warning=ledger.trend.warning,
    )
