"""The membership trace as a file: what the coordinator writes, and what a reader says of a bad one."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerturb.errors import SpecError
from peerturb.ids import PeerKey, Position, RoundNumber
from peerturb.protocol.messages import Contribution, Disconnected, Evaluation, FromPeer, Hello, Leave
from peerturb.protocol.outputs import SessionId
from peerturb.spec import ModelSpec, RunSpec
from peerturb_coordinator.events import Events
from peerturb_coordinator.trace import Trace as Writer
from peerturb_coordinator.trace_format import LINE_BYTES_MAX, HelloLine, encode
from peerturb_sim.trace import Trace, TraceError

SPEC = RunSpec(name="traced", model=ModelSpec(name="toy", digest="07" * 32))
OTHER = RunSpec(name="other", model=ModelSpec(name="toy", digest="07" * 32))
HELLO = Hello(
    protocol=1, key=PeerKey(b"k" * 32), name="ann", token="secret", spec_digest=SPEC.digest, base_digest=b"b" * 32,
    manifest_digest=b"m" * 32, position=Position(0), chain=b"c" * 32,
)  # fmt: skip
CONTRIBUTION = Contribution(round=RoundNumber(3), codes=b"\x05\x06", loss=1.25, digest=99)


class Told:
    """A coordinator that writes a trace, and what its operator is told."""

    def __init__(self, path: Path | None, *, spec: RunSpec = SPEC, records: int = 0, **options: Any) -> None:
        self.stream = io.StringIO()
        self.trace = Writer(path, spec, Events(self.stream, as_json=True), records=records, **options)
        self.trace.started(5, records=records)
        self.trace.settle()

    def hear(self, message: FromPeer | Disconnected, *, session: int = 1, now_ms: int = 7) -> None:
        self.trace.heard(now_ms, SessionId(session), message)
        self.trace.settle()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.trace"


@pytest.fixture
def whole(path: Path) -> list[bytes]:
    """Lines of a trace: header, start, hello, contribution, evaluation, leave."""
    told = Told(path)
    for message in (
        HELLO,
        CONTRIBUTION,
        Evaluation(round=RoundNumber(4), loss=1.5, accuracy=0.5, examples=8),
        Leave(),
    ):
        told.hear(message)
    told.trace.close()
    return path.read_bytes().splitlines(keepends=True)


def test_it_says_who_and_when_and_nothing_that_was_computed(path: Path, whole: list[bytes]) -> None:
    header, start, hello, contribution, evaluation, leave = lines_of(path)
    assert header == {"format": "peerturb-membership-trace", "version": 1, "spec": SPEC.digest.hex()}
    assert start == {"now_ms": 5, "do": "start", "records": 0}
    assert (hello["do"], hello["name"], hello["key"]) == ("hello", "ann", (b"k" * 32).hex())
    assert contribution == {"now_ms": 7, "do": "contribution", "session": 1, "round": 3, "count": 2}
    assert evaluation == {"now_ms": 7, "do": "evaluation", "session": 1, "round": 4}
    assert leave == {"now_ms": 7, "do": "leave", "session": 1}
    assert b"secret" not in b"".join(whole)


def test_the_longest_line_is_within_the_limit() -> None:
    line = HelloLine(
        now_ms=2**63 - 1, session=2**63 - 1, key="ff" * 32, name="\U0001f600" * 64, protocol=2**31 - 1, spec="ff" * 32,
        base="ff" * 32, manifest="ff" * 32, position=2**63 - 1,
    )  # fmt: skip
    assert len(encode(line)) < LINE_BYTES_MAX


def test_what_changes_nothing_is_not_written(path: Path) -> None:
    told = Told(path)
    for now_ms in range(100):
        told.trace.ticked(now_ms)
        told.trace.settle()
        told.hear(Disconnected(), session=now_ms)
    assert len(lines_of(path)) == 2
    told.trace.ticked(100)
    told.trace.write()
    told.trace.refused(records=4)
    told.trace.settle()
    assert lines_of(path)[2:] == [{"now_ms": 100, "do": "tick"}, {"do": "refused", "records": 4}]
    told.trace.close()


def test_an_input_is_in_the_file_before_what_follows_from_it_is_in_the_log(path: Path) -> None:
    told = Told(path)
    told.trace.heard(7, SessionId(1), HELLO)
    assert len(lines_of(path)) == 2
    told.trace.write()
    assert len(lines_of(path)) == 3
    told.trace.settle()
    assert len(lines_of(path)) == 3
    told.trace.close()


def test_without_a_file_it_does_nothing() -> None:
    told = Told(None)
    told.hear(HELLO)
    told.hear(Disconnected())
    told.trace.ticked(9)
    told.trace.write()
    told.trace.refused(records=1)
    told.trace.close()
    assert told.events == []


def test_a_restart_goes_on_in_the_file_and_cuts_a_torn_line(path: Path, whole: list[bytes]) -> None:
    path.write_bytes(b"".join(whole) + b'{"now_ms":9,"do":"lea')
    told = Told(path, records=3)
    told.trace.close()
    assert path.read_bytes().splitlines(keepends=True)[:-1] == whole
    assert lines_of(path)[-1] == {"now_ms": 5, "do": "start", "records": 3}
    (event,) = told.events
    assert (event["event"], event["file"]) == ("trace_torn_tail", str(path))


@pytest.mark.parametrize("kept", [0, 1, 50])
def test_a_header_that_was_torn_is_written_again(path: Path, whole: list[bytes], kept: int) -> None:
    path.write_bytes(whole[0][:kept])
    Told(path).trace.close()
    assert path.read_bytes() == b"".join(whole[:2])


def test_a_trace_that_begins_late_is_told(path: Path) -> None:
    told = Told(path, records=12)
    told.trace.close()
    (event,) = told.events
    assert event["event"] == "trace_begins_late"
    assert "12 records already" in event["text"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"name = 'a RunSpec'", "this is no membership trace"),
        (b"name = 'a RunSpec'\nand more", "this is no membership trace"),
        (b'{"format":"peerturb-membership-trace","version":2}\n', "the trace has version 2, this program reads"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(path: Path, content: bytes, why: str) -> None:
    path.write_bytes(content)
    with pytest.raises(SpecError, match=rf"--trace {path}:1: {why}.*name another file"):
        Told(path)
    assert path.read_bytes() == content


def test_other_runs_traces_and_ones_in_use_are_refused(path: Path, tmp_path: Path, whole: list[bytes]) -> None:
    with pytest.raises(SpecError, match="it is of the run with RunSpec digest"):
        Told(path, spec=OTHER)
    with pytest.raises(SpecError, match="it is of an earlier run of the same RunSpec"):
        Told(path)
    first = Told(path, records=1)
    with pytest.raises(SpecError, match="another coordinator writes it"):
        Told(path, records=1)
    first.trace.close()
    with pytest.raises(SpecError, match="Is a directory; name a file that can be written to"):
        Told(tmp_path)
    with pytest.raises(SpecError, match="No such file or directory"):
        Told(tmp_path / "nowhere" / "run.trace")


def test_a_full_file_ends_the_trace_with_one_warning(path: Path) -> None:
    told = Told(path, bytes_max=600)
    for _ in range(10):
        told.hear(HELLO)
        told.hear(CONTRIBUTION)
    (event,) = told.events
    assert (event["event"], event["level"]) == ("trace_ended", "warning")
    assert path.stat().st_size <= 600
    assert all(line for line in lines_of(path))


class Full:
    """A file on a disk that takes a part of a line, then nothing."""

    def __init__(self, path: Path, part: int | None) -> None:
        self._file = path.open("r+b", buffering=0)
        self._part = part

    def write(self, data: bytes) -> int:
        if self._part is None:
            raise OSError(28, "No space left on device")
        self._file.seek(0, 2)
        return self._file.write(data[: self._part])

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("part", [None, 11])
def test_a_full_disk_ends_the_trace_with_one_warning(path: Path, part: int | None) -> None:
    told = Told(path)
    before = path.read_bytes()
    assert told.trace._file is not None
    told.trace._file.close()
    told.trace._file = Full(path, part)  # type: ignore[assignment]
    for _ in range(3):
        told.hear(HELLO)
    assert [event["event"] for event in told.events] == ["trace_ended"]
    assert path.read_bytes() == before


# --- reading --------------------------------------------------------------------------------------------------------


def test_rows_carry_what_stopped_the_store(path: Path, whole: list[bytes]) -> None:
    refused, start = b'{"do":"refused","records":2}\n', b'{"now_ms":1,"do":"start","records":1}\n'
    path.write_bytes(b"".join([*whole[:4], refused, *whole[4:], start]))
    rows = list(Trace(path, SPEC).rows())
    assert [(row.line, row.input.do, row.records_max) for row in rows] == [
        (2, "start", None), (3, "hello", None), (4, "contribution", 2), (6, "evaluation", None), (7, "leave", 1),
        (8, "start", None),
    ]  # fmt: skip


def test_a_torn_last_line_is_left_out_and_counted(path: Path, whole: list[bytes]) -> None:
    path.write_bytes(b"".join(whole)[:-9])
    trace = Trace(path, SPEC)
    assert len(list(trace.rows())) == 4
    assert (trace.lines, trace.torn_bytes) == (5, len(whole[-1]) - 9)


Change = Callable[[list[bytes]], list[bytes]]


def with_line(number: int, data: bytes) -> Change:
    return lambda whole: [*whole[: number - 1], data + b"\n", *whole[number:]]


@pytest.mark.parametrize(
    ("line", "change", "why"),
    [
        (1, lambda _: [], "no membership trace"),
        (1, lambda whole: whole[1:], "no membership trace"),
        (1, with_line(1, b'{"format":"peerturb-membership-trace","version":7}'), "version 7, this program reads"),
        (1, with_line(1, b'{"format":"peerturb-membership-trace","version":1}'), "spec: Field required"),
        (1, lambda whole: whole[:1], "the coordinator was never started with it"),
        (2, lambda whole: [whole[0], *whole[2:]], "begins with a 'hello'"),
        (2, with_line(2, b'{"now_ms":1,"do":"start","records":9}'), "begins with 9 records in its log"),
        (2, with_line(2, b'{"do":"refused","records":0}'), "no input stands before it"),
        (4, with_line(4, b'{"now_ms":7,"do":'), "not JSON"),
        (4, with_line(4, b"\xff\xfe"), "not JSON"),
        (4, with_line(4, b"[" * 4_000), "not JSON"),
        (4, with_line(4, b'{"now_ms":7,"do":"dance","session":1}'), "dance"),
        (4, with_line(4, b'{"now_ms":7,"do":"contribution","session":1,"round":3}'), "count: Field required"),
        (4, with_line(4, b'{"now_ms":7.5,"do":"leave","session":1}'), "now_ms"),
        (4, with_line(4, b'{"now_ms":7,"do":"leave","session":1,"codes":"00"}'), "codes: Extra inputs"),
        (4, with_line(4, b'{"now_ms":7,"do":"contribution","session":1,"round":3,"count":65537}'), "count"),
        (4, with_line(4, b" " * 5_000), "at most 4096 bytes"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(path: Path, whole: list[bytes], line: int, change: Change, why: str) -> None:
    path.write_bytes(b"".join(change(whole)))
    with pytest.raises(TraceError, match=rf"^{path}:{line}: .*{why}") as caught:
        list(Trace(path, SPEC).rows())
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def test_another_runs_trace_is_named(path: Path, whole: list[bytes]) -> None:
    ours, theirs = OTHER.digest.hex()[:16], SPEC.digest.hex()[:16]
    with pytest.raises(TraceError, match=rf"{path}:1: .*digest {theirs}, the log's is {ours}"):
        Trace(path, OTHER)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SpecError, match=rf"--trace {wrong}: .*coordinator serve --trace"):
            Trace(wrong, SPEC)
