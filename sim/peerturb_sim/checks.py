"""Checkers that stand outside the system: they see what is announced, heard and applied, and know what must hold.

They ask no machine for its opinion. The first broken invariant ends the world.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from peerturb.errors import LogError
from peerturb.ids import PeerKey, short_hex
from peerturb.protocol.messages import Contribution, FromPeer
from peerturb.protocol.records import Record, RoundSealed
from peerturb.runlog.verify import verify
from peerturb_sim.log import SharedLog
from peerturb_sim.network import Line

if TYPE_CHECKING:
    from peerturb_sim.peer import Peer

CONTRIBUTION_BYTES_MAX = 24
"""Beside its codes: round 6, length 4, loss 5, digest 6, and a little."""
SEALED_BYTES_MAX = 40
"""Beside its codes and contributions: step, loss, digest, lengths."""
SEALED_BYTES_PER_PEER_MAX = 6
"""Slot and count, three bytes each where they are large."""


class BrokenInvariantError(Exception):
    """The system did what it must never do."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


class Checks:
    """Invariants of one world."""

    def __init__(self, log: SharedLog, base_digest: int) -> None:
        self.digests = {0: base_digest}
        """Digest of the weights by sealed rounds applied: what the first replica had."""
        self._log = log
        self.outvoted = 0
        """Rounds sealed on wrong weights, which right ones had no majority against: the protocol promises no more."""
        self._heard: defaultdict[PeerKey, set[bytes]] = defaultdict(set)
        """Codes of the open round, by who said them."""
        self._votes: dict[PeerKey, int] = {}
        """Digest of the weights that each has measured the open round on, as this process of the coordinator heard."""
        self._round = 0

    def heard(self, line: Line, message: FromPeer, size: int) -> None:
        """The coordinator takes in a message of so many bytes."""
        if not isinstance(message, Contribution):
            return
        if size > len(message.codes) + CONTRIBUTION_BYTES_MAX:
            text = f"{size} bytes carry a contribution of {len(message.codes)} codes"
            raise BrokenInvariantError("byte_budget", text)
        if message.round == self._round and line.key is not None:
            self._heard[line.key].add(message.codes)
            self._votes[line.key] = message.digest

    def announced(self, record: Record, position: int) -> None:
        """The coordinator tells the world of the record at a position."""
        if not isinstance(record, RoundSealed):
            return
        if record.round != self._round:
            raise BrokenInvariantError("rounds_once", f"round {record.round} is sealed where {self._round} is due")
        for slot, codes in record.contributions():
            if codes not in self._heard[self._log.ledger.members[slot].key]:
                text = f"round {record.round} holds codes of slot {slot} that the coordinator never heard from it"
                raise BrokenInvariantError("contributions_once", text)
        self._majority_holds(record)
        allowed = len(record.codes) + len(record.slots) * SEALED_BYTES_PER_PEER_MAX + SEALED_BYTES_MAX
        size = len(self._log.payloads[position])
        if size > allowed:
            text = f"round {record.round} takes {size} bytes for {len(record.codes)} codes"
            raise BrokenInvariantError("byte_budget", text)
        self._heard.clear()
        self._votes.clear()
        self._round += 1

    def _majority_holds(self, record: RoundSealed) -> None:
        """A round is sealed on the weights that the log gives if most who contributed have them."""
        right = self.digests.get(record.round)
        if right is None or record.digest == right:
            return
        sound = sum(digest == right for digest in self._votes.values())
        if 2 * sound > len(self._votes):
            text = (
                f"round {record.round} is sealed on weights {short_hex(record.digest)}, though {sound} of "
                f"{len(self._votes)} peers have measured it on the right ones, {short_hex(right)}"
            )
            raise BrokenInvariantError("majority_holds", text)
        self.outvoted += 1

    def restarted(self, records: int) -> None:
        """A restarted coordinator has found so many records on its disk; contributions it has forgotten."""
        self._votes.clear()
        if records < len(self._log.records):
            text = f"{len(self._log.records)} records were announced, {records} are there after a restart"
            raise BrokenInvariantError("announced_stays", text)

    def measured_on(self, peer: "Peer", round_: int) -> None:
        """A peer has measured a round."""
        if peer.rounds != round_:
            text = f"{peer.name} measured round {round_} on weights of {peer.rounds} rounds"
            raise BrokenInvariantError("measured_on_its_round", text)

    def applies(self, peer: "Peer", sealed: RoundSealed) -> None:
        """A peer applies a round."""
        if peer.rounds != sealed.round:
            text = f"{peer.name} applies round {sealed.round} to weights of {peer.rounds} rounds"
            raise BrokenInvariantError("applied_once", text)

    def agree(self, peer: "Peer") -> None:
        """A peer has applied a round: its weights are everybody's, unless its memory is faulty."""
        digest = int(peer.weights.digest)
        if not peer.is_corrupt and self.digests.setdefault(peer.rounds, digest) != digest:
            first = short_hex(self.digests[peer.rounds])
            text = f"after {peer.rounds} rounds {peer.name} has weights {short_hex(digest)}, another peer {first}"
            raise BrokenInvariantError("replicas_agree", text)

    def ended(self, path: Path) -> None:
        """The world has ended: its log must pass the production check and hold what was announced."""
        try:
            verified = verify(path)
        except LogError as error:
            raise BrokenInvariantError("log_verifies", str(error)) from error
        if verified.ledger.position < len(self._log.records):
            text = f"{len(self._log.records)} records were announced, the file has {verified.ledger.position}"
            raise BrokenInvariantError("announced_stays", text)
