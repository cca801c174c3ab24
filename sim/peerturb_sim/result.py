"""`result.json`: what a simulated run was and what became of it, for reports and tools (`docs/simulator.md`).

Nothing in here depends on the machine that simulated: the same scenario and seed give the same bytes. Times are virtual
seconds since the start. It knows neither worlds nor pages.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peerturb.errors import PeerturbError

FORMAT = "peerturb-sim-result"
VERSION = 1


class ResultError(PeerturbError):
    """A result file cannot be read, or is of another version."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One sealed round."""

    round: int
    opened_s: float
    sealed_s: float
    reason: str
    """Why it was sealed: everyone or deadline."""
    loss: float | None
    """Training loss of the sealed round; None where no contribution had a finite one."""
    peers: int
    """Contributions in it."""
    connected: int
    """Members with a session when it was sealed."""
    codes: int
    void_codes: int
    scale: float
    alpha: float
    bytes_up: int
    """Bytes of messages that reached the coordinator from its opening (of round 0: from the start) to its seal."""
    bytes_down: int
    """Bytes of messages that the coordinator sent meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """A held-out evaluation that stands in the log."""

    round: int
    """Rounds applied to the evaluated weights."""
    at_s: float
    peer: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """Something that went wrong, or was made to."""

    at_s: float
    until_s: float | None
    """None for what has no duration, or lasted to the end."""
    kind: str
    """coordinator_crash, peer_crash, pause, partition, cut, disk_loss, store_refuses, corruption."""
    who: str
    """`coordinator`, or a peer's name; for partitions the number of peers."""
    text: str = ""
    """What became of it; of a corruption that lasted to the end, whether the weights were still wrong then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One peer, over the whole run. A peer that lost its disk came back under further slots."""

    peer: int
    """Its number in the world, from 0."""
    name: str
    group: str
    slots: list[int]
    lie: str
    """What kind of liar it was, empty for an honest peer."""
    probes_per_s: float
    present_s: float
    """Time its process ran."""
    sessions: int
    """Streams it opened."""
    measured: int
    """Probes it measured."""
    contributions: int
    """Contributions that stand in sealed rounds."""
    codes: int
    """Codes that stand in sealed rounds."""
    refused: int
    """Refusals that reached it, of whatever kind."""
    crashes: int
    rebuilds: int
    bytes_up: int
    bytes_down: int
    stopped: str
    """Why its machine stopped before the end; empty if it did not or the run was over."""
    estimator: str = "spsa"
    """How it found its codes, `spsa` or `exact`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRow:
    """An invariant that a checker saw broken."""

    at_s: float
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """The run log that was written beside the result."""

    file: str
    records: int
    bytes: int
    chain: str
    """Chain hash after its last record, hex: two logs are equal if this is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The whole document."""

    name: str
    seed: int
    compute: str
    scenario: dict[str, Any]
    """The scenario with every default written out."""
    spec_digest: str
    is_finished: bool
    """Whether all rounds were sealed."""
    virtual_s: float
    log: LogRow
    rounds: list[RoundRow] = field(default_factory=list)
    evaluations: list[EvaluationRow] = field(default_factory=list)
    faults: list[FaultRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)
    seals: dict[str, int] = field(default_factory=dict)
    """Sealed rounds by reason."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Refusals by code, those that happened."""
    bytes_up: int = 0
    bytes_down: int = 0
    is_interrupted: bool = False
    """Whether somebody stopped the simulation: another run of it goes further."""
    waiting_for: str = ""
    """What the open round waited for where the run ended before all were sealed."""

    def to_json(self) -> str:
        """Return the document; numbers that JSON does not have (NaN, infinities) become null."""
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "Result":
        """Read a document; `source` is named in errors.

        Raises:
            ResultError: not a result, or of another version.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ResultError(f"{source} is not JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ResultError(f"{source} is not a result of `peerturb sim run`: it does not say format {FORMAT!r}")
        version = document.pop("version", None)
        if version != VERSION:
            raise ResultError(f"{source} has version {version}; this program reads version {VERSION}: simulate again")
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ResultError(f"{source} is not a whole result: {where}: {first['msg']}; simulate again") from error

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read `result.json`.

        Raises:
            ResultError: unreadable, not a result, or of another version.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ResultError(f"cannot read {path}: {why}; `peerturb sim run SCENARIO.toml` writes one") from error


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
