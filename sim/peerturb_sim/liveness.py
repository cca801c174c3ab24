"""Training goes on: while enough peers are there and undisturbed, the next round is sealed within a bounded time.

A checker from outside, for runs whose faults have no common end: it looks now and then at how long nothing was sealed
though nothing hindered it. It asks no machine for its opinion, but for the sentence that it reports.
"""

from peerturb.protocol.rules import codes_max
from peerturb_sim.checks import BrokenInvariantError
from peerturb_sim.network import Line
from peerturb_sim.peer import Peer
from peerturb_sim.world import World

GOES_ON_S = 900.0
"""Virtual time in which a round must be sealed (or, in a swarm, the run must end) once nothing goes wrong any more."""
SETTLE_S = 60.0
"""Time without a round after which undisturbed peers are looked for: rounds are not watched one by one."""
WORK_S_MAX = 300.0
"""A peer that needs longer for a whole contribution, or to catch up, is not counted on."""


class Liveness:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rounds = -1
        self._since_s = 0.0
        self._steady: dict[int, Line] | None = None
        """Peers that have been undisturbed since they were looked for, each with its stream; None: not looked for."""

    def look(self) -> None:
        """See how things stand; call about once in a virtual second.

        Raises:
            BrokenInvariantError: nothing was sealed for too long, though enough peers were undisturbed all the time.
        """
        world, coordinator = self._world, self._world.coordinator
        now_s, rounds = world.events.elapsed_s, world.log.ledger.sealed_rounds
        is_up = coordinator.machine is not None and not coordinator.disk.refuses
        if rounds != self._rounds or not is_up or world.is_finished:
            self._rounds, self._since_s, self._steady = rounds, now_s, None
            return
        if self._steady is None:
            if now_s - self._since_s >= SETTLE_S:
                self._since_s = now_s
                self._steady = {peer.index: peer.line for peer in world.peers if peer.line and self._is_steady(peer)}
            return
        self._steady = {
            index: line
            for index, line in self._steady.items()
            if world.peers[index].line is line and self._is_steady(world.peers[index])
        }
        if len(self._steady) < world.spec.round.min_peers:
            self._since_s, self._steady = now_s, None
        elif now_s - self._since_s >= GOES_ON_S:
            raise BrokenInvariantError("goes_on", self._stalled(len(self._steady)))

    def _is_steady(self, peer: Peer) -> bool:
        """Whether nothing hinders a peer now, and it would contribute soon."""
        world, now_us = self._world, self._world.events.now_us
        if peer.line is None or not peer.line.is_welcome or not peer.line.takes or not peer.is_running:
            return False
        if peer.is_corrupt or (peer.liar is not None and peer.liar.lie in ("silent", "stale", "digest")):
            return False
        if now_us < max(peer.resumes_us, peer.host.blocked_until_us):
            return False
        behind = max(0, world.log.ledger.sealed_rounds - peer.rounds)
        most = codes_max(world.spec, is_exact=peer.group.estimator == "exact")
        work_s = peer.group.measuring_s(most, peer.probes_per_s)
        work_s += (peer.group.apply_ms * (1 + behind) + peer.group.evaluate_ms) / 1e3
        return work_s <= WORK_S_MAX

    def _stalled(self, steady: int) -> str:
        return (
            f"{self._rounds} of {self._world.spec.round.count} rounds are sealed, and for {GOES_ON_S:.0f} s no further "
            f"one was, though {steady} peers were undisturbed; the coordinator: {self._world.waiting_for}"
        )
