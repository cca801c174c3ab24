"""A scenario: who takes part, over which lines, what goes wrong and when. Strict: an unknown key is an error.

It only describes; `peerturb_sim.world` makes it happen. Rates are Poisson, drawn from the seed per peer and purpose.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from peerturb import limits
from peerturb.errors import SpecError
from peerturb.manifest import DType
from peerturb.noise import Estimator
from peerturb.spec import ObjectiveSpec, PerturbationSpec, RoundSpec, Section, StepSpec
from peerturb_sim.complaints import MisplacedError, explain

Lie = Literal["random", "flipped", "extreme", "replayed", "stale", "silent", "digest"]
"""What a liar sends: random codes; its codes with their signs flipped; always +-127; its codes of the round
before again; contributions to the round before; nothing; the digest of weights that it does not have."""

Seconds = Annotated[float, Field(ge=0, le=366 * 86_400)]
Range = Annotated[tuple[float, float], Field(description="low, high")]


class LineSpec(Section):
    """A peer's line to the internet."""

    latency_ms: float = Field(default=20.0, ge=0, le=60_000)
    """One way, to the coordinator, without jitter."""
    jitter_ms: float = Field(default=5.0, ge=0, le=60_000)
    """Mean of what is added to each message, exponentially distributed."""
    up_mbit: float = Field(default=40.0, gt=0, le=1e6)
    down_mbit: float = Field(default=100.0, gt=0, le=1e6)
    loss: float = Field(default=0.001, ge=0, le=0.5)
    """Probability that a packet is lost; a stream shows it as the time of a retransmission."""
    duplication: float = Field(default=0.0, ge=0, le=0.5)
    """Probability that a packet comes twice; a stream shows it as the time of the second one on the line."""
    reordering: float = Field(default=0.0, ge=0, le=0.5)
    """Probability that packets sent later overtake one; a stream holds them back until it is there."""
    cuts_per_hour: float = Field(default=0.0, ge=0, le=3_600)
    """How often a session's stream breaks."""


LINES: dict[str, LineSpec] = {
    "home": LineSpec(latency_ms=20, jitter_ms=6, up_mbit=20, down_mbit=100, loss=0.002, cuts_per_hour=0.5),
    "fibre": LineSpec(latency_ms=8, jitter_ms=1, up_mbit=300, down_mbit=500, loss=0.0002, cuts_per_hour=0.1),
    "mobile": LineSpec(latency_ms=45, jitter_ms=25, up_mbit=8, down_mbit=40, loss=0.01, cuts_per_hour=6),
    "satellite": LineSpec(latency_ms=300, jitter_ms=30, up_mbit=3, down_mbit=25, loss=0.005, cuts_per_hour=2),
    "data-centre": LineSpec(latency_ms=0.2, jitter_ms=0.05, up_mbit=10_000, down_mbit=10_000, loss=0),
}
"""Lines with a name."""


class LifeSpec(Section):
    """When a peer is there."""

    arrive_s: Range = (0.0, 0.0)
    """It first comes at a time drawn evenly from here."""
    stay_s: Seconds = 0.0
    """Mean time until it says goodbye, exponentially distributed; 0: it stays."""
    away_s: Seconds = 0.0
    """Mean time until it comes back, exponentially distributed; 0: it does not."""
    day_s: Seconds = 0.0
    """Diurnal pattern: length of a day; 0: none. A peer is there while its own evening lasts."""
    awake: float = Field(default=0.4, gt=0, le=1)
    """Part of the day that a peer with a diurnal pattern is there; where its evening begins is drawn."""
    trace: str = ""
    """CSV file (peer,join_s,leave_s; a peer may have several rows; no leave_s: to the end), relative to the scenario.
    Peers are numbered from 0 within the group. Instead of all of the above."""

    @model_validator(mode="after")
    def _ways_do_not_mix(self) -> Self:
        if self.arrive_s[0] < 0 or self.arrive_s[0] > self.arrive_s[1]:
            raise MisplacedError(("arrive_s",), f"{list(self.arrive_s)} is not a range: write [earliest, latest]")
        if self.trace and self.model_fields_set - {"trace"}:
            others = ", ".join(sorted(self.model_fields_set - {"trace"}))
            raise MisplacedError(("trace",), f"a trace says when peers come and go: leave out {others}")
        if self.day_s and (self.stay_s or self.away_s):
            raise MisplacedError(("day_s",), "it says when a peer comes and goes: leave out stay_s and away_s")
        return self


