"""What a peer's machine tells about itself, for displays."""

from dataclasses import dataclass
from enum import Enum

from peerturb.ids import Slot


class Session(Enum):
    """How a peer stands with the coordinator."""

    WAITING = "waiting"
    """Not connected; tries again at a set time."""
    CONNECTING = "connecting"
    """`Connect` was given; neither `connected` nor `disconnected` has come."""
    JOINING = "joining"
    """The stream stands, the Hello is on its way."""
    JOINED = "joined"
    PAUSED = "paused"
    """Not connected, at our own wish; connects again when told to go on."""
    STOPPED = "stopped"

    @property
    def has_stream(self) -> bool:
        """Whether a stream stands, or is being opened."""
        return self in (Session.CONNECTING, Session.JOINING, Session.JOINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """What a peer is doing, for displays."""

    session: Session
    slot: Slot | None
    position: int
    head: int
    """Length of the log when the coordinator admitted us."""
    rounds_sealed: int
    rounds_applied: int
    measuring: int | None
    """Round being measured."""
    backlog: int
    """Records received and not yet taken in."""
    digest: int
    is_finished: bool
    contributions: int
    """Contributions that stand in sealed rounds, ever."""
    warning: str
    """Why the run seems to diverge and what to do; empty while it does not."""
