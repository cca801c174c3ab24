"""Golden traces of the machines: a command, then the exact lines it produces.

A trace file is blocks of `command`, a line `----`, output lines, an empty line; `#` begins a comment. Rewrite all with

    python -m tests.golden.trace_runner --rewrite

and read the diff.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.coordinator import CoordinatorMachine
from peerturb.protocol.driver import Persist, drive
from peerturb.protocol.ledger import Ledger, step_size
from peerturb.protocol.messages import (
    Contribution,
    Disconnected,
    Evaluation,
    FromPeer,
    Hello,
    Leave,
    Records,
    Refusal,
    Welcome,
)
from peerturb.protocol.outputs import (
    Apply,
    CancelMeasure,
    Connect,
    CoordinatorOutput,
    Disconnect,
    Evaluate,
    HangUp,
    Measure,
    Notice,
    PeerOutput,
    Rebuild,
    Reject,
    Say,
    Send,
    SessionId,
    Stop,
)
from peerturb.protocol.peer import PeerMachine
from peerturb.protocol.records import (
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.protocol.results import Applied, EvaluatedResult, Measured, Rebuilt
from peerturb.runlog.fold import describe
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec

TRACES = Path(__file__).parent / "traces"
Words = list[str]
Options = dict[str, str]


class StoreError(Exception):
    """The trace asked for a store that fails."""


def make_spec(options: Options) -> RunSpec:
    """RunSpec of a trace."""
    return RunSpec(
        name="trace",
        # Its first four bytes are the weights before round 0: 7 where a contribution does not say.
        model=ModelSpec(name="toy", digest=int(options.get("weights", "7")).to_bytes(4, "little").hex() + "ab" * 28),
        round=RoundSpec(
            count=int(options.get("rounds", "0")),
            probes_max=int(options.get("probes", "4")),
            budget_ms=int(options.get("budget", "0")),
            min_peers=int(options.get("min_peers", "1")),
            deadline_ms_min=100,
            deadline_ms_max=10_000,
            lease_ms=3_000,
        ),
        objective=ObjectiveSpec(eval_every=int(options.get("eval", "0"))),
    )


def key_of(letter: str) -> PeerKey:
    """Identity named by a letter."""
    return PeerKey(letter.encode() * 32)


def codes_of(text: str) -> bytes:
    """Codes written as comma-separated integers."""
    return bytes(int(code) & 0xFF for code in text.split(",")) if text else b""


class CoordinatorTrace:
    """Interprets commands of a coordinator's trace."""

    def __init__(self, options: Options) -> None:
        self.spec = make_spec(options)
        self.records: list[Record] = []
        self.machine = CoordinatorMachine(self.spec)
        self.now_ms = 0
        self.fails = False

    def run(self, words: Words, options: Options) -> list[str]:
        """Carry out one command."""
        match words:
            case ["at", ms]:
                self.now_ms = int(ms)
                return self._drive([])
            case ["fail"]:
                self.fails = True
                return []
            case ["restart"]:
                self.machine = CoordinatorMachine.from_records(self.spec, self.records)
                return self._drive([])
            case ["status"]:
                return self._status()
            case ["deadline"]:
                return [f"{self.machine.deadline_ms()}"]
            case [kind, session]:
                message = self._message(kind, options)
                return self._drive(self.machine.receive(SessionId(int(session)), message, self.now_ms))
        raise ValueError(f"unknown command {words}")

    def _position(self, text: str) -> Position:
        return self.machine.ledger.position if text == "head" else Position(int(text))

    def _message(self, kind: str, options: Options) -> FromPeer | Disconnected:
        match kind:
            case "hello":
                letter = options.get("peer", "a")
                return Hello(
                    protocol=int(options.get("protocol", "1")),
                    key=key_of(letter),
                    name=letter,
                    token="",
                    spec_digest=bytes(32) if options.get("spec") == "other" else self.spec.digest,
                    base_digest=bytes.fromhex(options["base"] * 32 if "base" in options else self.spec.model.digest),
                    manifest_digest=bytes.fromhex(options.get("manifest", "01") * 32),
                    position=self._position(options.get("position", "0")),
                    chain=bytes(32),
                )
            case "contribute":
                return Contribution(
                    round=RoundNumber(int(options["round"])),
                    codes=codes_of(options.get("codes", "")),
                    loss=float(options.get("loss", "2.5")),
                    digest=int(options.get("digest", "7")),
                )
            case "evaluate":
                return Evaluation(round=RoundNumber(int(options["round"])), loss=1.5, accuracy=0.5, examples=10)
            case "leave":
                return Leave()
            case "drop":
                return Disconnected()
        raise ValueError(f"unknown message {kind}")

    def _drive(self, outputs: Sequence[CoordinatorOutput]) -> list[str]:
        lines: list[str] = []
        try:
            for effect in drive(self.machine, outputs, self.now_ms):
                lines += self._lines(effect)
        except StoreError:
            lines.append("store failed")
        return lines

    def _lines(self, effect: CoordinatorOutput | Persist) -> list[str]:
        match effect:
            case Persist(records=records):
                if self.fails:
                    self.fails = False
                    raise StoreError
                self.records += records
                return [f"append {describe(record)}" for record in records]
            case Send(session=session, message=Welcome(slot=slot, head=head)):
                return [f"send {session}: welcome, slot {slot}, head {head}"]
            case Reject(session=session, code=code, why=why, closes=closes):
                return [f"reject {session}: {code.name}{' (closes)' if closes else ''}: {why}"]
            case Notice(code=code, text=text):
                return [f"notice {code}: {text}"]
        return [repr(effect)]

    def _status(self) -> list[str]:
        status = self.machine.status(self.now_ms)
        lines = [f"round {status.round}, head {status.head}: {status.waiting_for}"]
        lines += [f"slot {peer.slot} {peer.name}: {peer.state}, {peer.probes} probes" for peer in status.peers]
        counters = self.machine.counters
        lines.append("seals: " + (", ".join(f"{k.value} {v}" for k, v in counters.seals.items() if v) or "none"))
        lines.append("rejects: " + (", ".join(f"{k.name} {v}" for k, v in counters.rejects.items() if v) or "none"))
        return lines


