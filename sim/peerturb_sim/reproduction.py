"""A recorded run once more: the production coordinator's machine, told what the trace says at the times it says.

Contributions and evaluations come from a `Compute`, on weights that follow from the rounds sealed here. Of what real
peers computed nothing is taken over: codes, losses, digests, and through them scale, step and every later record, are
made again. Peers' machines are not run: what they decide is in the trace as what the coordinator heard, and follows
from the speed and lines of machines that are not here.
"""

from collections.abc import Iterator
from typing import Any

from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import (
    Contribution,
    Disconnected,
    Evaluation,
    FromPeer,
    Hello,
    Leave,
    Proof,
    Welcome,
)
from peerturb.protocol.outputs import Send, SessionId
from peerturb.protocol.records import Record, RoundSealed
from peerturb.protocol.rules import codes_max
from peerturb.spec import RunSpec
from peerturb.wire.records import encode_record
from peerturb_coordinator.recovery import recover
from peerturb_coordinator.store import Entry, MemoryLogStore
from peerturb_coordinator.trace_format import ContributionLine, EvaluationLine, HelloLine, SessionLine, Start, Tick
from peerturb_sim.compute import Compute, Request
from peerturb_sim.compute import Evaluation as HeldOut
from peerturb_sim.trace import Row, Trace, TraceError


class Reproduction:
    """One run, made again from its trace.

    Args:
        spec: the run's.
        compute: the run's model with the peers' data.
        trace: what the coordinator's machine was told.
    """

    def __init__(self, spec: RunSpec, compute: Compute, trace: Trace) -> None:
        self._spec, self._compute, self._trace = spec, compute, trace
        self._store = MemoryLogStore()
        self._machine = CoordinatorMachine(spec)
        self._slots: dict[SessionId, Slot] = {}
        self._weights: list[Any] = [compute.base]
        """By number of rounds applied."""
        self._evaluated: tuple[int, HeldOut] | None = None
        """The newest evaluation: most peers evaluate the same weights at the same time."""

    def records(self) -> Iterator[tuple[bytes, Record]]:
        """Yield the log's records, as their bytes and decoded, as soon as each is decided.

        Raises:
            TraceError: the trace has a gap, or a line cannot be used.
        """
        for row in self._trace.rows():
            if isinstance(row.input, Start):
                self._restart(row)
            yield from self._take(row)

    def _restart(self, row: Row) -> None:
        """Begin as a coordinator that finds what is written so far."""
        head, found = self._store.head, row.input.records
        if head != found:
            raise TraceError(
                self._trace.path,
                row.line,
                f"the coordinator found {found} records here, the trace before gives {head}: it ran without --trace "
                "in between, or what it wrote of it is lost. Compare up to there with `peerturb sim compare`",
            )
        self._machine = recover(self._spec, self._store)
        self._slots.clear()

    def _take(self, row: Row) -> Iterator[tuple[bytes, Record]]:
        """Give the machine an input; yield what it writes."""
        now_ms, message = row.input.now_ms, self._message(row.input)
        outputs = () if message is None else self._machine.receive(row.input.session, message, now_ms)
        for effect in drive(self._machine, outputs, now_ms):
            match effect:
                case Persist(records=records):
                    if self._store.head == row.records_max:
                        return
                    for record in records:
                        yield self._write(record), record
                case Send(session=session, message=Welcome(slot=slot)):
                    self._slots[session] = slot
                case _:  # what peers and operators are told; peers' answers are in the trace
                    pass
        if isinstance(message, Disconnected):
            self._slots.pop(row.input.session, None)

    def _write(self, record: Record) -> bytes:
        payload = encode_record(record)
        self._store.append([Entry(kind=type(record).__name__, round=None, payload=payload)])
        if isinstance(record, RoundSealed):
            self._weights.append(self._compute.apply(self._weights[-1], record))
        return payload

    def _message(self, line: Any) -> FromPeer | Disconnected | None:
        """Return what the machine was told, None where only time had passed."""
        match line:
            case Start() | Tick():
                return None
            case HelloLine():
                return Hello(
                    protocol=line.protocol, key=PeerKey(bytes.fromhex(line.key)), name=line.name, token="",
                    spec_digest=bytes.fromhex(line.spec), base_digest=bytes.fromhex(line.base),
                    manifest_digest=bytes.fromhex(line.manifest), position=Position(line.position), chain=bytes(32),
                )  # fmt: skip
            case ContributionLine():
                return self._contribution(line)
            case EvaluationLine():
                return self._evaluation(line)
            case SessionLine(do="leave"):
                return Leave()
            case SessionLine(do="proof"):
                return Proof(signature=bytes(64))
            case SessionLine(do="disconnected"):
                return Disconnected()
            case _:
                raise AssertionError(f"{type(line).__name__} is no input")

    def _contribution(self, line: ContributionLine) -> Contribution:
        """Measure what the peer measured. What the machine will refuse for its round or length is not measured."""
        ledger, number = self._machine.ledger, RoundNumber(line.round)
        slot, opened = self._slots.get(SessionId(line.session)), ledger.open
        is_allowed = self._spec.perturbation.allows("exact" if line.exact else "spsa")
        is_wanted = is_allowed and 1 <= line.count <= codes_max(self._spec, is_exact=line.exact)
        if slot is None or opened is None or opened.round != number or not is_wanted:
            codes = bytes(line.count)
            return Contribution(round=number, codes=codes, loss=float("nan"), digest=0, is_exact=line.exact)
        weights, scale = self._weights[ledger.sealed_rounds], opened.scale_of(is_exact=line.exact)
        request = Request(weights=weights, slot=slot, round=number, scale=scale, count=line.count, is_exact=line.exact)
        self._compute.expect(request)
        found = self._compute.measure(request)
        return Contribution(
            round=number, codes=found.codes, loss=found.loss, digest=weights.digest, is_exact=line.exact
        )

    def _evaluation(self, line: EvaluationLine) -> Evaluation:
        """Evaluate what the peer evaluated, unless the machine will refuse it for its round."""
        ledger, number = self._machine.ledger, line.round
        slot = self._slots.get(SessionId(line.session))
        if slot is None or not ledger.members[slot].last_evaluation < number <= ledger.sealed_rounds:
            return Evaluation(round=RoundNumber(number), loss=float("nan"), accuracy=None, examples=0)
        if self._evaluated is None or self._evaluated[0] != number:
            self._evaluated = number, self._compute.evaluate(self._weights[number])
        found = self._evaluated[1]
        return Evaluation(round=RoundNumber(number), loss=found.loss, accuracy=found.accuracy, examples=found.examples)
