"""The log's bytes are those that an independent script made from the description: `make_log_vectors.py`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peerturb.ids import PeerKey, RoundNumber, Slot
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
from peerturb.runlog.reader import read_entries
from peerturb.runlog.verify import verify
from peerturb.runlog.writer import write_log
from peerturb.spec import ModelSpec, RoundSpec, RunSpec
from peerturb.wire.records import encode_record

SPEC = RunSpec(
    name="golden", seed=7, model=ModelSpec(name="toy", digest="efbeadde" + "ab" * 28), round=RoundSpec(count=3)
)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    """What the script wrote."""
    loaded: dict[str, Any] = json.loads(Path(__file__).with_name("log.json").read_text(encoding="utf-8"))
    return loaded


def expected(vectors: dict[str, Any]) -> list[Record]:
    """The records the script wrote, as values."""
    slots = (Slot(0), Slot(1))
    scales, alphas = vectors["scales"], vectors["alphas"]
    first, second = b"\x05\x80\xfe\x40", b"\x7f\x81\x01"
    return [
        RunStarted(spec=SPEC),
        PeerJoined(slot=Slot(0), key=PeerKey(b"a" * 32), name="ann"),
        PeerJoined(slot=Slot(1), key=PeerKey(b"b" * 32), name="bob"),
        RoundOpened(round=RoundNumber(0), scale=scales[0], deadline_ms=120_000),
        RoundSealed(
            round=RoundNumber(0), alpha=alphas[0], loss=2.5, digest=0xDEADBEEF, slots=slots, counts=(2, 2), codes=first
        ),
        Evaluated(round=RoundNumber(1), slot=Slot(1), loss=1.5, accuracy=0.0, examples=8),
        RoundOpened(round=RoundNumber(1), scale=scales[1], deadline_ms=4_000),
        RoundSealed(
            round=RoundNumber(1), alpha=alphas[1], loss=2.25, digest=17, slots=slots, counts=(2, 1), codes=second
        ),
        RoundOpened(round=RoundNumber(2), scale=scales[2], deadline_ms=4_000),
        RoundSealed(
            round=RoundNumber(2), alpha=0.0, loss=math.nan, digest=18, slots=slots[1:], counts=(2,), codes=b"\x80\x80"
        ),
        RunFinished(rounds=3),
        PeerLeft(slot=Slot(1), reason=LeaveReason.LEASE_EXPIRED),
    ]


def test_the_spec_has_the_scripts_digest(vectors: dict[str, Any]) -> None:
    assert SPEC.digest.hex() == vectors["spec_sha256"]


def test_records_encode_to_the_scripts_bytes(vectors: dict[str, Any]) -> None:
    assert [encode_record(record).hex() for record in expected(vectors)] == vectors["records"]


def test_the_file_is_the_scripts_byte_for_byte(vectors: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    write_log(path, [encode_record(record) for record in expected(vectors)])
    assert path.read_bytes().hex() == vectors["file"]


def test_the_scripts_file_is_read_and_verified(vectors: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_bytes(bytes.fromhex(vectors["file"]))
    entries = list(read_entries(path))
    assert repr([record for _, record in entries]) == repr(expected(vectors))
    assert [entry.chain.hex() for entry, _ in entries] == vectors["chains"]
    assert verify(path).chain.hex() == vectors["chains"][-1]
