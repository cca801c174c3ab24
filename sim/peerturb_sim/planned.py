"""A plan for people: every sum on a line of its own, so that it can be checked."""

from collections.abc import Iterator

from peerturb_sim import amounts
from peerturb_sim.plan import Plan, Share


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    model, spec = plan.job.model, plan.job.spec
    trained = "" if model.trained == model.parameters else f", {model.trained:,} of them trained"
    types = f"{spec.model.dtype}, losses in {plan.job.compute_dtype}"
    yield f"{model.name}: {model.parameters:,} parameters{trained}; {types}"
    yield (
        f"{plan.peers} peers; {plan.rounds:,} rounds of {plan.codes:,} codes; examples of {plan.job.tokens} tokens, "
        f"{spec.objective.examples_per_probe} a probe, {spec.perturbation.sides} sides"
    )
    yield f"peers' lines: {plan.line}"
    yield f"coordinator's line: {plan.coordinator_line}"
    for share in plan.shares:
        yield ""
        yield from _share(plan, share)
    yield ""
    slowest = max(plan.shares, key=lambda share: share.seconds)
    yield _row(
        "seal", f"{plan.peers} peers x {amounts.seconds(plan.seal_s / plan.peers)}", amounts.seconds(plan.seal_s)
    )
    together = f"{amounts.seconds(slowest.seconds)} of {slowest.name} + {amounts.seconds(plan.seal_s)}"
    yield _row("round", together, amounts.seconds(plan.round_s))
    yield _row(
        "whole run",
        f"{plan.rounds:,} rounds x {amounts.seconds(plan.round_s)}",
        amounts.seconds(plan.rounds * plan.round_s),
    )
    yield from _energy(plan)
    yield _row("each peer more", f"adds to what everybody receives: {amounts.size(plan.bytes_each_more)} a round", "")
    yield _row("bottleneck", f"{plan.bottleneck}: {100 * plan.bottleneck_s / plan.round_s:.0f} % of a round", "")
    for advice in plan.advice:
        yield f"  note: {advice}"
    yield ""
    yield "Rests on:"
    for share in plan.shares:
        if share.source:
            yield f"  {share.name}  {share.source}"
    for factor in plan.factors:
        yield f"  {factor.value:g}  {factor.source}"


def _share(plan: Plan, share: Share) -> Iterator[str]:
    up, down = plan.up_bytes[share.name], plan.down_bytes
    yield f"{share.count} x {share.name} ({share.title}), {share.probes} probes a round"
    yield _row("memory", share.memory.sum, amounts.size(share.memory.seconds))
    for name, work in (("probes", share.probing), ("up", share.up), ("down", share.down), ("update", share.updating)):
        yield _row(name, work.sum, amounts.seconds(work.seconds))
    own = amounts.seconds(share.seconds)
    yield _row("own time", "probes + up + down + update", own)
    if share.waiting_s > 0:
        yield _row("waits", "for slower peers", amounts.seconds(share.waiting_s))
    per_code = f"{up:,} B up ({up / share.probes:.3f} B a code), {down:,} B down ({down / plan.codes:.3f} B a code)"
    yield _row("bytes", per_code, "a round")
    up_hour, down_hour = plan.per_hour(share)
    hourly = f"{up:,} x 3600 / {plan.round_s:.4g} up, {down:,} x 3600 / {plan.round_s:.4g} down"
    yield _row("bytes", hourly, f"{amounts.size(up_hour)} + {amounts.size(down_hour)} an hour")


def _energy(plan: Plan) -> Iterator[str]:
    each = plan.watt_hours
    if each is None:
        unknown = ", ".join(share.name for share in plan.shares if share.watt_hours is None)
        yield _row("energy", f"the watts of {unknown} are not known: give --watts", "")
        return
    said = " + ".join(f"{share.count} x {share.watt_hours or 0:.3g} Wh" for share in plan.shares)
    total = each * plan.rounds
    shown = f"{total / 1e3:,.3g} kWh" if total >= 1e3 else f"{total:.3g} Wh"
    yield _row(
        "energy",
        f"({said}) x {plan.rounds:,} rounds (each card's limit while it computes, not while it waits)",
        shown,
    )


def _row(name: str, sum_: str, value: str) -> str:
    return f"  {name:<14} {sum_}" + (f" = {value}" if value and value[0].isdigit() else f" {value}").rstrip()
