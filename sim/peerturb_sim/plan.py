"""`peerturb sim plan`: what a run would take. Round time, bytes, energy and the bottleneck, by sums a person can check.

Expected values for peers that are all there and lines that behave; for what goes wrong, simulate. It says nothing about
how many rounds a task needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peerturb import limits
from peerturb.errors import SpecError
from peerturb_sim import amounts
from peerturb_sim.factors import FRAMING_BYTES, SEAL_S, Factor
from peerturb_sim.jobs import Job
from peerturb_sim.speeds import Machine, Work, memory
from peerturb_sim.traffic import contribution_bytes, feed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line to the internet."""

    down_mbit: float
    up_mbit: float
    latency_ms: float
    """One way."""

    def __str__(self) -> str:
        return f"{self.down_mbit:g} Mbit/s down, {self.up_mbit:g} up, {self.latency_ms:g} ms one way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Equal cards."""

    name: str
    count: int
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a round takes of each peer of a group."""

    name: str
    title: str
    source: str
    """Where the card's figures come from."""
    count: int
    probes: int
    memory: Work
    """Bytes, in `seconds`' place."""
    probing: Work
    up: Work
    down: Work
    updating: Work
    waiting_s: float
    """Time in a round that it waits for slower peers."""
    watt_hours: float | None
    """Of one peer in a round, while it computes; None where its watts are not known."""

    @property
    def seconds(self) -> float:
        """From the arrival of a round's opening to that of the next, sealing apart."""
        return self.probing.seconds + self.up.seconds + self.down.seconds + self.updating.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole answer."""

    job: Job
    line: Line
    coordinator_line: Line
    shares: tuple[Share, ...]
    peers: int
    codes: int
    """Of a round, all peers together."""
    seal_s: float
    round_s: float
    up_bytes: dict[str, int]
    """Message of a round, by group."""
    down_bytes: int
    bytes_each_more: int
    """What one more peer (of the first group) adds to what everybody receives in a round."""
    rounds: int
    bottleneck: str
    bottleneck_s: float
    advice: tuple[str, ...]
    factors: tuple[Factor, ...]

    @property
    def watt_hours(self) -> float | None:
        """Of a round, all peers together; None where a card's watts are not known."""
        known = [share.watt_hours for share in self.shares]
        if any(value is None for value in known):
            return None
        return sum(share.count * (share.watt_hours or 0.0) for share in self.shares)

    def per_hour(self, share: Share) -> tuple[float, float]:
        """Return the bytes that a peer of the group sends and receives in an hour."""
        rounds = 3_600 / self.round_s
        return self.up_bytes[share.name] * rounds, self.down_bytes * rounds

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        energy = self.watt_hours
        return {
            "model": {
                "name": self.job.model.name, "parameters": self.job.model.parameters, "trained": self.job.model.trained,
                "dtype": self.job.spec.model.dtype, "compute_dtype": self.job.compute_dtype,
            },
            "peers": self.peers, "codes_per_round": self.codes, "rounds": self.rounds,
            "round_s": self.round_s, "seal_s": self.seal_s,
            "total_s": self.rounds * self.round_s,
            "down_bytes_per_round": self.down_bytes, "bytes_per_more_peer": self.bytes_each_more,
            "energy_wh_per_round": energy, "energy_wh": None if energy is None else energy * self.rounds,
            "bottleneck": self.bottleneck, "bottleneck_s": self.bottleneck_s, "advice": list(self.advice),
            "cards": [self._card(share) for share in self.shares],
            "factors": [{"value": factor.value, "source": factor.source} for factor in self.factors],
        }  # fmt: skip

    def _card(self, share: Share) -> dict[str, Any]:
        up, down = self.per_hour(share)
        return {
            "card": share.name, "title": share.title, "source": share.source,
            "count": share.count, "probes": share.probes,
            "memory_bytes": share.memory.seconds, "probing_s": share.probing.seconds, "up_s": share.up.seconds,
            "down_s": share.down.seconds, "update_s": share.updating.seconds, "waiting_s": share.waiting_s,
            "up_bytes_per_round": self.up_bytes[share.name], "up_bytes_per_hour": up, "down_bytes_per_hour": down,
            "energy_wh_per_round": share.watt_hours,
            "sums": {
                "memory": share.memory.sum, "probing": share.probing.sum, "up": share.up.sum, "down": share.down.sum,
                "update": share.updating.sum,
            },
        }  # fmt: skip


