"""Base weights + sealed rounds -> weights, checked against the digests in the log on the way.

It knows nothing of files and records; `peerturb.runlog.fold.sealed_rounds` takes the rounds out of a log.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from peerturb.errors import LogError
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

    Raises:
        LogError: rounds are missing, or the weights differ from those the log was made with; names the round.
        ModelError: the tensors do not fit the manifest.
    """
    assert check_every >= 1
    applied = checked = first_round
    for sealed in rounds:
        if sealed.round < first_round:
            continue
        if until_round is not None and sealed.round >= until_round:
            break
        if sealed.round != applied:
            raise LogError(f"the log goes on with round {sealed.round} where round {applied} should be")
        if (applied - first_round) % check_every == 0:
            _check(sealed, short_digest(run_digest(manifest, weights)), since=checked)
            checked = applied
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
    return run_digest(manifest, weights)


def _check(sealed: SealedRound, digest: int, *, since: int) -> None:
    if digest == sealed.digest:
        return
    found = f"the weights before round {sealed.round} are {digest:08x}, the log was made with {sealed.digest:08x}"
    if sealed.round == since:
        raise LogError(f"{found}: these are not the run's weights at round {since}")
    raise LogError(f"{found}: they part between rounds {since} and {sealed.round}")
