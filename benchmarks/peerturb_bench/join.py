"""A peer that joins late: how long until it trains, and how many bytes reached it per code.

A legal log of plausible codes (normal, rms 32) is written straight into a coordinator's store; the digests in it are
those of the weights it really gives. Then the product's own node process joins through a counting proxy, on 2 threads.

value: seconds from starting the process to the first probe, model loaded; bytes above TCP per code. reference: the
limit the project promises for 2 000 rounds of 512 probes. ratio: value / reference (at most 1).
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from peerturb import stepping
from peerturb.errors import ModelError, UnreachableError
from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import LeaveReason, PeerJoined, PeerLeft, Record, RoundOpened, RoundSealed, RunStarted
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec
from peerturb.wire.records import encode_record
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.model import base_digest, build_manifest, load_model, trainable_weights
from peerturb.zo.update import apply_update
from peerturb_bench.proxy import CountingProxy
from peerturb_bench.rows import Row
from peerturb_coordinator.store import Entry, SqliteLogStore

PEERS = 4
PROBES = 128
ROUNDS, QUICK_ROUNDS = 2_000, 200
THREADS = 2
SECONDS_MAX = 45.0
BYTES_MAX = 1.1
_CODE_RMS = 32.0
_DEADLINE_MS = 10_000
_WAIT_S = 600.0


def run(quick: bool = False) -> list[Row]:
    """Measure and return the rows `N rounds: seconds` and `N rounds: bytes`.

    Raises:
        ModelError: the test model is not there.
        UnreachableError: the node or the coordinator ended before it trained.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    model = _model_folder()
    with tempfile.TemporaryDirectory(prefix="peerturb-join-") as name:
        folder = Path(name)
        spec = _make_log(folder, model, rounds)
        (folder / "run.toml").write_text(_toml(spec))
        (folder / "data.txt").write_text("Once upon a time there was a small cat who liked to sleep. " * 200)
        seconds, down_bytes = asyncio.run(_join(folder, model))
    label = f"{rounds} rounds x {PEERS * PROBES}"
    per_code = down_bytes / (rounds * PEERS * PROBES)
    return [
        Row(
            name=f"{label}: training after",
            value=round(seconds, 2),
            unit="s",
            reference=SECONDS_MAX,
            ratio=round(seconds / SECONDS_MAX, 4),
        ),
        Row(
            name=f"{label}: received",
            value=round(per_code, 4),
            unit="bytes/code",
            reference=BYTES_MAX,
            ratio=round(per_code / BYTES_MAX, 4),
        ),
    ]


def _model_folder() -> Path:
    """Return stories3m: 3.1 million parameters, found beside the checkout."""
    default = Path(__file__).resolve().parents[3] / "shared"
    given = Path(os.environ.get("PEERTURB_SHARED", default))
    for folder in (given / "data", given):
        if (folder / "models" / "stories3m").is_dir():
            return folder / "models" / "stories3m"
    raise ModelError(f"the benchmark's model stories3m is not under {given}; PEERTURB_SHARED may name another folder")


def _make_log(folder: Path, model_folder: Path, rounds: int) -> RunSpec:
    """Write the coordinator's store; return the run."""
    torch.set_num_threads(THREADS)
    model, _ = load_model(model_folder, "float32")
    spec = RunSpec(
        name="join",
        model=ModelSpec(name="stories3m", digest=base_digest(model, "float32")),
        round=RoundSpec(probes_max=PROBES, deadline_ms_min=_DEADLINE_MS, deadline_ms_max=_DEADLINE_MS),
        objective=ObjectiveSpec(tokens_max=32, eval_every=0),
    )
    manifest = build_manifest(model, spec.model)
    weights = list(trainable_weights(model, manifest).values())
    store = SqliteLogStore(folder / "data")
    try:
        entries = []
        for record in _records(spec, rounds, lambda: short_digest(run_digest(manifest, weights))):
            number = record.round if isinstance(record, RoundOpened | RoundSealed) else None
            entries.append(Entry(kind=type(record).__name__, round=number, payload=encode_record(record)))
            if isinstance(record, RoundSealed):
                apply_update(
                    weights,
                    manifest,
                    family=spec.perturbation.family,
                    run_key=spec.run_key,
                    round=record.round,
                    slots=record.slots,
                    counts=record.counts,
                    codes=record.codes,
                    alpha=record.alpha,
                )
        store.append(entries)
    finally:
        store.close()
    return spec


