"""Contributions to the open round: kept once per slot, and turned into a sealed round."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from peerturb import limits, stepping
from peerturb.floats import f32
from peerturb.ids import Slot
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.messages import Contribution
from peerturb.protocol.records import RoundSealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A contribution and when it came, in ms since the round's clock started."""

    contribution: Contribution
    latency_ms: int


@dataclass(slots=True)
class Contributions:
    """What has arrived for the open round, at most one contribution per slot.

    Invariant: at most SESSIONS_MAX entries of at most `probes_max` codes each: 64 MiB.
    """

    of_slot: dict[Slot, Pending] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """True when no other slot's contribution fits in a record."""
        return len(self.of_slot) >= limits.SESSIONS_MAX

    def add(self, slot: Slot, contribution: Contribution, latency_ms: int) -> None:
        """Keep the slot's first contribution; only one measured on other weights (after a rebuild) replaces it."""
        known = self.of_slot.get(slot)
        if known is None or known.contribution.digest != contribution.digest:
            self.of_slot[slot] = Pending(contribution=contribution, latency_ms=latency_ms)

    def canonical_digest(self, ledger: Ledger) -> int:
        """Digest most peers measured on; among equals the one of those with more sealed contributions in all.

        If that is equal too, the one of the lowest slot.
        """
        votes: dict[int, tuple[int, int]] = {}
        for slot in sorted(self.of_slot):
            digest = self.of_slot[slot].contribution.digest
            now, then = votes.get(digest, (0, 0))
            votes[digest] = now + 1, then + ledger.members[slot].contributions
        return max(votes, key=lambda digest: votes[digest])  # the first of the largest: dicts keep the order of slots

    def longest_ms(self, slots: tuple[Slot, ...]) -> int:
        """Latency of the slowest of these contributions."""
        return max(self.of_slot[slot].latency_ms for slot in slots)

    def seal(self, ledger: Ledger) -> RoundSealed:
        """Seal the open round: the contributions measured on the canonical weights. At least one must be there."""
        opened = ledger.open
        assert opened is not None
        digest = self.canonical_digest(ledger)
        chosen = sorted(slot for slot, pending in self.of_slot.items() if pending.contribution.digest == digest)
        parts = [self.of_slot[slot].contribution for slot in chosen]
        sealed = RoundSealed(
            round=opened.round,
            alpha=0.0,
            loss=f32(_mean_loss(ledger, parts)),
            digest=digest,
            slots=tuple(chosen),
            counts=tuple(len(part.codes) for part in parts),
            codes=b"".join(part.codes for part in parts),
            exact=tuple(slot for slot, part in zip(chosen, parts, strict=True) if part.is_exact),
        )
        return replace(sealed, alpha=ledger.alpha_for(sealed))


def _mean_loss(ledger: Ledger, parts: Sequence[Contribution]) -> float:
    """Return the mean of the losses, weighted by the examples behind them."""
    assert ledger.spec is not None
    exact = {number for number, part in enumerate(parts) if part.is_exact}
    weight = ledger.spec.perturbation.exact_rules.examples / ledger.spec.objective.examples_per_probe
    return stepping.mean_loss(((part.codes, part.loss) for part in parts), exact=exact, exact_weight=weight)
