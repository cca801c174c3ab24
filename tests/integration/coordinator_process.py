"""A real coordinator process and a light peer for tests: the wire by hand, no node code and no weights."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peerturb.ids import PeerKey
from peerturb.protocol.messages import challenge_bytes
from peerturb.runlog.chain import CHAIN_START
from peerturb.spec import RunSpec
from peerturb.wire.channel import Security, open_channel
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb.wire.v1 import record_pb2
from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

BASE_DIGEST = "ab" * 32
FIRST_DIGEST = 0xABABABAB
"""Short digest that follows from it; what a light peer says of its weights, in every round."""
PATIENCE_S = 20.0
"""After this a test has failed; nothing normally takes a second."""


def write_spec(path: Path, *, name: str = "test", **round_: object) -> Path:
    """Write a RunSpec file; keyword arguments go to its [round] table."""
    rows = {"probes_max": 64, "deadline_ms_min": 200, "deadline_ms_max": 2_000, "lease_ms": 500, **round_}
    lines = [f'name = "{name}"', "[model]", 'name = "stub"', f'digest = "{BASE_DIGEST}"', "[round]"]
    path.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in rows.items())]) + "\n")
    return path


class CoordinatorProcess:
    """`peerturb coordinator serve` in its own process, events read as JSON lines from a file."""

    def __init__(self, folder: Path, spec_file: Path, *flags: str, port: int = 0, preexec: Any = None) -> None:
        self.folder = folder
        self.spec = RunSpec.from_toml(spec_file)
        self._events_file = folder / f"events-{time.monotonic_ns()}.jsonl"
        self._errors_file = self._events_file.with_suffix(".err")
        port_file = folder / "port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "peerturb.cli", "coordinator", "serve", str(spec_file), "--json"]
        command += ["--listen", f"127.0.0.1:{port}", "--data-dir", str(folder / "data"), "--port-file", str(port_file)]
        with self._events_file.open("wb") as out, self._errors_file.open("wb") as err:
            self.process = subprocess.Popen([*command, *flags], stdout=out, stderr=err, preexec_fn=preexec)
        end = time.monotonic() + PATIENCE_S
        while not port_file.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"the coordinator did not start: {self._errors_file.read_text()}")
            time.sleep(0.02)
        self.port = int(port_file.read_text())
        self.address = f"127.0.0.1:{self.port}"

    @property
    def events_text(self) -> str:
        """Everything it has said so far."""
        return self._events_file.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The same, line by line."""
        return [json.loads(line) for line in self.events_text.splitlines()]

    @property
    def errors(self) -> str:
        """Its standard error."""
        return self._errors_file.read_text()

    def named(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one name."""
        return [item for item in self.events if item["event"] == event]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def status(self) -> pb.RunStatus:
        """Ask it."""

        async def ask() -> pb.RunStatus:
            async with await open_channel(self.address, Security(insecure=True)) as channel:
                stub: CoordinatorAsyncStub = CoordinatorStub(channel)
                return await stub.Status(pb.StatusRequest())

        return asyncio.run(ask())


@contextlib.contextmanager
def coordinator(folder: Path, spec_file: Path, *flags: str, **options: Any) -> Iterator[CoordinatorProcess]:
    """Run a coordinator; it is gone afterwards, whatever happened."""
    process = CoordinatorProcess(folder, spec_file, *flags, **options)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


def slots_of(record: record_pb2.Record) -> list[int]:
    """Return a sealed round's slots, however they are written."""
    bits = int.from_bytes(record.slot_bits, "little")
    return [*record.slots, *(slot for slot in range(bits.bit_length()) if bits >> slot & 1)]


class LightPeer:
    """A peer that reads the wire with its own eyes."""

    def __init__(self, spec: RunSpec, stub: "CoordinatorAsyncStub", *, seed: int = 0, token: str = "") -> None:
        self.spec = spec
        self.identity = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "little"))
        self.key = PeerKey(self.identity.public_key().public_bytes_raw())
        self.token = token
        self.call = stub.Session()
        self.records: list[record_pb2.Record] = []
        self.payloads: list[bytes] = []
        self.slot = -1
        self.round = -1
        """Round now open, -1 before the first."""
        self.is_finished = False
        self.refusals: list[pb.Refusal] = []

    def hello(self, **changed: Any) -> pb.FromPeer:
        """Return an honest Hello but for what is changed."""
        fields: dict[str, Any] = {
            "protocol": 1,
            "key": self.key,
            "name": "light",
            "token": self.token,
            "spec_digest": self.spec.digest,
            "base_digest": bytes.fromhex(BASE_DIGEST),
            "manifest_digest": b"m" * 32,
            "position": 0,
            "chain": CHAIN_START,
        }
        return pb.FromPeer(hello=pb.Hello(**fields | changed))

    def proof(self, nonce: bytes) -> pb.FromPeer:
        """Answer a challenge."""
        signed = challenge_bytes(nonce=nonce, spec_digest=self.spec.digest, key=self.key)
        return pb.FromPeer(proof=pb.Proof(signature=self.identity.sign(signed)))

    async def join(self, **changed: Any) -> "LightPeer":
        """Hold the handshake; `slot` stays -1 if it is refused."""
        await self.call.write(self.hello(**changed))
        message = await self.read()
        if message.HasField("challenge"):
            await self.call.write(self.proof(message.challenge.nonce))
            while self.slot < 0 and not self.refusals:
                await self.read()
        return self

    async def read(self) -> pb.ToPeer:
        """Take in the next message.

        Raises:
            EOFError: the stream has ended in order.
        """
        message = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        if message is grpc.aio.EOF:
            raise EOFError
        assert isinstance(message, pb.ToPeer)
        if message.HasField("welcome"):
            self.slot = message.welcome.slot
        if message.HasField("refusal"):
            self.refusals.append(message.refusal)
        for payload in message.records:
            record = record_pb2.Record.FromString(payload)
            self.payloads.append(payload)
            self.records.append(record)
            if record.scale:
                self.round += 1
            self.is_finished |= record.HasField("run_finished")
        return message

    async def refusal(self) -> pb.Refusal:
        """Read until a refusal comes."""
        count = len(self.refusals)
        while len(self.refusals) == count:
            await self.read()
        return self.refusals[-1]

    async def until_end(self) -> None:
        """Read until the stream ends in order."""
        with contextlib.suppress(EOFError):
            while True:
                await self.read()

    async def until_round(self, round_: int) -> None:
        """Read until `round_` is open, or a later one."""
        while self.round < round_ and not self.is_finished:
            await self.read()

    async def contribute(self, codes: bytes = b"\x01\x02\xff", **changed: Any) -> None:
        """Send codes for the open round."""
        fields: dict[str, Any] = {"round": self.round, "codes": codes, "loss": 1.0, "digest": FIRST_DIGEST}
        await self.call.write(pb.FromPeer(**fields | changed))

    async def take_part(self, rounds: int, codes: bytes = b"\x01\x02\xff") -> None:
        """Contribute to every round until `rounds` are sealed."""
        done = -1
        while not self.is_finished and self.round < rounds:
            if self.round > done and self.round >= 0:
                done = self.round
                await self.contribute(codes)
            await self.read()


@contextlib.asynccontextmanager
async def stub_for(address: str, security: Security | None = None) -> "AsyncIterator[CoordinatorAsyncStub]":
    """Open a channel for as long as the block runs."""
    async with await open_channel(address, security or Security(insecure=True)) as channel:
        stub: CoordinatorAsyncStub = CoordinatorStub(channel)
        yield stub


def limit_file_size(bytes_max: int) -> Any:
    """Return a function that keeps the child process from writing files beyond a size: a full disk, nearly."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, resource.RLIM_INFINITY))

    return limit


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again until the answer is yes; fail after a while."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if await check():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("waited in vain")
