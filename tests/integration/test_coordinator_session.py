"""Sessions against a real coordinator process: handshake, rounds, refusals, hostile bytes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.wire.channel import CLIENT_MESSAGE_SLACK_BYTES, Security, open_channel, token_metadata
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.integration.coordinator_process import (
    PATIENCE_S,
    CoordinatorProcess,
    LightPeer,
    coordinator,
    slots_of,
    stub_for,
    write_spec,
)

if TYPE_CHECKING:
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

pytestmark = pytest.mark.integration

TOKEN = "open-sesame"
SESSION_METHOD = "/peerturb.wire.v1.Coordinator/Session"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    """One coordinator with a token for the tests that only knock at its door."""
    folder = tmp_path_factory.mktemp("served")
    with coordinator(folder, write_spec(folder / "run.toml", min_peers=50), "--token", TOKEN) as process:
        yield process
        assert process.process.poll() is None, process.errors
        assert process.stop() == 0
        assert not process.errors
        assert not process.named("session_failed")


async def test_two_peers_seal_rounds_and_read_the_same_log(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml", count=20)) as process:
        async with stub_for(process.address) as stub:
            peers = [LightPeer(process.spec, stub, seed=seed) for seed in (1, 2)]
            for peer in peers:
                await peer.join()
            assert sorted(peer.slot for peer in peers) == [0, 1]
            await asyncio.gather(*(peer.take_part(20) for peer in peers))
            assert peers[0].payloads == peers[1].payloads
            sealed = [record for record in peers[0].records if record.codes]
            assert len(sealed) == 20
            assert slots_of(sealed[-1]) == [0, 1]
            assert sealed[-1].codes == b"\x01\x02\xff" * 2
            batch = await stub.Range(pb.RangeRequest())
            assert list(batch.records) == peers[0].payloads
            assert list((await stub.Range(pb.RangeRequest(first=3, last=5))).records) == peers[0].payloads[3:5]
            status = await stub.Status(pb.StatusRequest())
            assert status.finished
            assert status.round == 20
            assert status.head == batch.head == len(peers[0].payloads)
            assert dict(status.seals)["everyone"] >= 19


async def test_a_late_joiner_gets_the_whole_log_in_the_same_bytes(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml", count=300)) as process:
        async with stub_for(process.address) as stub:
            first = await LightPeer(process.spec, stub, seed=1).join()
            await first.take_part(300, codes=bytes(range(64)))
            late = await LightPeer(process.spec, stub, seed=2).join()
            while len(late.payloads) < len(first.payloads):
                await late.read()
            assert late.payloads[: len(first.payloads)] == first.payloads


async def test_a_silent_peer_costs_one_deadline(tmp_path: Path) -> None:
    spec_file = write_spec(tmp_path / "run.toml", deadline_ms_min=100, deadline_ms_max=300)
    with coordinator(tmp_path, spec_file) as process:
        async with stub_for(process.address) as stub:
            peers = [await LightPeer(process.spec, stub, seed=seed).join() for seed in (1, 2)]
            await asyncio.gather(*(peer.take_part(5) for peer in peers))
            await peers[0].take_part(8)
            sealed = [slots_of(record) for record in peers[0].records if record.codes]
            assert sealed[-1] == [0]
            assert dict((await stub.Status(pb.StatusRequest())).seals)["deadline"] >= 1


async def test_an_identity_keeps_its_slot_and_ends_its_older_session(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml", lease_ms=100)) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            other = await LightPeer(process.spec, stub, seed=2).join()
            again = await LightPeer(process.spec, stub, seed=1).join()
            assert again.slot == peer.slot
            assert (await peer.refusal()).code == RejectCode.SUPERSEDED
            with pytest.raises(EOFError):
                await peer.read()
            again.call.cancel()
            while not any(record.HasField("peer_left") for record in other.records):
                await other.read()
            back = await LightPeer(process.spec, stub, seed=1).join()
            assert back.slot == peer.slot
            assert back.slot != other.slot


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"protocol": 2}, RejectCode.PROTOCOL_VERSION),
        ({"token": "wrong"}, RejectCode.BAD_TOKEN),
        ({"token": ""}, RejectCode.BAD_TOKEN),
        ({"spec_digest": b"x" * 32}, RejectCode.SPEC_MISMATCH),
        ({"base_digest": b"x" * 32}, RejectCode.MODEL_MISMATCH),
        ({"chain": b"x" * 32}, RejectCode.LOG_DIVERGED),
        ({"position": 10_000}, RejectCode.LOG_DIVERGED),
        ({"key": b"x" * 31}, RejectCode.MALFORMED),
        ({"chain": b""}, RejectCode.MALFORMED),
        ({"name": "n" * 65}, RejectCode.MALFORMED),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused(
    served: CoordinatorProcess, changed: dict[str, Any], code: RejectCode
) -> None:
    async with stub_for(served.address) as stub:
        peer = await LightPeer(served.spec, stub, token=TOKEN).join(**changed)
        assert [RejectCode(refusal.code) for refusal in peer.refusals] == [code]
        assert peer.refusals[0].closes
        assert peer.refusals[0].why
        with pytest.raises(EOFError):
            await peer.read()


async def test_a_manifest_that_differs_from_the_others_is_refused(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        await LightPeer(served.spec, stub, seed=1, token=TOKEN).join()
        other = await LightPeer(served.spec, stub, seed=2, token=TOKEN).join(manifest_digest=b"n" * 32)
        assert other.refusals[0].code == RejectCode.MANIFEST_MISMATCH


async def test_nobody_speaks_for_another_identity(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        thief, victim = (LightPeer(served.spec, stub, seed=seed, token=TOKEN) for seed in (3, 4))
        await thief.join(key=victim.key)
        assert thief.refusals[0].code == RejectCode.BAD_SIGNATURE
        assert thief.slot == -1


def _contribution(**fields: Any) -> bytes:
    given: dict[str, Any] = {"round": 0, "codes": b"\x01", "loss": 1.0, "digest": 7}
    return pb.FromPeer(**given | fields).SerializeToString()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\xff\xff\xff", RejectCode.MALFORMED),
        (b"", RejectCode.EMPTY_CONTRIBUTION),
        (_contribution(), RejectCode.NOT_JOINED),
        (pb.FromPeer(proof=pb.Proof(signature=b"s" * 64)).SerializeToString(), RejectCode.NOT_JOINED),
    ],
)
async def test_whatever_comes_before_the_hello_is_refused(
    served: CoordinatorProcess, data: bytes, code: RejectCode
) -> None:
    async with _raw_session(served.address) as call:
        await call.write(data)
        assert pb.ToPeer.FromString(await call.read()).refusal.code == code
        assert await call.read() is grpc.aio.EOF


@contextlib.asynccontextmanager
async def _raw_session(address: str) -> AsyncIterator[Any]:
    """Open a session whose messages are bytes."""
    async with await open_channel(address, Security(insecure=True)) as channel:
        yield channel.stream_stream(SESSION_METHOD)()


@pytest.mark.parametrize(
    ("fields", "code", "closes"),
    [
        ({"round": 7}, RejectCode.FUTURE_ROUND, False),
        ({"codes": b"\x01" * 65}, RejectCode.TOO_MANY_CODES, True),
        ({"codes": b""}, RejectCode.EMPTY_CONTRIBUTION, True),
    ],
)
async def test_a_contribution_that_breaks_a_rule_is_refused(
    served: CoordinatorProcess, fields: dict[str, Any], code: RejectCode, closes: bool
) -> None:
    async with stub_for(served.address) as stub:
        peer = await LightPeer(served.spec, stub, seed=5, token=TOKEN).join()
        await peer.until_round(0)
        await peer.contribute(**fields)
        refusal = await peer.refusal()
        assert refusal.code == code
        assert refusal.closes == closes
        if closes:
            with pytest.raises(EOFError):
                await peer.read()
        else:
            await peer.contribute(round=8)
            assert (await peer.refusal()).code == code


async def test_a_late_contribution_is_harmless(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml")) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            await peer.take_part(3)
            await peer.contribute(round=1)
            refusal = await peer.refusal()
            assert refusal.code == RejectCode.STALE_ROUND
            assert not refusal.closes
            await peer.take_part(5)


async def test_an_oversized_message_is_refused_by_its_code_and_counted(served: CoordinatorProcess) -> None:
    # Our own channel would not even send it.
    async with stub_for(served.address) as stub, _loose_channel(served.address) as channel:
        bystander = await LightPeer(served.spec, stub, seed=6, token=TOKEN).join()
        loose: CoordinatorAsyncStub = CoordinatorStub(channel)
        member = await LightPeer(served.spec, loose, seed=10, token=TOKEN).join()
        await member.until_round(0)
        before = (await stub.Status(pb.StatusRequest())).rejects["oversized"]
        await member.contribute(codes=b"\x01" * limits.CLIENT_MESSAGE_BYTES_MAX)
        refusal = await member.refusal()
        assert refusal.code == RejectCode.OVERSIZED
        assert refusal.closes
        assert str(limits.CLIENT_MESSAGE_BYTES_MAX) in refusal.why
        await member.until_end()
        stranger: Any = channel.stream_stream(SESSION_METHOD)()
        await stranger.write(b"\x00" * (limits.CLIENT_MESSAGE_BYTES_MAX + CLIENT_MESSAGE_SLACK_BYTES))
        assert pb.ToPeer.FromString(await stranger.read()).refusal.code == RejectCode.OVERSIZED
        assert await stranger.read() is grpc.aio.EOF
        assert (await stub.Status(pb.StatusRequest())).rejects["oversized"] == before + 2
        await bystander.contribute(round=9)
        assert (await bystander.refusal()).code == RejectCode.FUTURE_ROUND


async def test_grpc_ends_a_stream_whose_message_is_far_too_large(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub, _loose_channel(served.address) as channel:
        bystander = await LightPeer(served.spec, stub, seed=11, token=TOKEN).join()
        hostile: Any = channel.stream_stream(SESSION_METHOD)()
        await hostile.write(b"\x00" * (limits.CLIENT_MESSAGE_BYTES_MAX + CLIENT_MESSAGE_SLACK_BYTES + 1))
        assert await asyncio.wait_for(hostile.code(), PATIENCE_S) is grpc.StatusCode.RESOURCE_EXHAUSTED
        await bystander.contribute(round=9)
        assert (await bystander.refusal()).code == RejectCode.FUTURE_ROUND


def _loose_channel(address: str) -> grpc.aio.Channel:
    """Return a channel that sends messages of any size."""
    return grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])


async def test_rubbish_after_the_handshake_closes_the_session(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        peer = await LightPeer(served.spec, stub, seed=7, token=TOKEN).join()
        await peer.call.write(peer.hello())
        assert (await peer.refusal()).code == RejectCode.MALFORMED
        with pytest.raises(EOFError):
            await peer.read()


async def test_ranges_need_the_token_and_describe_does_not(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        description = await stub.Describe(pb.DescribeRequest())
        assert description.needs_token
        assert description.spec == served.spec.canonical
        for metadata in ([], token_metadata("wrong")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Range(pb.RangeRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        batch = await stub.Range(pb.RangeRequest(), metadata=token_metadata(TOKEN))
        assert len(batch.records) == batch.head
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Range(pb.RangeRequest(first=2**40), metadata=token_metadata(TOKEN))
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_strangers_see_the_beginning_of_keys_only(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        peer = await LightPeer(served.spec, stub, seed=12, token=TOKEN).join()

        async def key_shown(token: str) -> bytes:
            status = await stub.Status(pb.StatusRequest(), metadata=token_metadata(token))
            return next(row.key for row in status.peers if row.slot == peer.slot)

        assert await key_shown("") == peer.key[:8]
        assert await key_shown(TOKEN) == peer.key
        with pytest.raises(grpc.aio.AioRpcError, match="token is wrong") as caught:
            await key_shown("wrong")
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_run_without_a_token_hides_no_keys(tmp_path: Path) -> None:
    with coordinator(tmp_path, write_spec(tmp_path / "run.toml")) as process:
        async with stub_for(process.address) as stub:
            peer = await LightPeer(process.spec, stub, seed=1).join()
            assert [row.key for row in (await stub.Status(pb.StatusRequest())).peers] == [peer.key]


async def test_leaving_is_logged_at_once(served: CoordinatorProcess) -> None:
    async with stub_for(served.address) as stub:
        stays, leaves = [await LightPeer(served.spec, stub, seed=seed, token=TOKEN).join() for seed in (8, 9)]
        await leaves.call.write(pb.FromPeer(leave=pb.Leave()))
        while not any(record.peer_left.slot == leaves.slot for record in stays.records if record.HasField("peer_left")):
            await stays.read()
        await leaves.until_end()


async def test_health_and_reflection_answer(served: CoordinatorProcess) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with await open_channel(served.address, Security(insecure=True)) as channel:
        for name in ("", "peerturb.wire.v1.Coordinator"):
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub
        call = reflection(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await call.read()).list_services_response.service
        assert "peerturb.wire.v1.Coordinator" in {service.name for service in listed}
        call.cancel()
