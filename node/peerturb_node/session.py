"""A node's event loop: drives the pure `PeerMachine` with one inbox and one timer, and does what it asks, in order.

It holds no rules: who may speak when, what to measure, when to try again are the machine's decisions.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from peerturb.errors import RejectCode
from peerturb.manifest import manifest_digest
from peerturb.protocol import results
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.messages import Challenge, Contribution, Proof, Refusal, Welcome, challenge_bytes
from peerturb.protocol.outputs import (
    Append,
    Apply,
    CancelMeasure,
    Connect,
    Disconnect,
    Evaluate,
    HangUp,
    Measure,
    Notice,
    PeerOutput,
    Rebuild,
    Say,
    Stop,
)
from peerturb.protocol.peer import PeerMachine, Session
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb_node.checkpoints import Checkpoints
from peerturb_node.client import Address
from peerturb_node.compute.base import Compute, HeldOut, Measured
from peerturb_node.events import Events
from peerturb_node.identity import Identity
from peerturb_node.link import Link, LinkDown, LinkEvent, LinkUp, Received, Traffic
from peerturb_node.local import LocalLog, replay_into
from peerturb_node.progress import Progress, coming
from peerturb_node.settings import NodeSettings
from peerturb_node.worker import Done, Failed, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Why the loop ended."""

    refusal: RejectCode | None
    """None at a regular end: the run is finished, or the user left."""
    why: str


@dataclass(frozen=True, slots=True)
class _Tick:
    """The timer rang."""


@dataclass(frozen=True, slots=True)
class _LeaveAsked:
    """A signal came."""

    why: str


@dataclass(frozen=True, slots=True)
class _PauseAsked:
    """Other work wants the machine."""

    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class _ResumeAsked:
    """The machine is free again."""

    why: str


_Input = LinkEvent | Done | Failed | _Tick | _LeaveAsked | _PauseAsked | _ResumeAsked


