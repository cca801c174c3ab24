"""A peer's copy of the weights as the protocol sees it: which sealed rounds it has, and whether it is the right one."""

from collections import deque
from collections.abc import Sequence

from peerturb import limits
from peerturb.ids import short_hex
from peerturb.protocol.outputs import Apply, PeerOutput, Rebuild
from peerturb.protocol.records import RoundSealed
from peerturb.protocol.results import Applied, Rebuilt

APPLIES_MAX = 32
"""Sealed rounds handed to the shell and not yet applied; more wait as records."""


class Replica:
    """Hands out every sealed round once, in order, and compares short digests wherever the log states one.

    A digest in the log is what its contributors say. At the first one that differs from ours we doubt ourselves and
    rebuild from the log; that makes our weights right, so a further one is doubted, until it repeats itself too often.
    The next one that agrees closes the matter: equal weights cannot have come from different ones.

    Attributes:
        rounds: how many sealed rounds the weights have.
        digest: short digest (u32) of the weights, as of the last time it was told.
        is_live: whether the log's head has been reached: only what is sealed now counts as a dispute.
        suspicion: why the weights are believed wrong; None if they are not.
        rebuilding: whether the shell is replaying the log.
        dispute: the newest difference to rebuilt weights; None if there is none or the log has agreed since.
    """

    def __init__(self, sealed_rounds: int, unapplied: Sequence[RoundSealed], digest: int) -> None:
        """Begin with weights `digest` that lack the last ones, `unapplied`, of the log's `sealed_rounds`."""
        assert len(unapplied) <= sealed_rounds
        self.rounds = sealed_rounds - len(unapplied)
        self.digest = digest
        self.suspicion: str | None = None
        self.rebuilding = False
        self._to_apply: deque[RoundSealed] = deque(unapplied)
        self._applying: deque[RoundSealed] = deque()
        self.is_live = False
        self.dispute: str | None = None
        self._disputes = 0
        self._is_rebuilt = False
        if self._to_apply:
            self._compare(self._to_apply[0])

    @property
    def is_applying(self) -> bool:
        """Whether the shell has rounds that it has not yet applied."""
        return bool(self._applying)

    @property
    def is_full(self) -> bool:
        """Whether the shell has as many rounds as it may."""
        return len(self._applying) >= APPLIES_MAX

    @property
    def is_hopeless(self) -> bool:
        """Whether the others keep sealing rounds on weights that a rebuild does not give."""
        return self._disputes > limits.DISPUTES_MAX

    def sealed(self, record: RoundSealed) -> None:
        """The local log has a further sealed round."""
        self._to_apply.append(record)
        if self.rounds == record.round:
            self._compare(record)

    def hand_out(self) -> list[PeerOutput]:
        """Give the shell the next round to apply, if there is one and it may have more."""
        if not self._to_apply or self.is_full:
            return []
        sealed = self._to_apply.popleft()
        self._applying.append(sealed)
        return [Apply(sealed=sealed)]

    def applied(self, result: Applied) -> None:
        """The shell has applied the next round."""
        sealed = self._applying.popleft()
        assert result.round == sealed.round, f"applied round {result.round}, the next was {sealed.round}"
        self.rounds = result.round + 1
        if result.digest is None:
            assert self._applying, "the last round of a burst comes with a digest"
            return
        self.digest = result.digest
        following = self._applying or self._to_apply
        if following:
            self._compare(following[0])

    def doubted(self, why: str) -> None:
        """The coordinator says that our weights differ; what it seals next tells us again."""
        if not self._is_rebuilt:
            self._suspect(why)

    def rebuild(self) -> list[PeerOutput]:
        """Have the shell replay the local log."""
        assert self.suspicion is not None
        self.rebuilding = True
        self._to_apply.clear()  # the rebuild replays them too
        return [Rebuild(why=self.suspicion)]

    def rebuilt(self, result: Rebuilt) -> None:
        """The shell has replayed the local log."""
        self.rebuilding, self.suspicion = False, None
        self.rounds, self.digest, self._is_rebuilt = result.rounds, result.digest, True

    def _compare(self, sealed: RoundSealed) -> None:
        """Check our weights against those the round was measured on."""
        if sealed.digest == self.digest:
            self._is_rebuilt, self.dispute, self._disputes = False, None, 0
            return
        ours, theirs = short_hex(self.digest), short_hex(sealed.digest)
        why = f"before round {sealed.round} our weights are {ours}, it was sealed on {theirs}"
        if not self._is_rebuilt:
            self._suspect(why)
            return
        self.dispute = why
        self._disputes += self.is_live

    def _suspect(self, why: str) -> None:
        if self.suspicion is None and not self.rebuilding:
            self.suspicion = why