class PeerTrace:
    """Interprets commands of a peer's trace; the log it is fed is built by `log ...` commands."""

    def __init__(self, options: Options) -> None:
        self.spec = make_spec(options)
        self.ledger = Ledger()
        self.log: list[Record] = []
        self.sent = 0
        self.now_ms = 0
        self.machine = PeerMachine(
            self.spec,
            key=key_of("a"),
            name="a",
            token="",
            base_digest=bytes(32),
            manifest_digest=bytes(32),
            digest=100,
        )

    def run(self, words: Words, options: Options) -> list[str]:
        """Carry out one command."""
        machine = self.machine
        match words:
            case ["at", ms]:
                self.now_ms = int(ms)
                return self._drive([])
            case ["log", *what]:
                self._log(what, options)
                return []
            case ["deadline"]:
                return [f"{machine.deadline_ms()}"]
            case ["up"]:
                outputs = machine.connected(self.now_ms)
                self.sent = machine.hello(bytes(32)).position
                return [f"hello from position {self.sent}", *self._drive(outputs)]
            case ["down"]:
                return self._drive(machine.disconnected("the line was cut", self.now_ms))
            case ["welcome", slot]:
                message = Welcome(slot=Slot(int(slot)), head=Position(len(self.log)))
                return self._drive(machine.receive(message, self.now_ms))
            case ["feed"]:
                first, self.sent = self.sent, len(self.log)
                records = Records(first=Position(first), records=tuple(self.log[first:]))
                return self._drive(machine.receive(records, self.now_ms))
            case ["refuse", code]:
                closes = options.get("closes") == "yes"
                refusal = Refusal(code=RejectCode[code], why="because", closes=closes)
                return self._drive(machine.receive(refusal, self.now_ms))
            case ["measured", round_]:
                measured = Measured(
                    round=RoundNumber(int(round_)),
                    codes=codes_of(options.get("codes", "")),
                    loss=2.5,
                    elapsed_ms=float(options.get("ms", "10")),
                )
                return self._drive(machine.completed(measured, self.now_ms))
            case ["applied", round_, digest]:
                applied = Applied(round=RoundNumber(int(round_)), digest=int(digest))
                return self._drive(machine.completed(applied, self.now_ms))
            case ["evaluated", round_]:
                result = EvaluatedResult(round=RoundNumber(int(round_)), loss=1.5, accuracy=None, examples=10)
                return self._drive(machine.completed(result, self.now_ms))
            case ["rebuilt", rounds, digest]:
                rebuilt = Rebuilt(rounds=int(rounds), digest=int(digest))
                return self._drive(machine.completed(rebuilt, self.now_ms))
            case ["leave"]:
                return self._drive(machine.leave())
            case ["pause"]:
                return self._drive(machine.pause())
            case ["resume"]:
                return self._drive(machine.resume(self.now_ms))
        raise ValueError(f"unknown command {words}")

    def _log(self, what: Words, options: Options) -> None:
        ledger = self.ledger
        round_ = RoundNumber(ledger.sealed_rounds)
        record: Record
        match what:
            case ["start"]:
                record = RunStarted(spec=self.spec)
            case ["join", letter]:
                record = PeerJoined(slot=ledger.next_slot(key_of(letter)), key=key_of(letter), name=letter)
            case ["leave", slot]:
                record = PeerLeft(slot=Slot(int(slot)), reason=LeaveReason.LEFT)
            case ["open"]:
                record = RoundOpened(round=round_, scale=ledger.scale, deadline_ms=10_000)
            case ["seal", *parts]:
                record = self._sealed(parts, int(options["digest"]), round_)
            case ["finish"]:
                record = RunFinished(rounds=ledger.sealed_rounds)
            case ["bad"]:  # a round that does not follow
                self.log.append(RoundOpened(round=RoundNumber(round_ + 5), scale=1.0, deadline_ms=10_000))
                return
            case _:
                raise ValueError(f"unknown record {what}")
        ledger.apply(record)
        self.log.append(record)

    def _sealed(self, parts: Words, digest: int, round_: RoundNumber) -> RoundSealed:
        pairs = [part.split(":") for part in parts]
        codes = b"".join(codes_of(text) for _, text in pairs)
        assert self.ledger.open is not None
        return RoundSealed(
            round=round_,
            alpha=step_size(self.spec, round_, self.ledger.open.scale, codes),
            loss=2.5,
            digest=digest,
            slots=tuple(Slot(int(slot)) for slot, _ in pairs),
            counts=tuple(len(codes_of(text)) for _, text in pairs),
            codes=codes,
        )

    def _drive(self, outputs: Sequence[PeerOutput]) -> list[str]:
        return [self._line(effect) for effect in drive(self.machine, outputs, self.now_ms)]

    def _line(self, effect: PeerOutput | Persist) -> str:
        match effect:
            case Persist(records=(record,)):
                return f"append {describe(record)}"
            case Connect():
                return "connect"
            case Disconnect(why=why):
                return f"disconnect: {why}"
            case HangUp():
                return "hang up"
            case Say(message=Contribution() as message):
                values = [code - 256 if code > 127 else code for code in message.codes]
                return f"say contribution to round {message.round}: codes {values}, weights {message.digest}"
            case Say(message=message):
                return f"say {type(message).__name__.lower()}"
            case Measure(round=round_, count=count):
                return f"measure round {round_}, {count} probes"
            case Apply(sealed=sealed):
                return f"apply round {sealed.round}"
            case Evaluate(round=round_):
                return f"evaluate after {round_} rounds"
            case Rebuild(why=why):
                return f"rebuild: {why}"
            case CancelMeasure(round=round_):
                return f"cancel round {round_}"
            case Stop(code=code, why=why):
                return f"stop {'regularly' if code is None else code.name}: {why}"
            case Notice(code=code, text=text):
                return f"notice {code}: {text}"
        return repr(effect)


