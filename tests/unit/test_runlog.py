"""Log files: what is written is read, a torn tail is cut and said so, damage before the end is named."""

import hashlib
import math
from pathlib import Path

import pytest

from peerturb import limits
from peerturb.errors import LogError
from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.ledger import Ledger, step_size
from peerturb.protocol.records import (
    Evaluated,
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.runlog import format
from peerturb.runlog.chain import CHAIN_START, ChainHash, chain_after
from peerturb.runlog.fold import describe, read_spec, sealed_rounds
from peerturb.runlog.reader import LogEnd, read_entries, read_records
from peerturb.runlog.verify import verify
from peerturb.runlog.writer import LogWriter, write_log
from peerturb.spec import ModelSpec, RoundSpec, RunSpec
from peerturb.wire.records import encode_record

SPEC = RunSpec(name="unit", model=ModelSpec(name="toy", digest="07000000" + "ab" * 28), round=RoundSpec(count=2))


def make_log() -> list[Record]:
    """A short legal run with every kind of record."""
    ledger, log = Ledger(), []

    def add(record: Record) -> None:
        ledger.apply(record)
        log.append(record)

    add(RunStarted(spec=SPEC))
    add(PeerJoined(slot=Slot(0), key=PeerKey(b"a" * 32), name="ann"))
    add(PeerJoined(slot=Slot(1), key=PeerKey(b"b" * 32), name="bob"))
    for number, codes in enumerate((b"\x05\x80\xfe", b"\x80\x80\x80")):
        round_ = RoundNumber(number)
        add(RoundOpened(round=round_, scale=ledger.scale, deadline_ms=2_000))
        assert ledger.open is not None
        alpha = step_size(SPEC, round_, ledger.open.scale, codes)
        loss = math.nan if number else 2.5
        slots, counts = (Slot(0), Slot(1)), (1, 2)
        add(RoundSealed(round=round_, alpha=alpha, loss=loss, digest=7, slots=slots, counts=counts, codes=codes))
        add(Evaluated(round=RoundNumber(number + 1), slot=Slot(1), loss=1.5, accuracy=0.25, examples=8))
    add(RunFinished(rounds=2))
    add(PeerLeft(slot=Slot(0), reason=LeaveReason.LEASE_EXPIRED))
    return log


LOG = make_log()
PAYLOADS = [encode_record(record) for record in LOG]


def offsets() -> list[int]:
    """Byte offset of every frame, and of the end."""
    places = [len(format.HEADER)]
    for payload in PAYLOADS:
        places.append(places[-1] + format.PREFIX_BYTES + len(payload))
    return places


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole log."""
    file = tmp_path / "run.log"
    write_log(file, PAYLOADS)
    return file


def test_what_is_written_is_read(path: Path) -> None:
    end = LogEnd()
    entries = list(read_entries(path, end))
    assert repr([record for _, record in entries]) == repr(LOG)
    assert [entry.offset for entry, _ in entries] == offsets()[:-1]
    chain = ChainHash()
    assert [chain.extend(payload) for payload in PAYLOADS] == [entry.chain for entry, _ in entries]
    assert end == LogEnd(records=len(LOG), chain=chain.value, size=path.stat().st_size, torn_bytes=0)


def test_verify_says_what_the_log_holds(path: Path) -> None:
    verified = verify(path)
    assert verified.ledger.sealed_rounds == 2
    assert verified.ledger.is_finished
    assert (verified.ledger.probes, verified.ledger.void_codes) == (6, 4)
    assert verified.torn_bytes == 0


def test_a_tail_torn_at_any_byte_is_cut_at_the_last_whole_record(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    places = offsets()
    for size in range(len(whole)):
        torn = tmp_path / "torn.log"
        torn.write_bytes(whole[:size])
        kept = sum(place <= size for place in places[1:])
        end = LogEnd()
        assert [entry.payload for entry, _ in read_entries(torn, end)] == PAYLOADS[:kept], size
        assert end.size + end.torn_bytes == size
        if size % 11 and size not in places:  # opening for writing waits for the disk: not at every byte
            continue
        with LogWriter.open(torn) as writer:
            assert writer.cut_bytes == end.torn_bytes
            assert writer.position == kept
            for payload in PAYLOADS[kept:]:
                writer.append_payload(payload)
        assert torn.read_bytes() == whole, size


def test_every_flipped_bit_is_noticed_where_it_is(path: Path, tmp_path: Path) -> None:
    whole, places = path.read_bytes(), offsets()
    damaged = tmp_path / "damaged.log"
    for index in range(len(whole)):
        data = bytearray(whole)
        data[index] ^= 1 << (index % 8)
        damaged.write_bytes(data)
        record = sum(place <= index for place in places) - 1
        with pytest.raises(LogError) as caught:
            verify(damaged)
        if record >= 0:
            assert f"record {record} at byte {places[record]}" in str(caught.value), index


def test_a_removed_record_breaks_the_chain(path: Path, tmp_path: Path) -> None:
    whole, places = path.read_bytes(), offsets()
    shorter = tmp_path / "shorter.log"
    shorter.write_bytes(whole[: places[2]] + whole[places[3] :])
    with pytest.raises(LogError, match=r"record 2 at byte .*hash chain"):
        verify(shorter)


def test_a_record_out_of_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "illegal.log"
    write_log(path, [PAYLOADS[0], PAYLOADS[2]])
    with pytest.raises(LogError, match=r"record 1 \(PeerJoined\) gives slot 1"):
        verify(path)


def test_a_record_that_does_not_decode_is_named(tmp_path: Path) -> None:
    path = tmp_path / "strange.log"
    write_log(path, [PAYLOADS[0], b"\xff\xff\xff"])
    with pytest.raises(LogError, match="record 1 at byte"):
        list(read_records(path))


def test_a_tail_of_zeros_is_torn_but_zeros_in_the_middle_are_damage(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100_000))
    assert verify(path).torn_bytes == 100_000
    path.write_bytes(whole + bytes(100) + b"\x01")
    with pytest.raises(LogError, match=f"record {len(LOG)}"):
        verify(path)


@pytest.mark.parametrize("data", [b"hello, world, this is text", b"peerturb.log\x02\0\0\0", b"x"])
def test_another_kind_of_file_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    for use in (verify, LogWriter.open):
        with pytest.raises(LogError, match="other"):
            use(path)
    assert path.read_bytes() == data


def test_a_missing_file_and_an_empty_log_are_errors_of_verify(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot read"):
        verify(tmp_path / "missing.log")
    write_log(tmp_path / "empty.log", [])
    with pytest.raises(LogError, match="empty"):
        verify(tmp_path / "empty.log")
    with pytest.raises(LogError, match="does not begin"):
        read_spec(tmp_path / "empty.log")


def test_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    seen: list[Record] = []
    for record in LOG:
        with LogWriter.open(path, syncs=True, on_record=seen.append) as writer:
            writer.append(record)
    assert [encode_record(record) for record in read_records(path)] == PAYLOADS
    assert len(seen) == len(LOG) * (len(LOG) - 1) // 2


def test_an_existing_log_is_not_overwritten(path: Path) -> None:
    with pytest.raises(LogError, match="exists"):
        write_log(path, PAYLOADS)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot create"):
        LogWriter.open(tmp_path / "nowhere" / "run.log")


class FullDisk:
    """A file that takes some bytes and then none."""

    closed = False

    def __init__(self, room: int) -> None:
        self.data = b""
        self.room = room

    def write(self, view: memoryview) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = bytes(view[: self.room])
        self.room -= len(taken)
        self.data += taken
        return len(taken)

    def truncate(self, size: int) -> None:
        self.data = self.data[: size - self.start]

    def seek(self, size: int) -> None:
        pass

    start = 0


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LogWriter.open(path) as writer:
        chain, position, real = writer.chain, writer.position, writer._file
        full = FullDisk(room=10)
        full.start = path.stat().st_size
        monkeypatch.setattr(writer, "_file", full)
        with pytest.raises(LogError, match="No space left"):
            writer.append(PeerLeft(slot=Slot(1), reason=LeaveReason.LEFT))
        assert full.data == b""
        assert (writer.chain, writer.position) == (chain, position)
        monkeypatch.setattr(writer, "_file", real)
        writer.append(PeerLeft(slot=Slot(1), reason=LeaveReason.LEFT))
    assert verify(path).ledger.position == len(LOG) + 1


def test_the_chain_is_sha_256_of_the_hash_before_and_the_bytes() -> None:
    assert hashlib.sha256(b"peerturb run log v1\0").digest() == CHAIN_START
    assert chain_after(CHAIN_START, b"x") == hashlib.sha256(CHAIN_START + b"x").digest()


def test_a_length_beyond_the_limit_is_damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:20] = (limits.RECORD_BYTES_MAX + 1).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(LogError, match="record 0 at byte 16: its length field"):
        verify(path)


def test_tools_read_the_spec_and_the_sealed_rounds(path: Path) -> None:
    assert read_spec(path) == SPEC
    assert [sealed.round for sealed in sealed_rounds(read_records(path))] == [0, 1]


def test_every_record_is_described_in_one_line() -> None:
    lines = [describe(record) for record in LOG]
    assert all(line and "\n" not in line for line in lines)
    assert "loss 2.5, 3 codes (slot:codes 0:1, 1:2)" in lines[4]
    assert "no loss" in lines[7]
