"""`peerturb sim reproduce`: which peer gets which data, and what is said of input that cannot be used."""

from pathlib import Path
from typing import Any

import pytest

from peerturb import cli
from peerturb.errors import DataError
from peerturb.ids import PeerKey, Slot
from peerturb.protocol.ledger import Member
from peerturb.runlog.writer import write_log
from peerturb.wire.records import encode_record
from peerturb_sim.assigning import assign
from tests.unit.test_sim_compare import LOG, SPEC

KEYS = [PeerKey(bytes([16 * (slot + 10)]) * 32) for slot in range(4)]
"""Identities a0a0..., b0b0..., ..."""
MEMBERS = [
    Member(slot=Slot(slot), key=KEYS[slot], name=name) for slot, name in enumerate(["ann", "bob", "bob", "dora"])
]
GIVERS = {KEYS[0], KEYS[1], KEYS[3]}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d", "x=y"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("data", "files"),
    [
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        (["ann=a", "b0b0=b", "c0=c", "dora=d"], ["a", "b", "c", "d"]),
        (["dora=d", "a", "b", "c"], ["a", "b", "c", "d"]),
        (["ann=a", "B0=b", "d0d0=d"], ["a", "b", "a", "d"]),
        (["x=y", "b", "c", "d"], ["x=y", "b", "c", "d"]),
        (["ann=x=y", "b", "c", "d"], ["x=y", "b", "c", "d"]),
    ],
)  # fmt: skip
def test_files_go_to_named_peers_and_the_others_in_order(data: list[str], files: list[str]) -> None:
    found = assign(data, MEMBERS, GIVERS)
    # Slot 2 gave nothing: any file will do for it, and it may be left out.
    assert [str(file) for file in found] == files


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (["a", "b", "c", "d", "a"], "5 files without a peer for 4 slots; the peers are slot 0: ann"),
        (["a", "b", "c"], "no file for slot 3"),
        (["ann=a", "ann=b"], "slot 0 .ann. has a file already"),
        (["eve=a"], "eve=...: no peer has that name or identity; the peers are slot 0: ann .a0a0a0a0a0a0a0a0., "),
        (["bob=b"], "2 peers do: name it by its identity"),
        (["=a"], "no peer has that name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(data: list[str], why: str) -> None:
    with pytest.raises(DataError, match=why):
        assign(data, MEMBERS, GIVERS)


HEADER = f'{{"format":"peerturb-membership-trace","version":1,"spec":"{SPEC.digest.hex()}"}}\n'
START = '{"now_ms":1,"do":"start","records":0}\n'
EVALUATION = '{"now_ms":2,"do":"evaluation","session":1,"round":0}\n'


@pytest.mark.parametrize(
    ("flags", "trace", "says"),
    [
        ({}, "", "error: run.trace:1: this is no membership trace"),
        ({}, HEADER + START + "{\n", "error: run.trace:3: this is no line of a trace: not JSON"),
        ({}, HEADER + START + EVALUATION, "error: run.trace:3: a peer evaluated: name its held-out file with --eval"),
        ({"--data": "eve=a"}, HEADER + START, "error: --data eve=...: no peer has that name"),
        ({"--compute-dtype": "int8"}, HEADER + START, "error: --compute-dtype: Input should be 'auto'"),
        ({"--model": "no-such-model"}, HEADER + START, "no-such-model"),
        ({"--trace": "nothing"}, HEADER + START, "error: --trace nothing: No such file or directory; name the file"),
        ({"--out": "a"}, HEADER + START, "error: --out a: File exists; name a folder that can be written to"),
        ({"--out": "."}, HEADER + START, "error: --out .: it holds the recorded log, which would be replaced"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error(
    flags: dict[str, str], trace: str, says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--out" in flags:
        # The model is loaded before the folder is made.
        monkeypatch.setattr("peerturb_sim.torch_compute.TorchCompute", _no_model)
    write_log(Path("run.log"), [encode_record(record) for record in LOG])
    before = Path("run.log").read_bytes()
    Path("run.trace").write_text(trace)
    given = {"--trace": "run.trace", "--data": "a"} | flags
    code = cli.run(["sim", "reproduce", "run.log", *(word for pair in given.items() for word in pair)])
    errors = capfd.readouterr().err
    assert (code, errors.count("error:")) == (2, 1), errors
    assert says in errors
    assert Path("run.log").read_bytes() == before


def _no_model(*_: Any) -> None:
    pytest.fail("the model was loaded before the folder was looked at")
