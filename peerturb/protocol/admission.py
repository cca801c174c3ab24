"""Why a Hello or a contribution is refused: checks that look at one message and the ledger, nothing else."""

from dataclasses import dataclass

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.ids import short_hex
from peerturb.noise import Estimator
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.messages import Contribution, Hello
from peerturb.protocol.rules import codes_max
from peerturb.spec import PROTOCOL_VERSION, RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """A refusal without its session."""

    code: RejectCode
    why: str
    closes: bool = True


def refusal(
    hello: Hello, *, spec: RunSpec, ledger: Ledger, manifest_digest: bytes | None, sessions: int
) -> Denial | None:
    """Say why a peer may not take part, naming both sides' values; None if it may.

    Args:
        hello: what the peer says about itself.
        spec: the run's.
        ledger: the run's state.
        manifest_digest: what the connected peers train; None if nobody is connected, then the newcomer's word holds.
        sessions: sessions open without this one.
    """
    if hello.protocol != PROTOCOL_VERSION:
        why = f"the peer speaks protocol {hello.protocol}, the coordinator {PROTOCOL_VERSION}: update the older side"
        return Denial(code=RejectCode.PROTOCOL_VERSION, why=why)
    if hello.spec_digest != spec.digest:
        why = f"the peer prepared for RunSpec {_short(hello.spec_digest)}, the run's is {_short(spec.digest)}"
        return Denial(code=RejectCode.SPEC_MISMATCH, why=why)
    if hello.base_digest.hex() != spec.model.digest:
        ours = f"{spec.model.name}, {spec.model.dtype}: {spec.model.digest[:16]}"
        why = f"the peer's base weights are {_short(hello.base_digest)}, the run's ({ours})"
        return Denial(code=RejectCode.MODEL_MISMATCH, why=why)
    if manifest_digest is not None and hello.manifest_digest != manifest_digest:
        why = (
            f"the peer would train the tensors {_short(hello.manifest_digest)}, "
            f"the others train {_short(manifest_digest)}: compare versions of peerturb and transformers"
        )
        return Denial(code=RejectCode.MANIFEST_MISMATCH, why=why)
    if hello.position > ledger.position:
        why = f"the peer's log has {hello.position} records, the run's {ledger.position}: another run's, or cut short"
        return Denial(code=RejectCode.LOG_DIVERGED, why=why)
    if sessions >= limits.SESSIONS_MAX:
        return Denial(code=RejectCode.RUN_FULL, why=f"all {limits.SESSIONS_MAX} sessions are taken; try again later")
    if ledger.member(hello.key) is None and len(ledger.members) >= limits.SLOTS_MAX:
        return Denial(code=RejectCode.RUN_FULL, why=f"all {limits.SLOTS_MAX} slots of the run have been given out")
    return None


def contribution_refusal(message: Contribution, ledger: Ledger, *, spec: RunSpec) -> Denial | None:
    """Say why a member's contribution does not count; None if it does."""
    estimator: Estimator = "exact" if message.is_exact else "spsa"
    if not spec.perturbation.allows(estimator):
        allowed = " and ".join(spec.perturbation.estimators)
        why = f'the contribution is of the estimator "{estimator}", the RunSpec allows {allowed} only'
        return Denial(code=RejectCode.MALFORMED, why=why)
    most = codes_max(spec, is_exact=message.is_exact)
    if len(message.codes) > most:
        why = f"the contribution has {len(message.codes)} codes, the RunSpec allows {most}"
        return Denial(code=RejectCode.TOO_MANY_CODES, why=why)
    if not message.codes:
        return Denial(code=RejectCode.EMPTY_CONTRIBUTION, why="the contribution has no codes")
    if message.round < ledger.sealed_rounds:
        now = f"round {ledger.sealed_rounds} is open" if ledger.open is not None else "no round is open"
        why = f"round {message.round} is already sealed; {now}"
        return Denial(code=RejectCode.STALE_ROUND, why=why, closes=False)
    if ledger.is_finished:
        why = f"all {ledger.sealed_rounds} rounds of the run are sealed"
        return Denial(code=RejectCode.RUN_FINISHED, why=why, closes=False)
    if ledger.open is None or message.round > ledger.open.round:
        why = f"round {message.round} has not been opened; the next to be sealed is {ledger.sealed_rounds}"
        return Denial(code=RejectCode.FUTURE_ROUND, why=why, closes=False)
    first = ledger.spec.first_digest if ledger.spec is not None and message.round == 0 else None
    if first is not None and message.digest != first:
        theirs, ours = short_hex(message.digest), short_hex(first)
        why = f"round 0 was measured on weights {theirs}, the base weights are {ours}: rebuild"
        return Denial(code=RejectCode.DIGEST_MISMATCH, why=why, closes=False)
    return None


def _short(digest: bytes) -> str:
    """Enough of a digest to compare by eye."""
    return digest.hex()[:16]
