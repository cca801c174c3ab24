"""What happened in the demo so far, folded from the nodes' JSON events and the orchestrator's own notes.

It knows no process, socket, clock or terminal: its owner sets `at_s`, the seconds since the demo began.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PeerState = Literal["starting", "loading", "joining", "catching up", "training", "reconnecting", "killed", "stopped"]
MarkKind = Literal["kill", "join", "restart"]

HARMLESS_REFUSALS = ("stale_round", "shutting_down", "run_finished")
"""Codes that are part of any run: a contribution after the seal, the coordinator's stop, the run's end."""

RATE_WINDOW_ROUNDS = 12
"""Rounds over which shown speeds and bytes per code are averaged."""


@dataclass(slots=True, kw_only=True)
class Peer:
    """One node process as its events tell it."""

    name: str
    pid: int = 0
    state: PeerState = "starting"
    slot: int | None = None
    round: int | None = None
    """Rounds applied to its weights."""
    digest: str = ""
    """Last digest it reported, 8 hex digits."""
    codes_up: int = 0
    """Codes it sent that were sealed."""
    codes_down: int = 0
    """Codes it received in sealed rounds, its own included."""
    rounds_part: int = 0
    """Sealed rounds that hold a contribution of it."""
    rounds_received: int = 0
    bytes_up: int = 0
    """Socket bytes above TCP, node to coordinator."""
    bytes_down: int = 0
    is_late: bool = False
    """It joined in mid-run, by replay."""
    replayed: int = 0
    """Rounds it applied before the first that holds a contribution of its own."""
    join_s: float | None = None
    """Seconds from its process's start to its first training round."""
    last_round: int = -1
    """Highest round it has reported; rounds must come in order, each once."""
    disorder: int = 0
    """Rounds it skipped or saw twice: must stay 0."""
    measured: dict[int, int] = field(default_factory=dict)
    """Codes it has measured by round, of rounds not yet applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPoint:
    """One sealed round, when the first node reported it."""

    round: int
    at_s: float
    loss: float
    codes: int
    peers: int
    duration_ms: float
    """Since the round before; NaN for the first."""
    bytes_up: int
    """Socket bytes so far, all nodes."""
    bytes_down: int
    codes_up: int
    """Codes so far, summed over the nodes that sent them."""
    codes_down: int
    """Codes so far, summed over the nodes that received them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPoint:
    """One held-out evaluation."""

    round: int
    at_s: float
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something the demo did to the network, for curves and timeline."""

    kind: MarkKind
    round: int
    at_s: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the timeline."""

    at_s: float
    round: int
    text: str
    tone: Literal["plain", "good", "bad", "act"] = "plain"


