"""The machine's status as the wire's message. It decides nothing."""

from peerturb.protocol.status import CoordinatorStatus, Counters, PeerState
from peerturb.wire.v1 import coordinator_pb2 as pb

SHORT_KEY_BYTES = 8
"""What a stranger sees of an identity: enough to tell peers apart, not the key itself."""


def to_wire(
    status: CoordinatorStatus, *, counters: Counters, chain: bytes, fault: str, uptime_ms: int, with_keys: bool
) -> pb.RunStatus:
    """Return the message; counts of zero are left out, and without `with_keys` all but the beginning of each key."""
    key_bytes = None if with_keys else SHORT_KEY_BYTES
    return pb.RunStatus(
        run=status.name,
        spec_digest=status.spec_digest,
        round=status.round,
        head=status.head,
        chain=chain,
        peers=[_peer(peer, key_bytes) for peer in status.peers],
        waiting_for=fault or status.waiting_for,
        probes=status.probes,
        void_codes=status.void_codes,
        loss=status.loss,
        scale=status.scale,
        alpha=status.alpha,
        digest=status.digest,
        finished=status.is_finished,
        fault=fault,
        uptime_ms=uptime_ms,
        digest_mismatches=counters.digest_mismatches,
        rejects={code.name.lower(): count for code, count in counters.rejects.items() if count},
        warning=status.warning,
        seals={reason.value: count for reason, count in counters.seals.items() if count},
    )


def _peer(peer: PeerState, key_bytes: int | None) -> pb.PeerStatus:
    """Return one peer's row; a peer without a round has `last_round` 0 and no probes."""
    return pb.PeerStatus(
        slot=peer.slot,
        name=peer.name,
        key=peer.key[:key_bytes],
        state=peer.state,
        probes=peer.probes,
        last_round=max(peer.last_round, 0),
        loss=peer.loss,
    )
