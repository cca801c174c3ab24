"""A session that only listens: it joins, never contributes, and says when each sealed round arrived.

Nobody waits for it: a newcomer is awaited from its first contribution on. It reads records as bytes.
"""

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peerturb.errors import RefusedError, RejectCode
from peerturb.ids import PeerKey
from peerturb.manifest import manifest_digest
from peerturb.protocol.messages import challenge_bytes
from peerturb.runlog.chain import CHAIN_START
from peerturb.spec import PROTOCOL_VERSION, RunSpec
from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb.wire.v1 import record_pb2

if TYPE_CHECKING:
    from peerturb.wire.v1.coordinator_pb2_grpc import CoordinatorAsyncStub


async def sealed_rounds(stub: "CoordinatorAsyncStub") -> AsyncIterator[tuple[int, float]]:
    """Join and yield (round, monotonic seconds of arrival) for every sealed round of the run.

    Raises:
        RefusedError: the coordinator does not let us in.
    """
    description = await stub.Describe(pb.DescribeRequest())
    spec = RunSpec.from_canonical(description.spec)
    identity = Ed25519PrivateKey.generate()
    key = PeerKey(identity.public_key().public_bytes_raw())
    call = stub.Session()
    await call.write(pb.FromPeer(hello=_hello(spec, key)))
    round_ = 0
    async for message in call:
        arrived_s = time.monotonic()
        if message.HasField("refusal"):
            raise RefusedError(RejectCode(message.refusal.code), message.refusal.why)
        if message.HasField("challenge"):
            signed = challenge_bytes(nonce=message.challenge.nonce, spec_digest=spec.digest, key=key)
            await call.write(pb.FromPeer(proof=pb.Proof(signature=identity.sign(signed))))
        for payload in message.records:
            if record_pb2.Record.FromString(payload).codes:
                yield round_, arrived_s
                round_ += 1


def _hello(spec: RunSpec, key: PeerKey) -> pb.Hello:
    """Claim to have the right weights: nothing is ever measured on them."""
    return pb.Hello(
        protocol=PROTOCOL_VERSION,
        key=key,
        name="observer",
        spec_digest=spec.digest,
        base_digest=bytes.fromhex(spec.model.digest),
        manifest_digest=manifest_digest(()),
        position=0,
        chain=CHAIN_START,
    )
