"""The coordinator as a process: restarts, kills, full disks, TLS, many peers, little memory."""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from peerturb import limits
from peerturb.errors import RefusedError, RejectCode, SpecError, UnreachableError
from peerturb.wire.channel import Security, open_channel
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb_coordinator.keys import make_keys
from tests.integration.coordinator_process import (
    PATIENCE_S,
    CoordinatorProcess,
    LightPeer,
    coordinator,
    eventually,
    limit_file_size,
    slots_of,
    stub_for,
    write_spec,
)

pytestmark = pytest.mark.integration

MEMORY_BYTES_MAX = 100 * 1024 * 1024


async def test_sigterm_tells_the_peers_and_a_restart_goes_on(tmp_path: Path) -> None:
    spec_file = write_spec(tmp_path / "run.toml")
    with coordinator(tmp_path, spec_file) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            await peer.take_part(5)
            process.process.send_signal(signal.SIGTERM)
            assert (await peer.refusal()).code == RejectCode.SHUTTING_DOWN
            assert await asyncio.wait_for(peer.call.code(), PATIENCE_S) is grpc.StatusCode.OK
        assert await asyncio.to_thread(process.process.wait, PATIENCE_S) == 0
        assert process.named("stopped")
        before = peer.payloads
    with coordinator(tmp_path, spec_file) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            await peer.take_part(8)
            assert peer.payloads[: len(before)] == before
            assert sum(1 for record in peer.records if record.codes) >= 8
        assert process.named("serving")[0]["records"] >= len(before)


async def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("stop_grace_ms = 600_000\n")
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--settings", str(settings)) as process:
        async with await open_channel(process.address, Security(insecure=True)) as channel:
            # A health watch ends only when its client says so: the orderly stop would wait ten minutes for it.
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Watch(health_pb2.HealthCheckRequest()).read()
            process.process.send_signal(signal.SIGINT)

            async def stopping() -> bool:
                return bool(process.named("stopping"))

            await eventually(stopping)
            assert process.process.poll() is None
            process.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.process.wait, PATIENCE_S) == 128 + signal.SIGINT


async def test_a_killed_coordinator_loses_nothing_it_announced(tmp_path: Path) -> None:
    """A few random moments here; the whole network is killed a hundred times in the slow tests of the node."""
    spec_file = write_spec(tmp_path / "run.toml")
    moments = random.Random(2)
    announced: list[bytes] = []
    for _ in range(6):
        with coordinator(tmp_path, spec_file) as process:
            async with stub_for(process.address) as stub:
                peers = [await LightPeer(process.spec, stub, seed=seed).join() for seed in (1, 2)]
                working = [asyncio.create_task(peer.take_part(100_000)) for peer in peers]
                await asyncio.sleep(moments.uniform(0.05, 0.3))
                process.kill()
                await asyncio.gather(*working, return_exceptions=True)
        for peer in peers:
            # Each session reads from position 0, so it must begin with all that was ever announced.
            shared = min(len(announced), len(peer.payloads))
            assert peer.payloads[:shared] == announced[:shared]
        announced = max([announced, *(peer.payloads for peer in peers)], key=len)
    with coordinator(tmp_path, spec_file) as process:
        async with stub_for(process.address) as stub:
            head = (await stub.Describe(pb.DescribeRequest())).head
            assert head >= len(announced)
            stored: list[bytes] = []
            while len(stored) < head:
                stored += (await stub.Range(pb.RangeRequest(first=len(stored)))).records
            assert stored[: len(announced)] == announced
    assert len(announced) > 100


async def test_a_full_disk_stops_sealing_and_loses_nothing(tmp_path: Path) -> None:
    spec_file = write_spec(tmp_path / "run.toml", probes_max=4096)
    settings = tmp_path / "settings.toml"
    settings.write_text("retry_ms = 100\n")
    with coordinator(tmp_path, spec_file, "--settings", str(settings), preexec=limit_file_size(256 * 1024)) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            working = asyncio.create_task(peer.take_part(100_000, codes=b"\x05" * 4096))

            async def has_fault() -> bool:
                return bool((await stub.Status(pb.StatusRequest())).fault)

            async def is_past(round_: int) -> bool:
                return (await stub.Status(pb.StatusRequest())).round > round_

            await eventually(has_fault)
            status = await stub.Status(pb.StatusRequest())
            assert "cannot write" in status.fault
            assert status.waiting_for == status.fault
            stuck_at = status.round
            assert stuck_at > 5
            await asyncio.sleep(0.5)
            assert (await stub.Status(pb.StatusRequest())).round == stuck_at
            newcomer = LightPeer(process.spec, stub, seed=2)
            await newcomer.call.write(newcomer.hello())
            assert process.process.poll() is None
            # The disk has room again.
            free = (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY)
            psutil.Process(process.process.pid).rlimit(psutil.RLIMIT_FSIZE, free)
            await eventually(lambda: is_past(stuck_at + 5))
            assert not (await stub.Status(pb.StatusRequest())).fault
            peer.call.cancel()  # gRPC may swallow the cancellation of a task that waits for it; the call's end it tells
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            announced = peer.payloads
        assert process.named("log_not_writable")
        assert process.named("log_writable_again")
        process.kill()
    with coordinator(tmp_path, spec_file) as process:
        async with stub_for(process.address) as stub:
            again = await LightPeer(process.spec, stub, seed=3).join()
            while len(again.payloads) < len(announced):
                await again.read()
            assert again.payloads[: len(announced)] == announced


