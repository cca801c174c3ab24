"""Keeps what a report will show: rounds, evaluations, faults. It watches; nothing depends on it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from peerturb.protocol.records import Evaluated, Record, RoundOpened, RoundSealed
from peerturb.protocol.sealing import SealReason
from peerturb_sim.result import EvaluationRow, FaultRow, RoundRow

if TYPE_CHECKING:
    from peerturb_sim.peer import Peer
    from peerturb_sim.world import World

UNNOTICED = "not noticed: no round that followed said a digest, and its weights are wrong"
STILL_RIGHT = "nothing to notice: its weights are right"


class Recorder:
    """Rows of a world's result."""

    def __init__(self, world: "World") -> None:
        self.rounds: list[RoundRow] = []
        self.evaluations: list[EvaluationRow] = []
        self.faults: list[FaultRow] = []
        self._world = world
        self._opened: RoundOpened | None = None
        self._opened_s = 0.0
        self._bytes = (0, 0)
        self._deadlines = 0
        self._corrupt: dict[int, int] = {}
        """Peer with a flipped bit, and which of the faults that is."""

    def announced(self, record: Record) -> None:
        """The coordinator has announced a record."""
        match record:
            case RoundOpened():
                self._opened, self._opened_s = record, self._now_s
            case RoundSealed():
                self.rounds.append(self._round(record))
            case Evaluated():
                row = EvaluationRow(
                    round=record.round, at_s=self._now_s, peer=self._world.index_of(record.slot),
                    loss=record.loss, accuracy=record.accuracy,
                )  # fmt: skip
                self.evaluations.append(row)
            case _:
                pass

    def fault(self, kind: str, who: str, *, for_s: float | None = None, text: str = "") -> None:
        """Something goes wrong now, for so long."""
        until_s = None if for_s is None else round(self._now_s + for_s, 6)
        self.faults.append(FaultRow(at_s=self._now_s, until_s=until_s, kind=kind, who=who, text=text))

    def corrupted(self, peer: "Peer") -> None:
        """A bit of a peer's weights was flipped."""
        self._corrupt[peer.index] = len(self.faults)
        self.fault("corruption", peer.name)

    def mended(self, peer: "Peer") -> None:
        """A peer has made its weights anew from the log."""
        if (number := self._corrupt.pop(peer.index, None)) is not None:
            self.faults[number] = replace(self.faults[number], until_s=self._now_s)

    def ended(self) -> list[str]:
        """The world has ended: say of each flipped bit that is still there what it did; return whom it left wrong.

        Nobody could know: the log says no digest after its last round. From outside it can be seen.
        """
        wrong = []
        for index, number in self._corrupt.items():
            peer = self._world.peers[index]
            is_wrong = self._world.checks.digests.get(peer.rounds) != int(peer.weights.digest)
            wrong += [peer.name] if is_wrong else []
            self.faults[number] = replace(self.faults[number], text=UNNOTICED if is_wrong else STILL_RIGHT)
        return wrong

    @property
    def _now_s(self) -> float:
        return self._world.events.elapsed_s

    def _round(self, record: RoundSealed) -> RoundRow:
        world, opened = self._world, self._opened
        assert opened is not None
        deadlines = world.coordinator.seals[SealReason.DEADLINE]
        is_deadline, self._deadlines = deadlines > self._deadlines, deadlines
        up, down = world.up_bytes - self._bytes[0], world.down_bytes - self._bytes[1]
        self._bytes = world.up_bytes, world.down_bytes
        return RoundRow(
            round=record.round,
            opened_s=self._opened_s,
            sealed_s=self._now_s,
            reason=(SealReason.DEADLINE if is_deadline else SealReason.EVERYONE).value,
            loss=record.loss,
            peers=len(record.slots),
            connected=sum(line.is_welcome for line in world.coordinator.lines.values()),
            codes=len(record.codes),
            void_codes=record.codes.count(0x80),
            scale=opened.scale,
            alpha=record.alpha,
            bytes_up=up,
            bytes_down=down,
        )
