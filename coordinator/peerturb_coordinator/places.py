"""Who holds a stream: half-open handshakes and admitted sessions, each kind with its own limit.

Whoever reaches the port can open streams, so strangers have few places of their own and cannot take a member's. It
counts; what is refused and how is the service's affair.
"""

from peerturb import limits
from peerturb.ids import PeerKey
from peerturb.protocol.outputs import SessionId
from peerturb_coordinator.session import Session


class Places:
    """The streams of one coordinator. A stream is half-open until `admit`, and has a place until `leave`."""

    def __init__(self, *, sessions_max: int, half_open_max: int = limits.HALF_OPEN_MAX) -> None:
        """Begin without a stream."""
        self._sessions_max = sessions_max
        self._half_open_max = half_open_max
        self._half_open: dict[SessionId, Session] = {}
        """Oldest first."""
        self._admitted: dict[PeerKey, SessionId] = {}

    def enter(self, session: Session) -> Session | None:
        """Take in a new stream; return the oldest half-open one where it has to make room."""
        self._half_open[session.id] = session
        if len(self._half_open) <= self._half_open_max:
            return None
        return self._half_open.pop(next(iter(self._half_open)))

    def has_room_for(self, key: PeerKey) -> bool:
        """Say whether the identity may become a session; one that has a session already takes that one's place."""
        return key in self._admitted or len(self._admitted) < self._sessions_max

    def admit(self, session: Session, key: PeerKey) -> None:
        """Make a half-open stream the identity's session."""
        self._half_open.pop(session.id, None)
        session.key = key
        self._admitted[key] = session.id

    def leave(self, session: Session) -> None:
        """Forget a stream that has ended."""
        self._half_open.pop(session.id, None)
        if session.key is not None and self._admitted.get(session.key) == session.id:
            del self._admitted[session.key]
