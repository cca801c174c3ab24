"""Base weights + sealed rounds -> weights, checked against the digests in the log on the way.

It knows nothing of files and records; `peerturb.runlog.fold.sealed_rounds` takes the rounds out of a log.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from peerturb import limits
from peerturb.errors import LogError
from peerturb.ids import short_hex
from peerturb.manifest import Manifest
from peerturb.spec import RunSpec
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.update import apply_update

CHECK_EVERY = 16
"""Rounds between digest checks: a digest reads all weights, which for small rounds costs as much as applying one."""


class SealedRound(Protocol):
    """What a sealed round says; `peerturb.protocol.records.RoundSealed` is one."""

    @property
    def round(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def digest(self) -> int: ...
    @property
    def slots(self) -> Sequence[int]: ...
    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def codes(self) -> bytes: ...


def replay(
    rounds: Iterable[SealedRound],
    weights: Sequence[Tensor],
    manifest: Manifest,
    spec: RunSpec,
    *,
    first_round: int = 0,
    until_round: int | None = None,
    check_every: int = CHECK_EVERY,
    progress: Callable[[int], None] | None = None,
    doubt: Callable[[str], None] = lambda why: None,
) -> bytes:
    """Apply sealed rounds to the weights in place; return their run digest, 32 bytes.

    Args:
        rounds: the log's sealed rounds in order; those before `first_round` are skipped.
        weights: the manifest's tensors, with `first_round` rounds applied already.
        manifest: names, shapes and exponents.
        spec: the run's.
        first_round: rounds the weights have: 0 for base weights, more for a checkpoint.
        until_round: stop before this round; None: apply all.
        check_every: compare the weights with the log's digest before the first round and every so many rounds.
        progress: called with the number of rounds the weights have after each one.
        doubt: told of a digest in the last rounds that differs, where these are too few to tell who is right.

    A digest in the log is what the round's contributors say, and one alone in a round can say anything. So a difference
    counts only if no later digest agrees (equal weights cannot have come from different ones) and more than
    `DISPUTES_MAX` rounds differ. Round 0 knows no doubt: the RunSpec names its weights.

    Raises:
        LogError: rounds are missing, or the weights differ from those the log was made with; names the round.
        ModelError: the tensors do not fit the manifest.
    """
    assert check_every >= 1
    applied = first_round
    agreement = _Agreement(first_round)
    for sealed in rounds:
        if sealed.round < first_round:
            continue
        if until_round is not None and sealed.round >= until_round:
            break
        if sealed.round != applied:
            raise LogError(f"the log goes on with round {sealed.round} where round {applied} should be")
        if (applied - first_round) % check_every == 0 or agreement.dispute:
            agreement.compare(sealed, short_digest(run_digest(manifest, weights)))
        apply_update(
            weights,
            manifest,
            family=spec.perturbation.family,
            run_key=spec.run_key,
            round=sealed.round,
            slots=sealed.slots,
            counts=sealed.counts,
            codes=sealed.codes,
            alpha=sealed.alpha,
        )
        applied += 1
        if progress is not None:
            progress(applied)
    agreement.settle(doubt)
    return run_digest(manifest, weights)


class _Agreement:
    """Whether the log's digests agree with the weights, as of the last comparison."""

    def __init__(self, first_round: int) -> None:
        self._since = first_round
        self._differences = 0
        self.dispute = ""
        """The first difference that no agreement has followed."""

    def compare(self, sealed: SealedRound, digest: int) -> None:
        """Take in one comparison.

        Raises:
            LogError: round 0 differs: the RunSpec names its weights too, so there is nobody to doubt.
        """
        if digest == sealed.digest:
            self._since, self._differences, self.dispute = sealed.round, 0, ""
            return
        self._differences += 1
        if not self.dispute:
            where = (
                f"these are not the run's weights at round {self._since}"
                if sealed.round == self._since
                else f"they part between rounds {self._since} and {sealed.round}"
            )
            self.dispute = (
                f"the weights before round {sealed.round} are {short_hex(digest)}, the log was made with "
                f"{short_hex(sealed.digest)}: {where}"
            )
        if sealed.round == 0:
            raise LogError(self.dispute)

    def settle(self, doubt: Callable[[str], None]) -> None:
        """Tell what is left of a dispute: a doubt while few rounds differ, an error when more do.

        Raises:
            LogError: the weights differ from those of the log, and did not agree again.
        """
        if self._differences > limits.DISPUTES_MAX:
            raise LogError(self.dispute)
        if self.dispute:
            doubt(f"{self.dispute}; the log ends {self._differences} rounds on, too few to tell which of them is right")