class Node:
    """One node in one run. `run` returns when the run is over, the node is not wanted, or `leave` was called.

    Args:
        unapplied: sealed rounds of the local log that the compute's weights do not have yet.
    """

    def __init__(
        self,
        *,
        settings: NodeSettings,
        address: Address,
        spec: RunSpec,
        identity: Identity,
        compute: Compute,
        log: LocalLog,
        unapplied: Sequence[RoundSealed],
        events: Events,
    ) -> None:
        self.is_leaving = False
        self._address, self._spec, self._identity = address, spec, identity
        self._compute, self._log, self._events = compute, log, events
        self._machine = PeerMachine(
            spec,
            key=identity.public,
            name=settings.name,
            token=address.token,
            base_digest=compute.base_digest,
            manifest_digest=manifest_digest(compute.manifest),
            digest=short(compute.digest()),
            ledger=log.ledger,
            unapplied=unapplied,
            probes_max=settings.probes or None,
            estimator=compute.estimator,
            evaluates=compute.has_held_out,
        )
        self._inbox: asyncio.Queue[_Input] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._traffic = Traffic()
        self._progress = Progress(events, self._traffic)
        self._worker = Worker(
            compute, report=self._inbox.put_nowait, replay=lambda target: replay_into(log.path, target)
        )
        self._checkpoints = Checkpoints(settings, log, compute, self._worker, events)
        self._link: Link | None = None
        self._release: Callable[[], None] = getattr(compute, "release", lambda: None)  # of computes on tensors
        self._timer: asyncio.TimerHandle | None = None
        self._due_ms: int | None = None
        self._ended: Ended | None = None
        self._chores: set[asyncio.Task[None]] = set()

    def leave(self, why: str) -> None:
        """Say goodbye and end. Called on the event loop's thread."""
        self.is_leaving = True
        self._inbox.put_nowait(_LeaveAsked(why))

    def pause(self, reason: str, why: str) -> None:
        """Take no part until `resume`, without being missed. Called on the event loop's thread."""
        self._inbox.put_nowait(_PauseAsked(reason, why))

    def resume(self, why: str) -> None:
        """Take part again after a `pause`. Called on the event loop's thread."""
        self._inbox.put_nowait(_ResumeAsked(why))

    async def run(self) -> Ended:
        """Take part until the end; then write a checkpoint.

        Raises:
            PeerturbError: the compute failed, or the local log cannot be written.
        """
        try:
            self._perform(())
            while self._ended is None:
                self._take(await self._inbox.get())
            if self._link is not None:
                await self._link.finish()
            await self._checkpoints.last()
            digest = await self._worker.call(self._compute.digest)
            self._progress.stopped(self._ended.why, self._compute.rounds, digest)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._link is not None:
                await self._link.abort()
            await self._checkpoints.close()
            await self._worker.close()
        return self._ended

    # --- inputs -----------------------------------------------------------------------------------------------------

    def _take(self, item: _Input) -> None:
        """Hand one input to the machine and carry out what it decides."""
        now_ms = _now_ms()
        match item:
            case LinkUp() | LinkDown() | Received():
                if item.link is self._link:
                    self._perform(self._of_link(item, now_ms))
            case Done():
                self._perform(self._machine.completed(self._result(item), now_ms))
                self._checkpoints.consider()
            case Failed(error=error):
                raise error
            case _Tick():
                self._due_ms = None
                self._perform(())
            case _LeaveAsked(why=why):
                self._events.emit("leaving", why=why)
                self._perform(self._machine.leave())
            case _PauseAsked(reason=reason, why=why):
                outputs = self._machine.pause()
                if self._machine.status.session is Session.PAUSED:
                    self._progress.paused(reason, why)
                self._perform(outputs)
                self._chore(self._worker.call(self._release))
            case _ResumeAsked(why=why):
                self._progress.resumed(why)
                self._perform(self._machine.resume(now_ms))
            case _:
                assert_never(item)

    def _of_link(self, item: LinkEvent, now_ms: int) -> Sequence[PeerOutput]:
        machine = self._machine
        match item:
            case LinkUp(link=link):
                outputs = machine.connected(now_ms)
                hello = machine.hello(self._log.chain)
                link.expect(hello.position, sealed_rounds=machine.ledger.sealed_rounds)
                link.say(hello)
                return outputs
            case LinkDown(why=why):
                self._link = None
                outputs = machine.disconnected(why, now_ms)
                retry_ms = machine.deadline_ms()
                self._progress.disconnected(why, None if retry_ms is None else max(0, retry_ms - now_ms))
                return outputs
            case Received(link=link, message=Challenge(nonce=nonce)):
                signed = challenge_bytes(nonce=nonce, spec_digest=self._spec.digest, key=self._identity.public)
                link.say(Proof(signature=self._identity.sign(signed)))
                return ()
            case Received(message=message):
                outputs = machine.receive(message, now_ms)
                if isinstance(message, Welcome):
                    status = machine.status
                    self._progress.joined(
                        slot=message.slot,
                        position=status.position,
                        head=message.head,
                        behind=status.rounds_sealed - status.rounds_applied + coming(message.head - status.position),
                    )
                elif isinstance(message, Refusal):
                    self._events.emit("refused", code=message.code.name.lower(), why=message.why)
                return outputs
            case _:
                assert_never(item)

    def _result(self, done: Done) -> results.Result:
        """Tell the outside what was done, and return it as the machine wants it."""
        slot = self._machine.slot
        match done.work, done.result:
            case Measure(round=round_) as work, Measured() as measured:
                self._progress.measured(work, measured, done.seconds)
                return results.Measured(
                    round=round_, codes=measured.codes, loss=measured.loss, elapsed_ms=1e3 * done.seconds
                )
            case Apply(sealed=sealed), bytes() | None as digest:
                number = None if digest is None else short(digest)
                self._progress.applied(sealed, number, slot, done.seconds)
                return results.Applied(round=sealed.round, digest=number)
            case Evaluate(round=rounds), HeldOut() as held_out:
                self._progress.evaluated(rounds, held_out, done.seconds)
                return results.EvaluatedResult(
                    round=rounds, loss=held_out.loss, accuracy=held_out.accuracy, examples=held_out.examples
                )
            case Evaluate(round=rounds), None:
                return results.EvaluatedResult(round=rounds, loss=math.nan, accuracy=None, examples=0)
            case Rebuild(), bytes() as digest:
                return results.Rebuilt(rounds=self._compute.rounds, digest=short(digest))
            case work, result:
                raise AssertionError(f"{type(work).__name__} was answered with {type(result).__name__}")

    # --- outputs ----------------------------------------------------------------------------------------------------

    def _perform(self, outputs: Sequence[PeerOutput]) -> None:
        """Carry out everything the machine decides from here, then set the timer."""
        for effect in drive(self._machine, outputs, _now_ms()):
            self._do(effect)
        if self._machine.wants_records:
            self._has_room.set()
        else:
            self._has_room.clear()
        self._set_timer()

    def _do(self, effect: PeerOutput | Persist) -> None:
        match effect:
            case Persist(records=records):
                self._log.append(records)
                for record in records:
                    if isinstance(record, RoundSealed):
                        self._progress.received(record)
            case Say(message=message):
                if self._link is not None:
                    self._link.say(message)
                    if isinstance(message, Contribution):
                        self._progress.contributed(len(message.codes))
            case Measure() | Apply() | Evaluate() | Rebuild():
                self._work(effect)
            case CancelMeasure(round=round_):
                self._worker.cancel(round_)
            case Connect():
                self._events.emit("connecting", coordinator=self._address.target)
                self._link = Link(self._address, self._traffic, self._deliver)
            case Disconnect(why=why):
                self._progress.disconnected(why, None)
                self._drop_link()
            case HangUp():
                if self._link is not None:
                    self._chore(self._link.finish())
                    self._link = None
            case Notice(code=code, text=text):
                # The others are told already: with the link's own words, and as the refusal it was.
                if code != "disconnected" and not code.startswith("refused_"):
                    self._events.emit("notice", code=code, text=text)
            case Stop(code=code, why=why):
                self._ended = Ended(refusal=code, why=why)
            case Append():
                raise AssertionError("drive turns every Append into a Persist")
            case _:
                assert_never(effect)

    def _work(self, work: Measure | Apply | Evaluate | Rebuild) -> None:
        if isinstance(work, Measure):
            self._progress.training(work)
        elif isinstance(work, Rebuild):
            self._events.emit("rebuild", why=work.why)
        slot = self._machine.slot
        self._worker.submit(work, slot=slot)

    async def _deliver(self, event: LinkEvent) -> None:
        """Take an event from the link, making it wait while the machine has enough to do."""
        await self._has_room.wait()
        self._inbox.put_nowait(event)

    def _drop_link(self) -> None:
        if self._link is None:
            return
        self._chore(self._link.abort())
        self._link = None

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the loop."""
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _set_timer(self) -> None:
        """Keep exactly one timer, at the machine's deadline."""
        due_ms = None if self._ended is not None else self._machine.deadline_ms()
        if due_ms == self._due_ms:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due_ms = due_ms
        if due_ms is not None:
            delay_s = max(0, due_ms - _now_ms()) / 1e3
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._inbox.put_nowait, _Tick())


def short(digest: bytes) -> int:
    """Return the short digest (u32): the first four bytes, little endian."""
    return int.from_bytes(digest[:4], "little")


def _now_ms() -> int:
    return int(time.monotonic() * 1e3)
