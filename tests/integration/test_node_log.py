"""`peerturb log` on a file, on a coordinator's folder and on a running coordinator; damage is named."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from peerturb.runlog.reader import read_entries
from tests.integration.network import network, toy_run

pytestmark = pytest.mark.integration


def test_the_log_commands(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=25)) as net:
        coordinator = net.start_coordinator()
        node = net.start_node("node")
        assert node.wait() == 0
        live = tmp_path / "live.runlog"
        assert net.run("log", "export", "--coordinator", net.address, "--out", str(live)).returncode == 0
        assert net.run("log", "verify", "--coordinator", net.address).returncode == 0
        status = json.loads(net.run("status", "--coordinator", net.address, "--json").stdout)
        assert coordinator.stop() == 0
        folder = str(net.data_dir)
        stored = tmp_path / "stored.runlog"
        exported = net.run("log", "export", folder, "--out", str(stored), "--json")
        assert exported.returncode == 0, exported.stderr
        assert json.loads(exported.stdout)["records"] > 50
        assert stored.read_bytes().startswith(live.read_bytes())
        assert net.run("log", "export", folder, "--out", str(stored)).returncode == 3, "a file is never overwritten"

        found = json.loads(net.run("log", "verify", str(stored), "--json").stdout)
        assert (found["rounds"], found["is_finished"], found["peers"]) == (25, True, 1)
        assert json.loads(net.run("log", "verify", folder, "--json").stdout)["chain"] == found["chain"]

        shown = net.run("log", "show", str(stored), "--rounds", "10:11", "--json")
        rows = [json.loads(line) for line in shown.stdout.splitlines()]
        assert {row["round"] for row in rows} == {10, 11}
        assert {row["kind"] for row in rows} >= {"RoundOpened", "RoundSealed"}
        # The node, the log and a running coordinator show a digest alike.
        assert {row["digest"] for row in rows if row["kind"] == "RoundSealed"} <= {
            node.digests()[10],
            node.digests()[11],
        }
        assert status["digest"] == node.digests()[24]
        assert "run toy started" in net.run("log", "show", str(stored)).stdout.splitlines()[0]
        first = json.loads(net.run("log", "show", str(stored), "--json").stdout.splitlines()[0])
        assert first["spec"]["objective"]["eval_every"] == 10, "who joins can read what it is about"

        beyond = net.run("log", "replay", str(stored), "--until", "26")
        assert beyond.returncode == 2
        assert "--until 26" in beyond.stderr
        assert "only 25 sealed rounds" in beyond.stderr

        entries = [entry for entry, _ in read_entries(stored)]
        data = bytearray(stored.read_bytes())
        data[entries[20].offset + 45] ^= 1
        stored.write_bytes(data)
        broken = net.run("log", "verify", str(stored))
        assert broken.returncode == 3
        assert "record 20" in broken.stderr
        _damage(net.data_dir / "run.sqlite", position=5)
        for arguments in (["verify", folder], ["export", folder, "--out", str(tmp_path / "x.runlog")]):
            damaged = net.run("log", *arguments)
            assert damaged.returncode == 3
            assert "record 5" in damaged.stderr
        assert not list(tmp_path.glob("x.runlog*")), "half a log is no log"
        live.write_bytes(live.read_bytes()[:-3])
        torn = net.run("log", "verify", str(live))
        assert torn.returncode == 0
        assert "not written whole" in torn.stdout
        for arguments in (["show", str(live)], ["export", str(live), "--out", str(tmp_path / "cut.runlog")]):
            cut = net.run("log", *arguments)
            assert cut.returncode == 0
            assert "not written whole" in cut.stderr


def _damage(database: Path, *, position: int) -> None:
    """Flip a bit of one record's bytes, as a bad disk would."""
    with closing(sqlite3.connect(database)) as connection, connection:
        (payload,) = connection.execute("SELECT payload FROM record WHERE position = ?", (position,)).fetchone()
        changed = bytes([payload[0] ^ 1]) + payload[1:]
        connection.execute("UPDATE record SET payload = ? WHERE position = ?", (changed, position))


def test_a_log_from_the_network_is_held_against_the_chain_that_its_coordinator_states(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=5)) as net:
        net.start_coordinator()
        assert net.start_node("node").wait() == 0
        # Under the running coordinator: the records it reads from its disk are not those it hashed.
        _damage(net.data_dir / "run.sqlite", position=5)
        out = tmp_path / "x.runlog"
        for arguments in (["verify"], ["show"], ["export", "--out", str(out)]):
            damaged = net.run("log", *arguments, "--coordinator", net.address)
            assert damaged.returncode == 3, damaged.stderr
            assert net.address in damaged.stderr
            assert "hash to chain" in damaged.stderr
        assert not out.exists()


def test_a_coordinator_that_keeps_records_back_is_noticed(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=5)) as net:
        net.start_coordinator()
        assert net.start_node("node").wait() == 0
        with closing(sqlite3.connect(net.data_dir / "run.sqlite")) as connection, connection:
            connection.execute("DELETE FROM record WHERE position > 5")
        short = net.run("log", "verify", "--coordinator", net.address)
        assert short.returncode == 3, short.stderr
        assert "sent 6 of its" in short.stderr


def test_a_damaged_log_is_not_served(tmp_path: Path) -> None:
    with network(tmp_path, toy_run(count=5)) as net:
        coordinator = net.start_coordinator()
        assert net.start_node("node").wait() == 0
        assert coordinator.stop() == 0
        _damage(net.data_dir / "run.sqlite", position=7)
        refused = net.run(
            "coordinator", "serve", str(net.run_file), "--listen", "127.0.0.1:0", "--data-dir", str(net.data_dir)
        )
        assert refused.returncode == 3, refused.stderr
        assert "record 7" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show"], 2, "--coordinator"),
        (["show", "none.runlog"], 3, "none.runlog"),
        (["verify", "{folder}"], 3, "run.sqlite"),
        (["show", "{empty}", "--rounds", "x:y"], 2, "A:B"),
        (["verify", "{empty}"], 3, "empty"),
        (["export", "{empty}"], 2, "--out"),
        (["show", "--coordinator", "127.0.0.1:1"], 5, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    empty = tmp_path / "empty.runlog"
    empty.touch()
    with network(tmp_path, toy_run()) as net:
        result = net.run("log", *[part.format(folder=tmp_path, empty=empty) for part in arguments])
    assert result.returncode == code, result.stderr
    assert said in result.stderr
