"""Two logs that differ in one place: the place, both values and what they mean are told; nothing else is."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerturb import cli
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
from peerturb.runlog.writer import write_log
from peerturb.spec import ModelSpec, PerturbationSpec, RoundSpec, RunSpec
from peerturb.wire.records import RecordDecoder, encode_record
from peerturb_sim.compare import Comparison, compare, compare_logs, lines
from tests.property import strategies

SPEC = RunSpec(name="twins", seed=3, model=ModelSpec(name="toy", digest="07" * 32), round=RoundSpec(count=3))
CODES = (bytes([5, 0x80, 0xFE, 9, 9]), bytes([1, 2, 3, 4, 5]), bytes([100, 0, 0, 0, 0]))


def make_log() -> list[Record]:
    """A legal run of three rounds, two peers with 2 and 3 codes each, and every kind of record."""
    ledger, log = Ledger(), []

    def add(record: Record) -> None:
        ledger.apply(record)
        log.append(record)

    add(RunStarted(spec=SPEC))
    add(PeerJoined(slot=Slot(0), key=PeerKey(b"a" * 32), name="ann"))
    add(PeerJoined(slot=Slot(1), key=PeerKey(b"b" * 32), name="bob"))
    for number, codes in enumerate(CODES):
        round_ = RoundNumber(number)
        add(RoundOpened(round=round_, scale=ledger.scale, deadline_ms=2_000))
        assert ledger.open is not None
        alpha = step_size(SPEC, round_, ledger.open.scale, codes)
        digest = 0x07070707 + number
        slots = (Slot(0), Slot(1))
        add(RoundSealed(round=round_, alpha=alpha, loss=2.5, digest=digest, slots=slots, counts=(2, 3), codes=codes))
    add(Evaluated(round=RoundNumber(3), slot=Slot(1), loss=1.5, accuracy=0.25, examples=8))
    add(RunFinished(rounds=3))
    add(PeerLeft(slot=Slot(0), reason=LeaveReason.LEFT))
    return log


LOG = make_log()
SECOND_ROUND = 6
"""Position of the second sealed round."""


def _write(folder: Path, name: str, records: list[Record]) -> Path:
    path = folder / name
    write_log(path, [encode_record(record) for record in records])
    return path


def _differ(folder: Path, position: int, **changes: Any) -> Comparison:
    """Compare the log with one whose record at `position` is changed."""
    changed = [replace(record, **changes) if at == position else record for at, record in enumerate(LOG)]
    return compare_logs(_write(folder, "a.runlog", LOG), _write(folder, "b.runlog", changed))


def test_equal_logs(tmp_path: Path) -> None:
    found = compare_logs(_write(tmp_path, "a.runlog", LOG), _write(tmp_path, "b.runlog", LOG))
    assert (found.outcome, found.equal_records, found.equal_rounds, found.exit_code) == ("equal", len(LOG), 3, 0)
    assert list(lines(found, ("a", "b"))) == [f"equal: {len(LOG)} records, 3 sealed rounds"]


CHANGES: list[tuple[int, dict[str, Any], str, Any, Any, str]] = [
    (1, {"key": PeerKey(b"c" * 32)}, "key", "61" * 32, "63" * 32, "another identity"),
    (1, {"name": "eve"}, "name", "ann", "eve", "display name"),
    (2, {"slot": Slot(5)}, "slot", 1, 5, "joined first"),
    (3, {"scale": 0.25}, "scale", 0.5, 0.25, "peerturb log verify"),
    (3, {"deadline_ms": 9}, "deadline_ms", 2_000, 9, "pace"),
    (4, {"digest": 1}, "digest", "07070707", "01000000", "began with other weights"),
    (SECOND_ROUND, {"digest": 1}, "digest", "08070707", "01000000", "weights went apart: the codes of all 1 rounds"),
    (SECOND_ROUND, {"alpha": 2.0}, "alpha", LOG[SECOND_ROUND].alpha, 2.0, "step size"),  # type: ignore[union-attr]
    (SECOND_ROUND, {"loss": math.nan}, "loss", 2.5, None, "rounded otherwise"),
    (SECOND_ROUND, {"slots": (Slot(0), Slot(7))}, "slots", [0, 1], [0, 7], "only the first log has slot 1, only the"),
    (9, {"loss": 1.25}, "loss", 1.5, 1.25, "judged otherwise"),
    (9, {"accuracy": None}, "accuracy", 0.25, None, "held-out data"),
    (9, {"slot": Slot(0)}, "slot", 1, 0, "another evaluation"),
    (10, {"rounds": 2}, "rounds", 3, 2, "ended after"),
    (11, {"reason": LeaveReason.EVICTED}, "reason", "left", "evicted", "in another way"),
    (11, {"slot": Slot(1)}, "slot", 0, 1, "left first"),
]


@pytest.mark.parametrize(("position", "changes", "field", "first", "second", "words"), CHANGES)
def test_the_field_both_values_and_their_meaning_are_told(
    tmp_path: Path, position: int, changes: dict[str, Any], field: str, first: Any, second: Any, words: str
) -> None:
    found = _differ(tmp_path, position, **changes)
    assert (found.outcome, found.exit_code, found.equal_records) == ("different", 1, position)
    assert found.equal_rounds == sum(isinstance(record, RoundSealed) for record in LOG[:position])
    row = found.difference
    assert row is not None
    assert (row.field, row.first, row.second, row.others) == (field, first, second, ())
    assert row.round == getattr(LOG[position], "round", None)
    assert words in row.meaning
    said = "\n".join(lines(found, ("a.runlog", "b.runlog")))
    assert f"different from record {position} on" in said
    assert row.meaning in said


@pytest.mark.parametrize(
    ("codes", "slot", "sample", "values", "words"),
    [
        (bytes([1, 2, 3, 5, 5]), 1, 1, (4, 5), "1 of 3 codes of slot 1 differ, by at most 1: losses were rounded"),
        (bytes([1, 2, 60, 5, 0xFB]), 1, 0, (3, 60), "3 of 3 codes of slot 1 differ, by up to 57: other data"),
        (bytes([7, 2, 3, 4, 99]), 0, 0, (1, 7), "1 of 2 codes of slot 0 differ, and codes of 1 other slots, by up"),
        (bytes([1, 0x80, 3, 4, 5]), 0, 1, (2, -128), "a loss was finite in one run only"),
    ],
)
def test_codes_say_whose_they_are_and_how_far_apart(
    tmp_path: Path, codes: bytes, slot: int, sample: int, values: tuple[int, int], words: str
) -> None:
    row = _differ(tmp_path, SECOND_ROUND, codes=codes, alpha=7.0).difference
    assert row is not None
    assert (row.field, row.slot, row.sample, row.first, row.second) == ("codes", slot, sample, *values)
    assert row.place == f"codes of slot {slot}, sample {sample}"
    assert row.others == ("alpha",)
    assert words in row.meaning


def test_counts_say_whose_they_are(tmp_path: Path) -> None:
    row = _differ(tmp_path, SECOND_ROUND, counts=(2, 4), codes=bytes(6)).difference
    assert row is not None
    assert (row.field, row.slot, row.sample, row.first, row.second) == ("counts", 1, None, 3, 4)
    assert row.others == ("codes",)


def test_another_spec_is_not_the_same_run(tmp_path: Path) -> None:
    other = SPEC.model_copy(update={"seed": 4, "perturbation": PerturbationSpec(sides="one")})
    row = _differ(tmp_path, 0, spec=RunSpec.model_validate(other.model_dump())).difference
    assert row is not None
    assert (row.field, row.others) == ("spec.seed", ("spec.perturbation.sides",))
    assert "not the same run" in row.meaning
    assert SPEC.digest.hex()[:16] in row.meaning


@pytest.mark.parametrize(
    ("position", "instead", "words"),
    [
        (3, PeerLeft(slot=Slot(1), reason=LeaveReason.LEFT), "joined or left at another moment"),
        (9, RunFinished(rounds=3), "evaluation came at another moment"),
        (10, RoundOpened(round=RoundNumber(3), scale=1.0, deadline_ms=9), "rounds opened"),
    ],
)
def test_another_kind_of_record(tmp_path: Path, position: int, instead: Record, words: str) -> None:
    changed = [*LOG[:position], instead, *LOG[position:]]
    found = compare_logs(_write(tmp_path, "a.runlog", LOG), _write(tmp_path, "b.runlog", changed))
    row = found.difference
    assert row is not None
    assert (row.field, row.first, row.second) == ("kind", type(LOG[position]).__name__, type(instead).__name__)
    assert words in row.meaning


@pytest.mark.parametrize("name", ["run.log", "local.runlog"])
def test_a_folder_with_a_log_is_that_log(tmp_path: Path, name: str) -> None:
    """As simulations and nodes leave them."""
    path = _write(tmp_path, name, LOG)
    assert compare_logs(tmp_path, path).outcome == "equal"


def test_a_prefix_is_no_difference(tmp_path: Path) -> None:
    whole, part = _write(tmp_path, "a.runlog", LOG), _write(tmp_path, "b.runlog", LOG[:SECOND_ROUND])
    for paths, outcome in (((whole, part), "first goes on"), ((part, whole), "second goes on")):
        found = compare_logs(*paths)
        assert (found.outcome, found.exit_code, found.difference) == (outcome, 1, None)
        assert (found.equal_records, found.equal_rounds) == (SECOND_ROUND, 1)
        assert (found.extra_records, found.extra_rounds) == (len(LOG) - SECOND_ROUND, 2)
        [said] = lines(found, (paths[0].name, paths[1].name))
        assert said.startswith("b.runlog is the beginning of a.runlog")


def test_a_torn_tail_is_not_part_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, torn = _write(tmp_path, "a.runlog", LOG), _write(tmp_path, "b.runlog", LOG)
    torn.write_bytes(torn.read_bytes()[:-1])
    found = compare_logs(whole, torn)
    assert (found.outcome, found.extra_records) == ("first goes on", 1)
    assert "not written whole" in capsys.readouterr().err


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil", [_flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["flip", "gone", "empty"]
)
@pytest.mark.parametrize("which", [0, 1])
def test_unusable_logs_end_with_two(tmp_path: Path, spoil: Callable[[Path], object], which: int) -> None:
    paths = [_write(tmp_path, name, LOG) for name in ("a.runlog", "b.runlog")]
    spoil(paths[which])
    with pytest.raises(LogError, match=paths[which].name) as caught:
        compare_logs(*paths)
    assert caught.value.exit_code == 2
    assert LogError.exit_code == 3, "the log commands' own"


def test_a_folder_without_a_log_says_what_it_looked_for(tmp_path: Path) -> None:
    whole = _write(tmp_path, "a.runlog", LOG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LogError, match=r"empty holds no log: neither run\.log .*nor run\.sqlite .*name the folder"):
        compare_logs(whole, tmp_path / "empty")


def _numbered(records: list[Record]) -> list[tuple[bytes, Record]]:
    """Encode, and decode as a reader does: round numbers follow from the records before."""
    decoder = RecordDecoder()
    payloads = [encode_record(record) for record in records]
    return [(payload, decoder.decode(payload)) for payload in payloads]


@settings(deadline=None)
@given(st.lists(strategies.records(0), max_size=5), strategies.records(0), strategies.records(0))
def test_any_two_records_are_told_apart(common: list[Record], one: Record, other: Record) -> None:
    found = compare(_numbered([*common, one]), _numbered([*common, other]))
    mirrored = compare(_numbered([*common, other]), _numbered([*common, one]))
    if encode_record(one) == encode_record(other):
        assert found.outcome == mirrored.outcome == "equal"
        return
    assert found.outcome == mirrored.outcome == "different"
    assert found.equal_records == len(common)
    row, back = found.difference, mirrored.difference
    assert row is not None
    assert back is not None
    assert (row.place, repr(row.first), repr(row.second)) == (back.place, repr(back.second), repr(back.first))
    assert repr(row.first) != repr(row.second) or row.field == "digest" or _is_lost_in_json(one, other, row.field)
    assert row.meaning


def _is_lost_in_json(one: Record, other: Record, field: str) -> bool:
    """Losses that are not finite are all null in JSON."""
    values = [getattr(record, field) for record in (one, other)]
    return all(isinstance(value, float) and not math.isfinite(value) for value in values) and (
        struct.pack("<d", values[0]) != struct.pack("<d", values[1])
    )


def test_the_command_ends_as_cmp_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(_write(tmp_path, name, LOG)) for name in ("a.runlog", "b.runlog"))
    third = str(_write(tmp_path, "c.runlog", [*LOG[:-1], PeerLeft(slot=Slot(1), reason=LeaveReason.LEFT)]))
    assert cli.run(["sim", "compare", first, second]) == 0
    assert cli.run(["sim", "compare", first, third]) == 1
    assert "slot: 0" in capsys.readouterr().out
    assert cli.run(["sim", "compare", first, str(tmp_path / "none.runlog")]) == 2
    assert "there is no log" in capsys.readouterr().err
    assert cli.run(["sim", "compare", first, third, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["outcome"], document["equal_records"]) == ("different", len(LOG) - 1)
    assert (document["difference"]["field"], document["difference"]["second"]) == ("slot", 1)
