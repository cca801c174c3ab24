"""Who is connected, who is awaited, whose lease runs: the part of the coordinator's state that no record holds.

It knows nothing of rounds' contents. After a restart it is empty but for the leases of the log's members.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from peerturb.ids import PeerKey, Position, Slot
from peerturb.protocol.ledger import Member
from peerturb.protocol.outputs import SessionId
from peerturb.protocol.records import LeaveReason

MISSES_MAX = 2
"""A peer that misses this many deadlines in a row is lagging: not awaited until it contributes again."""

RETURN_GRACE_MS = 5_000
"""After a restart, recent contributors that have not reconnected yet are awaited for this long (or their lease)."""


@dataclass(slots=True, kw_only=True)
class Link:
    """One session whose Hello was accepted."""

    session: SessionId
    key: PeerKey
    name: str
    position: Position
    slot: Slot | None = None
    """None until its `PeerJoined` is in the log (or found there)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A member without a session; at `until_ms` it leaves for `reason`."""

    until_ms: int
    reason: LeaveReason


@dataclass(slots=True, kw_only=True)
class Membership:
    """Sessions and leases.

    Invariant: a member has a session or a lease, never both; an active slot has a session.
    """

    links: dict[SessionId, Link] = field(default_factory=dict)
    leases: dict[Slot, Lease] = field(default_factory=dict)
    active: set[Slot] = field(default_factory=set)
    """Connected slots a round waits for."""
    misses: dict[Slot, int] = field(default_factory=dict)
    """Deadlines missed in a row, by awaited slots."""
    returning: set[Slot] = field(default_factory=set)
    """Slots awaited although they have not reconnected since the restart."""
    returning_until_ms: int = 0
    _waiting: dict[SessionId, Link] = field(default_factory=dict)
    """Sessions without a slot, the oldest first: asked for after every message, so not searched for."""
    _of_key: dict[PeerKey, Link] = field(default_factory=dict)
    _of_slot: dict[Slot, Link] = field(default_factory=dict)

    @property
    def connected(self) -> int:
        """Members with a session."""
        return len(self._of_slot)

    @property
    def connected_slots(self) -> Set[Slot]:
        """Slots with a session."""
        return self._of_slot.keys()

    def link_of(self, slot: Slot) -> Link | None:
        """Return the session of a slot, if it has one."""
        return self._of_slot.get(slot)

    def session_of(self, key: PeerKey) -> Link | None:
        """Return the session of an identity, admitted or not."""
        return self._of_key.get(key)

    def unadmitted(self) -> Link | None:
        """Return a session that still waits for its slot, the oldest first."""
        return next(iter(self._waiting.values()), None)

    def restart(self, members: list[Member], now_ms: int, *, lease_ms: int, recent_round: int) -> None:
        """Count every member as disconnected since now; await those that contributed to `recent_round` or later."""
        for member in members:
            if member.is_joined:
                self.leases[member.slot] = Lease(until_ms=now_ms + lease_ms, reason=LeaveReason.LEASE_EXPIRED)
                if member.last_round >= max(recent_round, 0):
                    self.returning.add(member.slot)
        self.returning_until_ms = now_ms + min(RETURN_GRACE_MS, lease_ms)

    def open(self, link: Link) -> None:
        """Register a session; the identity's earlier one must be closed before."""
        assert link.session not in self.links
        assert link.key not in self._of_key
        self.links[link.session] = link
        self._waiting[link.session] = link
        self._of_key[link.key] = link

    def admit(self, link: Link, slot: Slot, *, is_active: bool) -> None:
        """The session's identity is a member: it has its slot, its lease ends."""
        assert link.slot is None
        assert slot not in self._of_slot
        link.slot = slot
        del self._waiting[link.session]
        self._of_slot[slot] = link
        self.leases.pop(slot, None)
        self.returning.discard(slot)
        if is_active and self.misses.get(slot, 0) < MISSES_MAX:
            self.active.add(slot)

    def close(self, session: SessionId, lease: Lease) -> Slot | None:
        """Forget a session; its member, if it is one, gets the lease. Return its slot."""
        link = self.links.pop(session, None)
        if link is None:
            return None
        self._waiting.pop(session, None)
        del self._of_key[link.key]
        if link.slot is not None:
            del self._of_slot[link.slot]
            self.active.discard(link.slot)
            self.leases[link.slot] = lease
        return link.slot

    def left(self, slot: Slot) -> None:
        """The member's `PeerLeft` is in the log."""
        self.leases.pop(slot, None)
        self.misses.pop(slot, None)
        self.returning.discard(slot)

    def contributed(self, slot: Slot) -> None:
        """The slot keeps up: it is awaited from now on."""
        self.misses.pop(slot, None)
        if slot in self._of_slot:
            self.active.add(slot)

    def missed(self, slot: Slot) -> bool:
        """Count a missed deadline of an awaited slot; return True if the peer is lagging now."""
        self.returning.discard(slot)
        self.misses[slot] = self.misses.get(slot, 0) + 1
        if self.misses[slot] < MISSES_MAX:
            return False
        self.active.discard(slot)
        return True

    def awaited(self, now_ms: int) -> set[Slot]:
        """Slots the open round waits for."""
        return self.active | self.returning if now_ms < self.returning_until_ms else self.active

    def expired(self, now_ms: int) -> Iterator[tuple[Slot, LeaveReason]]:
        """Yield the members whose lease has ended."""
        for slot, lease in self.leases.items():
            if lease.until_ms <= now_ms:
                yield slot, lease.reason

    def state(self, slot: Slot, *, is_joined: bool) -> str:
        """Say in one word how a peer stands: connected, lagging, away or left."""
        if not is_joined:
            return "left"
        if slot not in self._of_slot:
            return "away"
        return "connected" if self.misses.get(slot, 0) < MISSES_MAX else "lagging"

    def deadline_ms(self, now_ms: int) -> int | None:
        """When a lease or the grace after a restart ends next."""
        times = [lease.until_ms for lease in self.leases.values()]
        if self.returning and now_ms < self.returning_until_ms:
            times.append(self.returning_until_ms)
        return min(times, default=None)