def test_another_run_spec_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml")) as process:
        old = process.spec.digest.hex()
        assert process.stop() == 0
    with pytest.raises(AssertionError, match=old) as caught:
        CoordinatorProcess(tmp_path, write_spec(tmp_path / "other.toml", name="other"))
    assert "RunSpec cannot change" in str(caught.value)


def test_a_taken_port_and_taken_data_are_refused(tmp_path: Path) -> None:
    spec_file = write_spec(tmp_path / "run.toml")
    with coordinator(tmp_path, spec_file) as process:
        with pytest.raises(AssertionError, match="in use by another coordinator"):
            CoordinatorProcess(tmp_path, spec_file)
        (tmp_path / "elsewhere").mkdir()
        with pytest.raises(AssertionError, match="cannot listen on"):
            CoordinatorProcess(tmp_path / "elsewhere", spec_file, port=process.port)


async def test_tls_with_a_pinned_certificate(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ["example.org"])
    flags = ["--tls-dir", str(tmp_path / "keys"), "--token", str(made.token_file)]
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml", count=3), *flags) as process:
        serving = process.named("serving")[0]
        assert serving["fingerprint"] == made.fingerprint
        assert serving["needs_token"]
        assert serving["join"].endswith(f"--fingerprint {made.fingerprint} --token-file join-token --data FILE")
        assert made.token not in process.events_text, "logs are kept and shown to many"
        async with stub_for(process.address, Security(fingerprint=made.fingerprint)) as stub:
            peer = await LightPeer(process.spec, stub, token=made.token).join()
            await peer.take_part(3)
            assert peer.is_finished
        other = "sha256:" + "0" * 64
        with pytest.raises(UnreachableError, match=f"{made.fingerprint}.*{other}"):
            async with stub_for(process.address, Security(fingerprint=other)):
                pass
        async with stub_for(process.address, Security(authority_file=made.certificate)) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Describe(pb.DescribeRequest())
            # Trusted issuer, but the certificate is made out to another host.
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with stub_for(process.address) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Describe(pb.DescribeRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_fingerprint_for_a_plaintext_or_absent_server_is_explained(tmp_path: Path) -> None:
    pinned = Security(fingerprint="sha256:" + "0" * 64)
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml")) as process:
        with pytest.raises(UnreachableError, match="speaks no TLS"):
            async with stub_for(process.address, pinned):
                pass
        address = process.address
    with pytest.raises(UnreachableError, match="cannot reach"):
        async with stub_for(address, pinned):
            pass
    with pytest.raises(SpecError, match="not a fingerprint"):
        async with stub_for(address, Security(fingerprint="sha256:0")):
            pass


@pytest.mark.slow
async def test_sixty_four_peers_fit_into_memory_and_no_torch_is_loaded(tmp_path: Path) -> None:
    with coordinator(
        tmp_path, write_spec(tmp_path / "run.toml", deadline_ms_min=5_000, deadline_ms_max=5_000)
    ) as process:
        async with contextlib.AsyncExitStack() as channels:
            # A channel each: connections cost memory too.
            stubs = [await channels.enter_async_context(stub_for(process.address)) for _ in range(64)]
            peers = [await LightPeer(process.spec, stub, seed=seed).join() for seed, stub in enumerate(stubs)]
            await asyncio.gather(*(peer.take_part(30, codes=b"\x03" * 64) for peer in peers))
            sealed = [record for record in peers[0].records if record.codes]
            assert slots_of(sealed[-1]) == list(range(64))
            told = psutil.Process(process.process.pid)
            assert told.memory_info().rss < MEMORY_BYTES_MAX
            assert not [item.path for item in told.memory_maps() if "torch" in item.path]


async def test_silent_streams_keep_nobody_out(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("handshake_timeout_ms = 3_600_000\nsessions_max = 1\n")
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--settings", str(settings)) as process:
        async with stub_for(process.address) as stub:
            silent = [LightPeer(process.spec, stub, seed=seed) for seed in range(3 * limits.HALF_OPEN_MAX)]
            dropped = len(silent) - limits.HALF_OPEN_MAX

            async def have_come() -> bool:
                return (await stub.Status(pb.StatusRequest())).rejects["run_full"] == dropped

            await eventually(have_come)
            peer = await LightPeer(process.spec, stub, seed=1_000).join()
            assert peer.slot == 0
            await peer.take_part(3)

            async def are_told() -> bool:
                # The honest one took a place, too, for the time of its handshake.
                return sum(stranger.call.done() for stranger in silent) == dropped + 1

            await eventually(are_told)
            told = [stranger for stranger in silent if stranger.call.done()]
            assert {await stranger.call.code() for stranger in told} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert "handshakes at once" in await told[0].call.details()
            assert (await stub.Status(pb.StatusRequest())).rejects["run_full"] == len(told)


async def test_a_silent_stream_is_closed_in_time(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("handshake_timeout_ms = 100\n")
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--settings", str(settings)) as process:
        async with stub_for(process.address) as stub:
            silent = LightPeer(process.spec, stub)
            assert (await silent.refusal()).code == RejectCode.NOT_JOINED
            await silent.until_end()


async def test_a_full_coordinator_reads_the_hello_before_it_refuses(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("sessions_max = 1\n")
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--settings", str(settings)) as process:
        async with stub_for(process.address) as stub:
            first = await LightPeer(process.spec, stub, seed=1).join()
            late = await LightPeer(process.spec, stub, seed=2).join()
            assert [RejectCode(refusal.code) for refusal in late.refusals] == [RejectCode.RUN_FULL]
            await late.until_end()
            # The same identity takes its own place, whatever became of its older stream.
            again = await LightPeer(process.spec, stub, seed=1).join()
            assert again.slot == first.slot
            assert (await first.refusal()).code == RejectCode.SUPERSEDED
            await first.until_end()
            again.call.cancel()

            async def joins() -> bool:
                return (await LightPeer(process.spec, stub, seed=2).join()).slot >= 0

            await eventually(joins)


def _peerturb(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peerturb.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_status_and_keys_commands(tmp_path: Path) -> None:
    made = _peerturb("coordinator", "keys", "--out", str(tmp_path / "keys"), "--host", "127.0.0.1", "--json")
    assert made.returncode == 0, made.stderr
    keys = json.loads(made.stdout)
    assert keys["join"].startswith(
        f"peerturb node run --coordinator 127.0.0.1:7470 --fingerprint {keys['fingerprint']} "
    )
    again = _peerturb("coordinator", "keys", "--out", str(tmp_path / "keys"))
    assert again.returncode == 2
    assert "--replace" in again.stderr
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--tls-dir", str(tmp_path / "keys")) as process:
        asked = _peerturb("status", "--coordinator", process.address, "--fingerprint", keys["fingerprint"], "--json")
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["run_digest"] == process.spec.digest.hex()
        shown = _peerturb("status", "--coordinator", process.address, "--fingerprint", keys["fingerprint"])
        assert "no peer is connected" in shown.stdout
        wrong = _peerturb("status", "--coordinator", process.address, "--fingerprint", "0" * 64)
        assert wrong.returncode == UnreachableError.exit_code
        assert keys["fingerprint"] in wrong.stderr
        plain = _peerturb("status", "--coordinator", process.address)
        assert plain.returncode == UnreachableError.exit_code


async def test_the_status_command_shows_whole_keys_with_the_token(tmp_path: Path) -> None:
    token_file = tmp_path / "join-token"
    token_file.write_text("open-sesame\n")
    other_file = tmp_path / "other-token"
    other_file.write_text("shut-sesame\n")
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml"), "--token", str(token_file)) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, token="open-sesame").join()
            base = ["status", "--coordinator", process.address]
            for flags, key in (([], peer.key.hex()[:16]), (["--token-file", str(token_file)], peer.key.hex())):
                asked = await asyncio.to_thread(_peerturb, *base, *flags, "--json")
                assert asked.returncode == 0, asked.stderr
                assert [row["key"] for row in json.loads(asked.stdout)["peers"]] == [key]
                shown = await asyncio.to_thread(_peerturb, *base, *flags)
                assert peer.key.hex()[:16] in shown.stdout
            wrong = await asyncio.to_thread(_peerturb, *base, "--token-file", str(other_file))
            assert wrong.returncode == RefusedError.exit_code
            assert "token is wrong" in wrong.stderr
            absent = await asyncio.to_thread(_peerturb, *base, "--token-file", "absent")
            assert absent.returncode == SpecError.exit_code
            assert "absent" in absent.stderr


def test_wrong_settings_end_with_one_line(tmp_path: Path) -> None:
    spec_file = str(write_spec(tmp_path / "run.toml"))
    open_door = _peerturb("coordinator", "serve", spec_file, "--listen", "0.0.0.0:0", "--data-dir", str(tmp_path / "d"))
    assert open_door.returncode == 2
    assert "needs TLS" in open_door.stderr
    no_file = _peerturb("coordinator", "serve", str(tmp_path / "absent.toml"))
    assert no_file.returncode == 2
    assert "absent.toml" in no_file.stderr
    shown = _peerturb("coordinator", "serve", spec_file, "--show-config", "--token", "secret-word")
    assert json.loads(shown.stdout)["listen"] == "127.0.0.1:7470"
    assert "secret-word" not in shown.stdout