def plan(job: Job, groups: Sequence[Group], *, line: Line, coordinator_line: Line) -> Plan:
    """Work it out.

    Raises:
        SpecError: no peers, more than a coordinator admits, a card without room for the model, or no number of rounds.
    """
    peers = sum(group.count for group in groups)
    if not peers:
        raise SpecError("a run without peers takes for ever: give --cards, for instance 3:rtx4090")
    if peers > limits.SESSIONS_MAX:
        raise SpecError(
            f"{peers:,} peers are more than the {limits.SESSIONS_MAX:,} that one coordinator admits at once"
        )
    if not job.spec.round.count:
        raise SpecError("how many rounds? Give --rounds (round.count of the RUN.toml says 0: until stopped)")
    needed = memory(job)
    for group in groups:
        _check_memory(group, needed, job)
    probes = {group.name: _probes(group, job) for group in groups}
    counts = [probes[group.name] for group in groups for _ in range(group.count)]
    down_bytes = feed_bytes(counts)
    up_bytes = {name: contribution_bytes(count) for name, count in probes.items()}
    up_all = sum(up_bytes[group.name] * group.count for group in groups)
    latency_ms = line.latency_ms + coordinator_line.latency_ms
    seal_s = SEAL_S.value * peers
    shares = []
    for group in groups:
        share = Share(
            name=group.name, title=group.machine.title, source=group.machine.source, count=group.count,
            probes=probes[group.name], memory=needed,
            probing=group.machine.probing(job, probes[group.name]),
            up=_transfer(up_bytes[group.name], up_all, line.up_mbit, coordinator_line.down_mbit, latency_ms),
            down=_transfer(down_bytes, down_bytes * peers, line.down_mbit, coordinator_line.up_mbit, latency_ms),
            updating=group.machine.updating(job, sum(counts)), waiting_s=0.0, watt_hours=None,
        )  # fmt: skip
        shares.append(share)
    slowest = max(shares, key=lambda share: share.seconds)
    round_s = slowest.seconds + seal_s
    shares = [_with_waiting(share, group, slowest.seconds) for share, group in zip(shares, groups, strict=True)]
    bottleneck, bottleneck_s = _bottleneck(slowest, seal_s)
    factors = {factor: None for group in groups for factor in group.machine.factors if _is_used(factor, job)}
    return Plan(
        job=job, line=line, coordinator_line=coordinator_line, shares=tuple(shares), peers=peers, codes=sum(counts),
        seal_s=seal_s, round_s=round_s, up_bytes=up_bytes, down_bytes=down_bytes,
        bytes_each_more=feed_bytes([*counts, counts[0]]) - down_bytes, rounds=job.spec.round.count,
        bottleneck=bottleneck, bottleneck_s=bottleneck_s, advice=tuple(_advice(shares, slowest, seal_s, job)),
        factors=(*factors, SEAL_S, FRAMING_BYTES),
    )  # fmt: skip


def _is_used(factor: Factor, job: Job) -> bool:
    """Whether a factor is of the type of the losses, or of both."""
    other = "half precision" if job.compute_dtype == "float32" else "in float32"
    return other not in factor.source


def _check_memory(group: Group, needed: Work, job: Job) -> None:
    room = group.machine.memory_bytes
    if needed.seconds > room:
        raise SpecError(
            f"{job.model.name} does not fit {group.name} ({group.machine.title}): {needed.sum} = "
            f"{amounts.size(needed.seconds)}, it has {amounts.size(room)}. Take a smaller model, --dtype bfloat16, or "
            "leave that card out"
        )


def _probes(group: Group, job: Job) -> int:
    """Return what a peer sends: `probes_max`, or under a budget of time what fits it, at least one."""
    rules = job.spec.round
    if not rules.budget_ms:
        return rules.probes_max
    each_s = group.machine.probing(job, rules.probes_max).seconds / rules.probes_max
    return max(1, min(rules.probes_max, int(rules.budget_ms / 1e3 / each_s)))


def _transfer(own: int, all_: int, own_mbit: float, far_mbit: float, latency_ms: float) -> Work:
    """Return the time until the last peer's message is over: its own line or the coordinator's, whichever is slower."""
    near_s, far_s = own * 8e-6 / own_mbit, all_ * 8e-6 / far_mbit
    if near_s >= far_s:
        said = f"{own:,} B x 8 / {own_mbit:g} Mbit/s"
    else:
        said = f"{all_:,} B of all peers x 8 / {far_mbit:g} Mbit/s of the coordinator"
    return Work(seconds=max(near_s, far_s) + latency_ms / 1e3, sum=f"{said} + {latency_ms:g} ms")


def _with_waiting(share: Share, group: Group, longest_s: float) -> Share:
    busy_s = share.probing.seconds + share.updating.seconds
    watts = group.machine.watts
    return replace(
        share, waiting_s=longest_s - share.seconds, watt_hours=None if watts is None else watts * busy_s / 3_600
    )


def _bottleneck(slowest: Share, seal_s: float) -> tuple[str, float]:
    parts = {
        f"forward passes of {slowest.name}": slowest.probing.seconds,
        f"updates on {slowest.name}": slowest.updating.seconds,
        "the way up to the coordinator": slowest.up.seconds,
        "the way down to the peers": slowest.down.seconds,
        "sealing": seal_s,
    }
    name = max(parts, key=lambda key: parts[key])
    return name, parts[name]


def _advice(shares: Sequence[Share], slowest: Share, seal_s: float, job: Job) -> list[str]:
    said = []
    others = [share.seconds for share in shares if share.name != slowest.name]
    if others and max(others) < 0.5 * slowest.seconds:
        without = amounts.seconds(max(others) + seal_s)
        said.append(
            f"everybody waits for {slowest.name}: without it a round takes about {without}. round.budget_ms lets slow "
            "cards send fewer codes instead"
        )
    longest_s = job.spec.round.deadline_ms_max / 1e3
    for share in shares:
        if share.seconds > longest_s:
            said.append(
                f"{share.name} needs {amounts.seconds(share.seconds)} for a round, but the run waits at most "
                f"{amounts.seconds(longest_s)} (round.deadline_ms_max): its codes come too late"
            )
    if "way down" in _bottleneck(slowest, seal_s)[0]:
        said.append(
            "what everybody receives grows with the peers: fewer probes each, or a faster line for the coordinator"
        )
    return said