class GroupSpec(Section):
    """Peers of one kind."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[\w.-]+$")
    count: int = Field(ge=1)
    line: LineSpec | str = "home"
    """A line's name, or a table of its own."""
    probes_per_s: Range = (20.0, 60.0)
    """Speed of the card, drawn from this range evenly on a logarithmic scale."""
    estimator: Estimator = "spsa"
    """How these peers find their codes; `perturbation.estimators` must allow it. With `exact` they send
    `perturbation.exact.codes` each round, by one gradient of `gradient_ms`, then at `codes_per_s`."""
    gradient_ms: float = Field(default=500.0, ge=0, le=3_600_000)
    codes_per_s: float = Field(default=20_000.0, gt=0, le=1e9)
    apply_ms: float = Field(default=5.0, ge=0, le=3_600_000)
    """Time of one update."""
    evaluate_ms: float = Field(default=200.0, ge=0, le=3_600_000)
    evaluates: bool = False
    """Whether these peers have held-out examples."""
    life: LifeSpec = LifeSpec()
    lie: Lie | None = None
    """What these peers do instead of telling the truth."""
    crashes_per_hour: float = Field(default=0.0, ge=0, le=3_600)
    down_s: Seconds = 10.0
    """Mean time until a crashed peer is started again."""
    disk_losses: float = Field(default=0.0, ge=0, le=1)
    """Probability that a crash takes the disk, and with it the identity."""
    pauses_per_hour: float = Field(default=0.0, ge=0, le=3_600)
    """How often the process stops for a while: a closed lid, a stopped virtual machine."""
    pause_s: Seconds = 5.0
    drift_ppm: float = Field(default=0.0, ge=0, le=200_000)
    """Its clock goes wrong by up to this many millionths, either way."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        low, high = self.probes_per_s
        if not 0 < low <= high:
            text = f"{[low, high]} is not a range of positive speeds: write [slowest, fastest]"
            raise MisplacedError(("probes_per_s",), text)
        if isinstance(self.line, str) and self.line not in LINES:
            text = f"there is no line {self.line!r}; there are {', '.join(LINES)}, or write a table"
            raise MisplacedError(("line",), text)
        return self

    def measuring_s(self, count: int, probes_per_s: float) -> float:
        """Return the time of so many codes, at the drawn speed of a peer's card."""
        if self.estimator == "exact":
            return self.gradient_ms / 1e3 + count / self.codes_per_s
        return count / probes_per_s

    @property
    def line_spec(self) -> LineSpec:
        """The line, looked up by its name where it has one."""
        return LINES[self.line] if isinstance(self.line, str) else self.line


class FaultSpec(Section):
    """Something that goes wrong at a set time."""

    kind: Literal["coordinator_crash", "partition", "store_refuses", "corruption", "peer_crash"]
    at_s: Seconds
    for_s: Seconds = 10.0
    """How long it lasts (not for `corruption`, which a peer notices by itself)."""
    torn: bool = True
    """A coordinator's crash happens in the middle of a write."""
    group: str = ""
    """Group that is hit; empty: all."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Part of the group that is hit, drawn from the seed; at least one peer."""


class ToySpec(Section):
    """An objective of a few numbers, computed with numpy: thousands of peers in seconds."""

    kind: Literal["toy"] = "toy"
    objective: Literal["quadratic", "logistic"] = "quadratic"
    noise: float = Field(default=1.0, ge=0, le=1e3)
    """Spread of the optimum that different examples have (`quadratic`)."""
    condition: float = Field(default=30.0, ge=1, le=1e6)
    """Largest curvature by smallest (`quadratic`)."""