def _records(spec: RunSpec, rounds: int, digest: Callable[[], int]) -> Iterator[Record]:
    """Yield a legal log: some peers join, take part in every round and leave. `digest` is of the weights so far."""
    rng = np.random.default_rng(1)
    ledger = Ledger()

    def legal(record: Record) -> Record:
        ledger.apply(record)
        return record

    yield legal(RunStarted(spec=spec))
    for slot in range(PEERS):
        yield legal(PeerJoined(slot=Slot(slot), key=PeerKey(bytes([slot + 1]) * 32), name=f"peer{slot}"))
    for number in range(rounds):
        scale = ledger.scale
        yield legal(RoundOpened(round=RoundNumber(number), scale=scale, deadline_ms=_DEADLINE_MS))
        drawn = np.rint(rng.normal(0.0, _CODE_RMS, PEERS * PROBES))
        codes = np.clip(drawn, -127, 127).astype(np.int8).tobytes()
        yield legal(
            RoundSealed(
                round=RoundNumber(number),
                alpha=stepping.step_size(spec.step, number, scale, codes, spec.round.count),
                loss=2.0,
                digest=digest(),
                slots=tuple(Slot(slot) for slot in range(PEERS)),
                counts=(PROBES,) * PEERS,
                codes=codes,
            )
        )
    for slot in range(PEERS):
        yield legal(PeerLeft(slot=Slot(slot), reason=LeaveReason.LEFT))


def _toml(spec: RunSpec) -> str:
    """Return RUN.toml of the run."""
    return (
        f'name = "{spec.name}"\n[model]\nname = "{spec.model.name}"\ndigest = "{spec.model.digest}"\n'
        f"[round]\nprobes_max = {PROBES}\ndeadline_ms_min = {_DEADLINE_MS}\ndeadline_ms_max = {_DEADLINE_MS}\n"
        "[objective]\ntokens_max = 32\neval_every = 0\n"
    )


async def _join(folder: Path, model: Path) -> tuple[float, int]:
    """Return seconds from the node's start to its first probe, and the bytes it received until then."""
    port_file = folder / "port"
    flags = ["--listen", "127.0.0.1:0", "--data-dir", str(folder / "data"), "--port-file", str(port_file)]
    coordinator = await _start("coordinator", "serve", str(folder / "run.toml"), *flags)
    node = None
    try:
        end_s = time.monotonic() + _WAIT_S
        while not (port_file.exists() and port_file.read_text()):
            if coordinator.returncode is not None or time.monotonic() > end_s:
                raise UnreachableError("the benchmark's coordinator did not start")
            await asyncio.sleep(0.02)
        async with CountingProxy("127.0.0.1", int(port_file.read_text())) as proxy:
            flags = ["--coordinator", proxy.address, "--state", str(folder / "node"), "--model", str(model)]
            flags += ["--data", str(folder / "data.txt"), "--threads", str(THREADS), "--device", "cpu", "--json"]
            started_s = time.monotonic()
            node = await _start("node", "run", *flags)
            await asyncio.wait_for(_until_training(node), _WAIT_S)
            return time.monotonic() - started_s, proxy.down_bytes
    finally:
        for process in (node, coordinator):
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()


async def _start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "peerturb.cli", *arguments,
        stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


async def _until_training(node: asyncio.subprocess.Process) -> None:
    assert node.stdout is not None
    last = b""
    while line := await node.stdout.readline():
        last = line
        if json.loads(line)["event"] == "training":
            return
    raise UnreachableError(f"the benchmark's node ended before it trained: {last.decode(errors='replace')}")
