"""One contract for every log store, then what only a file can do."""

import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerturb.errors import LogError
from peerturb.ids import Position
from peerturb.runlog.chain import CHAIN_START, chain_after
from peerturb_coordinator.store import (
    DATABASE_FILE,
    LOCK_FILE,
    Entry,
    LogStore,
    MemoryLogStore,
    SqliteLogStore,
    StoreFault,
    read_all,
)


def entry(number: int, size: int = 10) -> Entry:
    return Entry(kind="RoundSealed", round=number, payload=number.to_bytes(4, "little") + b"c" * (size - 4))


def chain_of(entries: list[Entry]) -> bytes:
    chain = CHAIN_START
    for item in entries:
        chain = chain_after(chain, item.payload)
    return chain


class StoreContract:
    """What the coordinator relies on."""

    def test_a_new_log_is_empty(self, store: LogStore) -> None:
        assert store.head == 0
        assert store.chain == CHAIN_START
        assert store.chain_at(Position(0)) == CHAIN_START
        assert store.chain_at(Position(1)) is None
        assert store.read(Position(0), 1_000) == []

    def test_appended_records_come_back_in_order(self, store: LogStore) -> None:
        entries = [entry(number) for number in range(10)]
        store.append(entries[:1])
        store.append(entries[1:7])
        store.append([])
        store.append(entries[7:])
        assert store.head == 10
        assert store.read(Position(0), 1_000_000) == [item.payload for item in entries]
        assert store.read(Position(8), 1_000_000) == [item.payload for item in entries[8:]]
        assert store.read(Position(10), 1_000_000) == []
        assert list(read_all(store, 25)) == [item.payload for item in entries]

    def test_a_batch_ends_with_the_record_that_passes_the_limit(self, store: LogStore) -> None:
        store.append([entry(number, size=100) for number in range(10)])
        assert len(store.read(Position(0), 250)) == 3
        assert len(store.read(Position(0), 300)) == 3
        assert len(store.read(Position(0), 1)) == 1

    def test_the_chain_covers_every_record(self, store: LogStore) -> None:
        entries = [entry(number) for number in range(5)]
        store.append(entries[:3])
        store.append(entries[3:])
        assert store.chain == chain_of(entries)
        for position in range(6):
            assert store.chain_at(Position(position)) == chain_of(entries[:position])
        assert store.chain_at(Position(6)) is None
        assert store.chain_at(Position(2**63)) is None

    def test_nothing_lies_beyond_the_head(self, store: LogStore) -> None:
        store.append([entry(0)])
        with pytest.raises(LogError, match="the log has 1 records"):
            store.read(Position(2), 1)

    def test_closing_twice_is_harmless(self, store: LogStore) -> None:
        store.close()
        store.close()


class TestMemoryLogStore(StoreContract):
    @pytest.fixture
    def store(self) -> LogStore:
        return MemoryLogStore()


class TestSqliteLogStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[LogStore]:
        store = SqliteLogStore(tmp_path / "data")
        yield store
        store.close()

    def test_a_log_outlives_its_process(self, tmp_path: Path) -> None:
        entries = [entry(number, size=5_000) for number in range(600)]
        store = SqliteLogStore(tmp_path)
        store.append(entries[:599])
        store.close()
        store = SqliteLogStore(tmp_path)
        assert store.head == 599
        assert store.chain == chain_of(entries[:599])
        store.append(entries[599:])
        assert list(read_all(store, 100_000)) == [item.payload for item in entries]
        store.close()

    def test_a_second_process_is_refused(self, tmp_path: Path) -> None:
        store = SqliteLogStore(tmp_path)
        program = (
            "import sys; from pathlib import Path; from peerturb_coordinator.store import SqliteLogStore\n"
            "from peerturb.errors import LogError\n"
            "try: SqliteLogStore(Path(sys.argv[1]))\n"
            "except LogError as error: print(error)\n"
        )
        said = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
        ).stdout
        assert "in use by another coordinator" in said
        assert (tmp_path / LOCK_FILE).read_text().strip() in said
        store.append([entry(0)])
        store.close()
        SqliteLogStore(tmp_path).close()

    def test_a_folder_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("")
        with pytest.raises(LogError, match="data folder"):
            SqliteLogStore(tmp_path / "data")

    @pytest.mark.parametrize("position", [0, 5, 499])
    def test_a_damaged_record_is_named(self, tmp_path: Path, position: int) -> None:
        store = SqliteLogStore(tmp_path)
        store.append([entry(number) for number in range(500)])
        store.close()
        with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
            connection.execute("UPDATE record SET payload = x'00' WHERE position = ?", (position,))
        connection.close()
        with pytest.raises(LogError, match=rf"record {position} does not hash"):
            SqliteLogStore(tmp_path)

    def test_a_missing_record_is_noticed(self, tmp_path: Path) -> None:
        store = SqliteLogStore(tmp_path)
        store.append([entry(number) for number in range(20)])
        store.close()
        with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
            connection.execute("DELETE FROM record WHERE position = 3")
        connection.close()
        with pytest.raises(LogError, match="damaged"):
            SqliteLogStore(tmp_path)

    def test_strange_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / DATABASE_FILE).write_bytes(b"no database at all" * 100)
        with pytest.raises(LogError, match="cannot be opened as a run log"):
            SqliteLogStore(tmp_path)
        (tmp_path / DATABASE_FILE).unlink()
        with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
            connection.execute("CREATE TABLE other (x)")
        connection.close()
        with pytest.raises(LogError, match="another program"):
            SqliteLogStore(tmp_path)

    def test_another_schema_version_is_refused(self, tmp_path: Path) -> None:
        SqliteLogStore(tmp_path).close()
        with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        with pytest.raises(LogError, match="schema version 99"):
            SqliteLogStore(tmp_path)

    def test_a_disk_that_refuses_costs_nothing_that_was_taken(self, tmp_path: Path) -> None:
        store = SqliteLogStore(tmp_path)
        taken = [entry(number, size=2_000) for number in range(30)]
        store.append(taken)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        try:
            for number in range(30, 200):
                try:
                    store.append([entry(number, size=2_000)])
                except StoreFault:
                    break
                taken.append(entry(number, size=2_000))
            assert len(taken) < 200
            with pytest.raises(StoreFault, match=DATABASE_FILE):
                store.append([entry(10_000, size=200_000)])
            assert store.head == len(taken)
            assert list(read_all(store, 10_000)) == [item.payload for item in taken]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        taken.append(entry(len(taken), size=2_000))
        store.append(taken[-1:])
        assert store.chain == chain_of(taken)
        store.close()
        store = SqliteLogStore(tmp_path)
        assert list(read_all(store, 10_000)) == [item.payload for item in taken]
        store.close()

    def test_all_entries_of_a_batch_or_none(self, tmp_path: Path) -> None:
        store = SqliteLogStore(tmp_path)
        store.append([entry(0)])
        broken = Entry(kind="RoundSealed", round=2**70, payload=b"a round SQLite cannot hold")
        with pytest.raises((StoreFault, OverflowError)):
            store.append([entry(1), broken])
        assert store.head == 1
        store.append([entry(1)])
        assert store.chain == chain_of([entry(0), entry(1)])
        store.close()
