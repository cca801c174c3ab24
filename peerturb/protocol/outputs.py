"""What a machine asks its shell to do, in order. The shell persists every `Append` before any later `Send`.

Records need no `Send`: the shell streams the persisted log to every session from that session's own position (the
feed), so live rounds, catch-up and rejoin are one code path. `peerturb.protocol.driver` is the loop that does it.
"""

from dataclasses import dataclass
from typing import NewType

from peerturb.errors import RejectCode
from peerturb.ids import RoundNumber
from peerturb.protocol.messages import FromPeer, ToPeer
from peerturb.protocol.records import Record, RoundSealed

SessionId = NewType("SessionId", int)
"""The shell's number for one stream; never reused within a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Persist the record, then call `apply(record)`, then go on. If that fails, stop here: nothing has changed."""

    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Coordinator's machine: send a message to one session."""

    session: SessionId
    message: ToPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Coordinator's machine: refuse, and count it under `code`; close the session if `closes`."""

    session: SessionId
    code: RejectCode
    why: str
    closes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A sentence for operators' logs, emitted when it changes; `code` is a bounded metric label."""

    code: str
    text: str


CoordinatorOutput = Append | Send | Reject | Notice


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Peer's machine: open a session now and send `machine.hello(chain)` once the stream stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    """Peer's machine: close the session, if one is open; a `Connect` follows later."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HangUp:
    """Peer's machine: end the session once what was said is sent; no `Connect` follows before `resume`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """Peer's machine: send a message on the open session."""

    message: FromPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Peer's machine: measure `count` probes of `round` (samples 0..count-1), encode with `scale`."""

    round: RoundNumber
    scale: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Peer's machine: update the weights with a sealed round; answer `Applied` with the new short digest.

    Work (`Measure`, `Apply`, `Evaluate`, `Rebuild`) is done one piece after another in the order given.
    """

    sealed: RoundSealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Peer's machine: held-out evaluation of the weights after `round` rounds."""

    round: RoundNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Peer's machine: throw the weights away and replay the whole local log from the base weights; answer `Rebuilt`."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelMeasure:
    """Peer's machine: the round is sealed without us; stop measuring it as soon as possible.

    The `Measure` is still answered, with `Measured`; its codes may be empty and are not looked at.
    """

    round: RoundNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Peer's machine: the run is over or we are not wanted; `refusal` is None at a regular end."""

    code: RejectCode | None
    why: str


Work = Measure | Apply | Evaluate | Rebuild
PeerOutput = (
    Append | Connect | Disconnect | HangUp | Say | Measure | Apply | Evaluate | Rebuild | CancelMeasure | Stop | Notice
)