KINDS: dict[str, Callable[[Options], CoordinatorTrace | PeerTrace]] = {
    "coordinator": CoordinatorTrace,
    "peer": PeerTrace,
}


def run_trace(text: str) -> str:
    """Carry out the commands of a trace and return it with the output they really give."""
    out: list[str] = []
    trace: CoordinatorTrace | PeerTrace | None = None
    is_output = False
    for line in text.splitlines():
        if is_output and line:
            continue
        if not line or line.startswith("#"):
            is_output = False
            out.append(line)
            continue
        if line == "----":
            is_output = True
            continue
        words, options = split(line)
        if trace is None:
            trace = KINDS[words[0]](options)
            out.append(line)
            continue
        out += [line, "----", *trace.run(words, options)]
    return "\n".join(out) + "\n"


def split(line: str) -> tuple[Words, Options]:
    """Take a command apart into words and `name=value` options."""
    parts = line.split()
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    return [part for part in parts if "=" not in part], options


def main(arguments: Sequence[str]) -> None:
    """Check all traces, or rewrite them."""
    for path in sorted(TRACES.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        result = run_trace(text)
        if "--rewrite" in arguments:
            path.write_text(result, encoding="utf-8")
        print(f"{path.name}: {'as before' if result == text else 'changed'}")


if __name__ == "__main__":
    main(sys.argv[1:])