@dataclass(slots=True, kw_only=True)
class Story:
    """Everything the live view, the summary and the report show."""

    rounds_planned: int = 0
    seconds_planned: float = 0.0
    parameters: int = 0
    """Trained parameters; 0 until a node has loaded the model."""
    phase: str = "starting"
    """One sentence: what is happening now."""
    at_s: float = 0.0
    """Seconds since the demo began; its owner moves it on."""
    peers: dict[str, Peer] = field(default_factory=dict)
    rounds: list[RoundPoint] = field(default_factory=list)
    evals: list[EvalPoint] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    killed: int = 0
    joined: int = 0
    coordinator_restarts: int = 0
    _digests: dict[int, dict[str, str]] = field(default_factory=dict)

    # -- what the orchestrator tells -----------------------------------------------------------------------------

    def say(self, text: str, *, tone: Literal["plain", "good", "bad", "act"] = "plain", is_phase: bool = True) -> None:
        """Add a line to the timeline; by default it is also what happens now."""
        self.entries.append(Entry(at_s=self.at_s, round=self.round, text=text, tone=tone))
        if is_phase:
            self.phase = text

    def mark(self, kind: MarkKind, label: str) -> None:
        """Mark the present moment on all curves."""
        self.marks.append(Mark(kind=kind, round=self.round, at_s=self.at_s, label=label))

    def add_peer(self, name: str, *, pid: int, is_late: bool = False) -> Peer:
        """Note that a node process was started."""
        peer = Peer(name=name, pid=pid, is_late=is_late)
        self.peers[name] = peer
        return peer

    # -- what the nodes tell -------------------------------------------------------------------------------------

    def take(self, name: str, event: Mapping[str, Any]) -> None:
        """Fold one event of a node. Unknown kinds and missing fields are passed over: a display must not stop a run."""
        peer = self.peers.get(name)
        if peer is None or peer.state == "killed":
            return
        match event.get("event"):
            case "start":
                peer.state = "loading"
            case "model":
                peer.state = "joining"
                self.parameters = _integer(event.get("parameters"), self.parameters)
            case "joined":
                peer.slot = _integer(event.get("slot"), 0)
                peer.state = "joining" if peer.round is None else "training"
            case "behind":
                peer.state = "catching up"
            case "training":
                peer.state = "training"
                if peer.join_s is None:
                    peer.join_s = _number(event.get("seconds"))
            case "disconnected":
                if peer.state == "joining":  # one that trains is only cut off for a while: its state says so
                    self._complain(f"{name} was turned away: {event.get('why')}")
                peer.state = "reconnecting"
            case "refused" if event.get("code") not in HARMLESS_REFUSALS:
                self._complain(f"{name} was refused: {event.get('why')}")
            case "measured":
                peer.measured[_integer(event.get("round"), -1)] = _integer(event.get("codes"), 0)
            case "rebuild":
                peer.last_round = -1
                self.say(f"{name} rebuilds its weights from its log: {event.get('why')}", tone="bad", is_phase=False)
            case "round":
                self._take_round(peer, event)
            case "eval":
                self._take_eval(event)
            case "stop":
                peer.state = "stopped"

    def _complain(self, text: str) -> None:
        """Add a line to the timeline unless it is there already."""
        if all(entry.text != text for entry in self.entries):
            self.say(text, tone="bad", is_phase=False)

    def _take_round(self, peer: Peer, event: Mapping[str, Any]) -> None:
        round = _integer(event.get("round"), -1)
        if round < 0:
            return
        if round <= peer.last_round or (round > peer.last_round + 1 and peer.last_round >= 0):
            peer.disorder += 1
        peer.last_round = max(peer.last_round, round)
        peer.round = round
        peer.rounds_received += 1
        codes = _integer(event.get("codes"), 0)
        # `round` counts applied rounds: the one just sealed, and measured, is the one before.
        own = peer.measured.pop(round - 1, 0)
        peer.codes_down += codes
        if event.get("own") is True and own:
            peer.codes_up += own
            peer.rounds_part += 1
            peer.state = "training"
        elif not peer.rounds_part:
            peer.replayed += 1
            peer.state = "catching up" if peer.is_late else peer.state
        digest = event.get("digest")
        if isinstance(digest, str) and digest:
            peer.digest = digest
            self._digests.setdefault(round, {})[peer.name] = digest
        if not self.rounds or round > self.rounds[-1].round:
            self._add_round(round, codes, event)

    def _add_round(self, round: int, codes: int, event: Mapping[str, Any]) -> None:
        since_s = self.at_s - self.rounds[-1].at_s if self.rounds else math.nan
        peers = self.peers.values()
        self.rounds.append(
            RoundPoint(
                round=round,
                at_s=self.at_s,
                loss=_number(event.get("loss")),
                codes=codes,
                peers=_integer(event.get("peers"), 0),
                duration_ms=1_000 * since_s,
                bytes_up=sum(p.bytes_up for p in peers),
                bytes_down=sum(p.bytes_down for p in peers),
                codes_up=sum(p.codes_up for p in peers),
                codes_down=sum(p.codes_down for p in peers),
            )
        )

    def _take_eval(self, event: Mapping[str, Any]) -> None:
        accuracy = event.get("accuracy")
        point = EvalPoint(
            round=_integer(event.get("round"), self.round),
            at_s=self.at_s,
            loss=_number(event.get("loss")),
            accuracy=_number(accuracy),
        )
        if all(point.round != other.round for other in self.evals):
            self.evals.append(point)
            self.evals.sort(key=lambda p: p.round)

    # -- what the views read -------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Rounds sealed so far, as far as any node has reported."""
        return self.rounds[-1].round if self.rounds else 0

    @property
    def probes(self) -> int:
        """Codes in all sealed rounds."""
        return sum(point.codes for point in self.rounds)

    @property
    def rounds_per_s(self) -> float:
        """Speed over the last rounds; 0 before there are two."""
        recent = self.rounds[-RATE_WINDOW_ROUNDS:]
        if len(recent) < 2 or recent[-1].at_s <= recent[0].at_s:
            return 0.0
        return (recent[-1].round - recent[0].round) / (recent[-1].at_s - recent[0].at_s)

    @property
    def bytes_up(self) -> int:
        """Socket bytes from all nodes to the coordinator."""
        return sum(peer.bytes_up for peer in self.peers.values())

    @property
    def bytes_down(self) -> int:
        """Socket bytes from the coordinator to all nodes."""
        return sum(peer.bytes_down for peer in self.peers.values())

    @property
    def bytes_up_per_code(self) -> float:
        """Socket bytes up per code sent; NaN before the first."""
        return _ratio(self.bytes_up, sum(peer.codes_up for peer in self.peers.values()))

    @property
    def bytes_down_per_code(self) -> float:
        """Socket bytes down per code received; NaN before the first."""
        return _ratio(self.bytes_down, sum(peer.codes_down for peer in self.peers.values()))

    def bytes_per_code_by_round(self) -> list[tuple[int, float, float]]:
        """Return (round, bytes up per code, bytes down per code), each over the last `RATE_WINDOW_ROUNDS` rounds."""
        rows = []
        for start, end in zip(self.rounds, self.rounds[RATE_WINDOW_ROUNDS:], strict=False):
            sent, received = end.codes_up - start.codes_up, end.codes_down - start.codes_down
            if sent > 0 and received > 0:
                up, down = end.bytes_up - start.bytes_up, end.bytes_down - start.bytes_down
                rows.append((end.round, up / sent, down / received))
        return rows

    @property
    def compared(self) -> int:
        """Rounds whose digest at least two nodes reported."""
        return sum(len(row) > 1 for row in self._digests.values())

    def mismatches(self) -> list[int]:
        """Return the rounds in which two nodes reported different digests."""
        return sorted(round for round, row in self._digests.items() if len(set(row.values())) > 1)

    @property
    def are_digests_equal(self) -> bool:
        """At least one comparison was made, and none failed."""
        return self.compared > 0 and not self.mismatches()

    @property
    def full_gradient_bytes(self) -> int:
        """Cost of the same exchange with f32 gradients: one up per contribution, one down per round received."""
        up = sum(peer.rounds_part for peer in self.peers.values())
        down = sum(peer.rounds_received for peer in self.peers.values())
        return (up + down) * self.parameters * 4


def _integer(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _ratio(amount: int, count: int) -> float:
    return amount / count if count else math.nan
