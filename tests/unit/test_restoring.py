"""A data folder from logs: the longest one of a run, whole or not at all."""

from pathlib import Path

import pytest

from peerturb.errors import LogError
from peerturb.runlog.verify import verify
from peerturb.runlog.writer import write_log
from peerturb.wire.records import encode_record
from peerturb_coordinator import restoring
from peerturb_coordinator.restoring import restore
from peerturb_coordinator.store import DATABASE_FILE, SqliteLogStore, StoreFault, read_all
from tests.unit.test_runlog import make_log

PAYLOADS = [encode_record(record) for record in make_log()]


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    """A run's log, the first records of it, and another run's (its first peer has another name)."""
    other = [PAYLOADS[0], PAYLOADS[1].replace(b"ann", b"eve"), *PAYLOADS[2:4]]
    found = {"whole": PAYLOADS, "old": PAYLOADS[:5], "other": other}
    for name, payloads in found.items():
        write_log(tmp_path / f"{name}.runlog", payloads)
    return {name: tmp_path / f"{name}.runlog" for name in found}


@pytest.mark.parametrize("batch", [1, 3, 4096])
def test_the_longest_log_becomes_the_store(
    tmp_path: Path, logs: dict[str, Path], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_BATCH", batch)
    folder = tmp_path / "new" / "made"
    found = restore([logs["old"], logs["whole"], logs["old"]], folder)
    assert found.log == logs["whole"]
    store = SqliteLogStore(folder)
    assert list(read_all(store, 100)) == PAYLOADS
    assert store.chain == found.verified.chain
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["new"]
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_logs_of_different_runs_are_refused(tmp_path: Path, logs: dict[str, Path]) -> None:
    with pytest.raises(LogError, match=r"other\.runlog and .*whole\.runlog part within their first 4 records"):
        restore([logs["whole"], logs["other"]], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_run_is_never_written_over(tmp_path: Path, logs: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    restore([logs["old"]], tmp_path / "empty")
    with pytest.raises(LogError, match="holds a run already"):
        restore([logs["whole"]], tmp_path / "empty")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("keep me")
    with pytest.raises(LogError, match="not an empty folder"):
        restore([logs["whole"]], tmp_path / "used")
    with pytest.raises(LogError, match="at least one"):
        restore([], tmp_path / "made")


def test_a_damaged_log_and_a_failing_disk_leave_nothing_behind(
    tmp_path: Path, logs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(logs["whole"].read_bytes())
    data[-20] ^= 1
    damaged = tmp_path / "damaged.runlog"
    damaged.write_bytes(data)
    with pytest.raises(LogError, match=r"damaged\.runlog: record"):
        restore([logs["old"], damaged], tmp_path / "made")
    monkeypatch.setattr(SqliteLogStore, "append", _no_room)
    with pytest.raises(LogError, match=r"made: cannot write .* disk is full"):
        restore([logs["whole"]], tmp_path / "made")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def _no_room(store: SqliteLogStore, entries: object) -> None:
    raise StoreFault("cannot write run.sqlite: database or disk is full")


def test_a_log_that_changes_meanwhile_is_noticed(
    tmp_path: Path, logs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = verify(logs["whole"])
    monkeypatch.setattr(restoring, "verify", lambda path: verified)
    with pytest.raises(LogError, match="changed while it was read"):
        restore([logs["old"]], tmp_path / "made")
    assert not (tmp_path / "made" / DATABASE_FILE).exists()
