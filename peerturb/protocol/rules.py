"""Rules a sealed round must keep by itself and by the RunSpec, and what its codes lead to: step size and scales."""

from itertools import pairwise

from peerturb import limits, mixing, stepping
from peerturb.floats import is_f32
from peerturb.ids import RoundNumber
from peerturb.protocol.records import RoundOpened, RoundSealed
from peerturb.spec import RunSpec


def step_size(spec: RunSpec, round_: RoundNumber, scale: float, codes: bytes, *, fraction: float = 1.0) -> float:
    """Return the alpha that follows from a round's codes, all of one scale, as an f32 value.

    `fraction` is the plateau schedule's.
    """
    return stepping.step_size(spec.step, round_, scale, codes, spec.round.count, fraction=fraction)


def alpha_of(spec: RunSpec, opened: RoundOpened, sealed: RoundSealed, *, fraction: float = 1.0) -> float:
    """Return the same for a record, whatever estimators its run allows."""
    scales, count = (opened.scale, opened.exact_scale), spec.round.count
    return mixing.alpha_after(spec.step, opened.round, scales, sealed.by_estimator(), count, fraction=fraction)


def scales_after(opened: RoundOpened, sealed: RoundSealed) -> tuple[float, float]:
    """Return the scales of the round after, f32 values: the one of all codes and 0, or those of `spsa` and `exact`."""
    return mixing.scales_after((opened.scale, opened.exact_scale), sealed.by_estimator())


def codes_max(spec: RunSpec, *, is_exact: bool) -> int:
    """Return the most codes of one contribution."""
    return spec.perturbation.exact_rules.codes if is_exact else spec.round.probes_max


def shape_objection(record: RoundSealed) -> str | None:
    """Say what is wrong with a sealed round looked at alone, or return None."""
    slots, counts = record.slots, record.counts
    if not slots:
        return "holds no contribution"
    if len(slots) > limits.SESSIONS_MAX:
        return f"holds {len(slots)} contributions, more than {limits.SESSIONS_MAX}"
    if len(slots) != len(counts):
        return f"has {len(slots)} slots and {len(counts)} counts"
    if any(low >= high for low, high in pairwise(slots)):
        return "has slots that do not ascend"
    if slots[0] < 0 or slots[-1] >= limits.SLOTS_MAX:
        return f"names a slot outside 0..{limits.SLOTS_MAX - 1}"
    if min(counts) < 1 or max(counts) > limits.PROBES_PER_CONTRIBUTION_MAX:
        return f"has a contribution outside 1..{limits.PROBES_PER_CONTRIBUTION_MAX} codes"
    if sum(counts) != len(record.codes):
        return f"has counts of {sum(counts)} in all and {len(record.codes)} codes"
    if record.exact and not _is_part(record):
        return "calls contributions exact that it does not hold, or in another order"
    return None if is_f32(record.alpha) else f"has step size {record.alpha!r}, which is not an f32 number"


def estimator_objection(record: RoundSealed, spec: RunSpec) -> str | None:
    """Say which contribution the RunSpec does not allow, by its estimator or its number of codes."""
    exact = set(record.exact)
    for slot, count in zip(record.slots, record.counts, strict=True):
        is_exact = slot in exact
        if not spec.perturbation.allows("exact" if is_exact else "spsa"):
            return f"holds {'exact' if is_exact else 'spsa'} codes of slot {slot}, which the RunSpec does not allow"
        if count > codes_max(spec, is_exact=is_exact):
            return f"has a contribution outside 1..{codes_max(spec, is_exact=is_exact)} codes"
    return None


def _is_part(record: RoundSealed) -> bool:
    exact = set(record.exact)
    return record.exact == tuple(slot for slot in record.slots if slot in exact)
