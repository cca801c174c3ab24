"""What the page is told, as JSON values: everything at first, then what has changed. It knows no socket.

No secrets: no token, no whole key, no address of a peer.
"""

import math
from typing import Any

from peerturb.ids import short_hex
from peerturb.protocol.status import CoordinatorStatus, PeerState
from peerturb_coordinator.live.history import POINTS_MAX, TIMELINE_MAX, History, Row
from peerturb_coordinator.runner import Runner

PEERS_AT_ONCE = 250
"""Rows of peers in a message of changes; the others of a large run follow in the next ones."""


class View:
    """One run's page.

    Args:
        runner: what is asked.
        history: what it hears.
        join: the command with which a volunteer joins, without the token.
        needs_token: whether that takes one.
    """

    def __init__(self, runner: Runner, history: History, *, join: str, needs_token: bool) -> None:
        self._runner = runner
        self._history = history
        self._join, self._needs_token = join, needs_token
        self._began_ms = runner.now_ms
        self._peers: dict[int, Row] = {}
        """Rows as they were last sent as changes."""
        self._behind: dict[int, Row] = {}
        """Rows that have changed and wait for a message."""
        self._events = history.events_seen
        self._evaluations = history.evaluations_seen
        self._rounds = history.rounds

    def everything(self) -> dict[str, Any]:
        """Return the run as a page needs it that knows nothing yet."""
        status = self._runner.status()
        spec = self._runner.machine.spec
        return {
            "run": spec.name,
            "digest": spec.digest.hex(),
            "model": spec.model.name,
            "rounds_wanted": spec.round.count,
            "join": self._join,
            "needs_token": self._needs_token,
            "limits": {"points": POINTS_MAX, "timeline": TIMELINE_MAX},
            "now": self._now(status),
            "curve": self._history.curve.rows(),
            "timeline": [one.row() for one in self._history.timeline],
            "evaluations": list(self._history.evaluations),
            "events": list(self._history.events),
            "peers": [_peer(peer) for peer in status.peers],
        }

    def changes(self) -> dict[str, Any]:
        """Return what has changed since the last call. All who watch hear the same changes."""
        status, history = self._runner.status(), self._history
        for peer in status.peers:
            row = _peer(peer)
            if self._peers.get(peer.slot) != row:
                self._behind[peer.slot] = self._peers[peer.slot] = row
        due = [self._behind.pop(slot) for slot in list(self._behind)[:PEERS_AT_ONCE]]
        rounds = min(history.rounds - self._rounds, len(history.timeline))
        evaluations = min(history.evaluations_seen - self._evaluations, len(history.evaluations))
        events = min(history.events_seen - self._events, len(history.events))
        self._rounds, self._events = history.rounds, history.events_seen
        self._evaluations = history.evaluations_seen
        return {
            "now": self._now(status),
            "timeline": [one.row() for one in list(history.timeline)[len(history.timeline) - rounds :]],
            "evaluations": history.evaluations[len(history.evaluations) - evaluations :],
            "events": list(history.events)[len(history.events) - events :],
            "peers": due,
        }

    def forget(self) -> None:
        """Take every peer for changed."""
        self._peers.clear()

    def _now(self, status: CoordinatorStatus) -> dict[str, Any]:
        runner, counters = self._runner, self._runner.machine.counters
        traffic, history = runner.traffic, self._history
        up, down = traffic.total("up"), traffic.total("down")
        return {
            "round": status.round,
            "loss": _number(status.loss),
            "state": "stopped" if runner.fault else "finished" if status.is_finished else "running",
            "waiting_for": runner.fault or status.waiting_for,
            "warning": status.warning,
            "connected": status.connected,
            "members": len(status.peers),
            "probes": status.probes,
            "void_codes": status.void_codes,
            "weights": short_hex(status.digest) if status.round else "",
            "mismatches": counters.digest_mismatches,
            "refused": sum(counters.rejects.values()),
            "bytes_up": up,
            "bytes_down": down,
            "up_per_code": _ratio(up, history.codes),
            "down_per_code": _ratio(down, history.codes_sent),
            "uptime_s": (runner.now_ms - self._began_ms) // 1000,
        }


def _peer(peer: PeerState) -> Row:
    """Return slot, name, beginning of the key, state, probes, last round and loss."""
    last = peer.last_round if peer.probes else None
    return [peer.slot, peer.name, peer.key[:4].hex(), peer.state, peer.probes, last, _number(peer.loss)]


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _ratio(size: int, codes: int) -> float | None:
    return round(size / codes, 3) if codes else None
