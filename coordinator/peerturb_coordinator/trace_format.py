"""The lines of a membership trace: what a coordinator's machine was told, and when; not what peers computed.

A trace is JSON Lines, a header first. With the run log's rules, base weights and data it says all that a run log
follows from: who came and went, which contributions and evaluations arrived in which order, what the clock said when
the machine decided, what the store refused, where the coordinator was started anew. Codes, losses and digests of what
was measured are left out, so whoever reproduces a run must compute them again. It knows no files.
"""

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from peerturb import limits

FORMAT: Final = "peerturb-membership-trace"
VERSION: Final = 1
LINE_BYTES_MAX = 4_096
"""A hello is the longest: four digests of 64 letters, and a name of NAME_CHARS_MAX escaped characters of 12 bytes."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TraceFormatError(ValueError):
    """A line that is none; the message says why, its reader knows where."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Header(_Line):
    """Line 1."""

    format: Literal["peerturb-membership-trace"] = FORMAT
    version: Literal[1] = VERSION
    spec: Hex32
    """The RunSpec's digest."""


class _Input(_Line):
    """What the machine was told at a time."""

    now_ms: Count
    """The machine's clock: milliseconds from any start, which a restart may set back."""


class Start(_Input):
    """A coordinator began (again): a machine that has folded the log."""

    do: Literal["start"] = "start"
    records: Count
    """Of the log it found. Fewer than the trace before gives: the last ones were decided, but never written."""


class HelloLine(_Input):
    """A peer passed the checks of token, identity and chain."""

    do: Literal["hello"] = "hello"
    session: Count
    key: Hex32
    name: str = Field(max_length=limits.NAME_CHARS_MAX)
    protocol: Count
    spec: Hex32
    base: Hex32
    manifest: Hex32
    position: Count


class ContributionLine(_Input):
    """A contribution came."""

    do: Literal["contribution"] = "contribution"
    session: Count
    round: Count
    count: int = Field(ge=0, le=limits.PROBES_PER_CONTRIBUTION_MAX)
    """Number of codes."""
    exact: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether they are exact projections; left out where they are not, so that older traces keep their bytes."""


class EvaluationLine(_Input):
    """A held-out evaluation of the weights after `round` rounds came."""

    do: Literal["evaluation"] = "evaluation"
    session: Count
    round: Count


class SessionLine(_Input):
    """A peer said goodbye, sent a proof where none was due, or its stream ended."""

    do: Literal["leave", "proof", "disconnected"]
    session: Count


class Tick(_Input):
    """Nothing came; time had passed. Only written where the machine decided something."""

    do: Literal["tick"] = "tick"


class Refused(_Line):
    """The store took no records beyond these during the input of the line before."""

    do: Literal["refused"] = "refused"
    records: Count


Line = Annotated[
    Start | HelloLine | ContributionLine | EvaluationLine | SessionLine | Tick | Refused, Field(discriminator="do")
]
_LINES: TypeAdapter[Any] = TypeAdapter(Line)


def encode(line: BaseModel) -> bytes:
    """Return a line's bytes, its end included."""
    return json.dumps(line.model_dump(), separators=(",", ":")).encode("ascii") + b"\n"


def decode_header(data: bytes) -> Header:
    """Read line 1.

    Raises:
        TraceFormatError: it is not the first line of a trace of this version.
    """
    try:
        found = _json(data)
    except TraceFormatError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise TraceFormatError(f'this is no membership trace: the first line of one says "format":"{FORMAT}"')
    if found.get("version") != VERSION:
        raise TraceFormatError(
            f"the trace has version {found.get('version')!r}, this program reads version {VERSION}: "
            "use the program that wrote it"
        )
    try:
        return Header.model_validate(found)
    except ValidationError as error:
        raise TraceFormatError(_explain(error)) from error


def decode(data: bytes) -> Any:
    """Read a line after the first, one of `Line`.

    Raises:
        TraceFormatError: it is none.
    """
    try:
        return _LINES.validate_python(_json(data))
    except ValidationError as error:
        raise TraceFormatError(_explain(error)) from error


def _json(data: bytes) -> Any:
    if len(data) > LINE_BYTES_MAX:
        raise TraceFormatError(f"a line has at most {LINE_BYTES_MAX} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceFormatError("not JSON") from error


def _explain(error: ValidationError) -> str:
    rows = []
    for item in error.errors(include_url=False, include_input=False):
        # The union's tag stands first.
        where = ".".join(map(str, item["loc"]))
        rows.append(f"{where}: {item['msg']}" if where else item["msg"])
    return "; ".join(rows)