class RealSpec(Section):
    """A real model: `torch` measures in this process, `ray` on workers of a cluster. Paths are the scenario's."""

    kind: Literal["torch", "ray"]
    model: str = Field(min_length=1)
    """Folder or hub name of the base model."""
    data: tuple[str, ...] = Field(min_length=1)
    """Training data; the peer of slot n has file n, counted round."""
    eval: str = ""
    """Held-out data of the peers that evaluate."""
    dtype: DType = "float32"
    exponents: dict[str, int] = Field(default_factory=dict)
    objective: ObjectiveSpec = ObjectiveSpec()
    threads: int = Field(default=1, ge=1, le=1_024)
    """Of whoever measures. Another number may round losses otherwise, so it is part of what is simulated."""
    rows: int = Field(default=0, ge=0, le=65_536)
    """Most sequences in one forward pass; 0: the engine decides."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workers: int = Field(default=0, ge=0, le=10_000)
    """Of `ray`; 0: as many as processors and memory allow."""
    address: str = ""
    """HOST:PORT of a cluster that runs already, or `auto`; empty: one of this machine, for this simulation."""


class CoordinatorSpec(Section):
    """The coordinator's side of all lines."""

    up_mbit: float = Field(default=1_000.0, gt=0, le=1e6)
    """What it can send, to all peers together. What it hears is so little that it never queues."""


class Scenario(Section):
    """One simulated run."""

    name: str = Field(min_length=1, max_length=limits.NAME_CHARS_MAX)
    seed: int = Field(default=0, ge=0, lt=2**63)
    until_s: Annotated[float, Field(gt=0, le=366 * 86_400)] = 86_400.0
    """Virtual time after which the run is given up if its rounds are not all sealed."""
    round: RoundSpec = RoundSpec(count=100)
    step: StepSpec = StepSpec(learning_rate=0.1)
    perturbation: PerturbationSpec = PerturbationSpec()
    eval_every: int = Field(default=10, ge=0, le=limits.ROUNDS_MAX)
    compute: ToySpec | RealSpec = Field(default=ToySpec(), discriminator="kind")
    coordinator: CoordinatorSpec = CoordinatorSpec()
    peers: tuple[GroupSpec, ...] = Field(min_length=1)
    faults: tuple[FaultSpec, ...] = ()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names: list[str] = []
        total = 0
        for number, group in enumerate(self.peers):
            if group.name in names:
                raise MisplacedError(
                    ("peers", number, "name"), f"an earlier group is called {group.name!r} too: rename"
                )
            if not self.perturbation.allows(group.estimator):
                text = f"perturbation.estimators does not allow {group.estimator!r}: add it there"
                raise MisplacedError(("peers", number, "estimator"), text)
            names.append(group.name)
            total += group.count
            if total > limits.SLOTS_MAX:
                so_far = f"with this group there are {total:,} peers"
                text = f"{so_far}, more than the {limits.SLOTS_MAX:,} slots of a run: lower the counts"
                raise MisplacedError(("peers", number, "count"), text)
        for number, fault in enumerate(self.faults):
            if fault.group and fault.group not in names:
                text = f"there is no group {fault.group!r}; there are {', '.join(names)}"
                raise MisplacedError(("faults", number, "group"), text)
        if self.perturbation.sides != "two":
            text = "virtual peers measure both sides: leave it out"
            raise MisplacedError(("perturbation", "sides"), text)
        if self.round.min_peers > total:
            text = f"no round could be sealed with the {total} peers of this scenario: lower it, or raise a count"
            raise MisplacedError(("round", "min_peers"), text)
        if not self.round.count:
            raise MisplacedError(("round", "count"), "0 is a run without an end: give the number of rounds to simulate")
        return self

    @property
    def total_peers(self) -> int:
        """Peers of all groups."""
        return sum(group.count for group in self.peers)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read SCENARIO.toml.

        Raises:
            SpecError: unreadable, not TOML, or invalid; names the file, the lines of wrong keys, and what to do.
        """
        try:
            text = path.read_text(encoding="utf-8")
            document = tomllib.loads(text)
        except IsADirectoryError as error:
            raise SpecError(f"{path} is a folder: name a scenario, a .toml file") from error
        except OSError as error:
            raise SpecError(f"cannot read {path}: {error.strerror or error}; name a scenario, a .toml file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} is not TOML: {error}") from error
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise SpecError(f"{path} is not a valid scenario: {explain(error, text, cls)}") from error
