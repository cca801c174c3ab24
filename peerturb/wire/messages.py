"""Session messages <-> protobuf messages. Decoding checks every bound; encoding asserts them."""

from collections.abc import Sequence
from typing import assert_never

from google.protobuf.message import DecodeError

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.ids import Position, RoundNumber
from peerturb.protocol.messages import (
    Challenge,
    Contribution,
    Evaluation,
    FromPeer,
    Hello,
    Leave,
    Proof,
    Records,
    Refusal,
    ToPeer,
    Welcome,
)
from peerturb.wire import checks
from peerturb.wire.errors import WireError
from peerturb.wire.records import RecordDecoder, encode_record
from peerturb.wire.v1 import coordinator_pb2 as pb

SERVER_MESSAGE_BYTES_MAX = limits.RECORD_BYTES_MAX + limits.RECORD_BATCH_BYTES
"""What a coordinator may send in one message: a batch stops growing at RECORD_BATCH_BYTES, the last may be long."""


def encode_from_peer(message: FromPeer) -> pb.FromPeer:
    """Turn a peer's message into protobuf."""
    match message:
        case Contribution(round=round_, codes=codes, loss=loss, digest=digest, is_exact=is_exact):
            assert 1 <= len(codes) <= limits.PROBES_PER_CONTRIBUTION_MAX
            return pb.FromPeer(round=round_, codes=codes, loss=loss, digest=digest, exact=is_exact)
        case Evaluation():
            evaluation = pb.Evaluation(round=message.round, loss=message.loss, examples=message.examples)
            if message.accuracy is not None:
                evaluation.accuracy = message.accuracy
            return pb.FromPeer(evaluation=evaluation)
        case Hello():
            return pb.FromPeer(hello=_hello(message))
        case Proof(signature=signature):
            return pb.FromPeer(proof=pb.Proof(signature=signature))
        case Leave():
            return pb.FromPeer(leave=pb.Leave())
        case _:
            assert_never(message)


def decode_from_peer(message: pb.FromPeer) -> FromPeer:
    """Check a peer's message.

    Raises:
        WireError: unknown, or beyond a limit. The number of codes is checked against the RunSpec by the machine.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        return _contribution(message)
    if message.codes or message.round or message.loss or message.digest or message.exact:
        raise checks.malformed(f"a {kind} with the fields of a contribution")
    match kind:
        case "hello":
            return _checked_hello(message.hello)
        case "proof":
            return Proof(signature=checks.exact_bytes(message.proof.signature, checks.SIGNATURE_BYTES, "the signature"))
        case "evaluation":
            evaluation = message.evaluation
            has_accuracy = evaluation.HasField("accuracy")
            return Evaluation(
                round=RoundNumber(evaluation.round),
                loss=checks.loss(evaluation.loss),
                accuracy=checks.fraction(evaluation.accuracy, "the accuracy") if has_accuracy else None,
                examples=evaluation.examples,
            )
        case "leave":
            return Leave()
        case _:
            assert_never(kind)


def parse_from_peer(data: bytes) -> FromPeer:
    """Decode the bytes of a peer's message.

    Raises:
        WireError: OVERSIZED, MALFORMED, or EMPTY_CONTRIBUTION and the like.
    """
    if len(data) > limits.CLIENT_MESSAGE_BYTES_MAX:
        why = f"the message has {len(data)} bytes; at most {limits.CLIENT_MESSAGE_BYTES_MAX} are allowed"
        raise WireError(RejectCode.OVERSIZED, why)
    try:
        return decode_from_peer(pb.FromPeer.FromString(data))
    except DecodeError as error:
        raise checks.malformed(f"the message does not decode: {error}") from error


def encode_to_peer(message: ToPeer) -> pb.ToPeer:
    """Turn a coordinator's message into protobuf."""
    match message:
        case Records(records=records):
            return encode_payloads([encode_record(record) for record in records])
        case Challenge(nonce=nonce):
            return pb.ToPeer(challenge=pb.Challenge(nonce=nonce))
        case Welcome(slot=slot, head=head):
            return pb.ToPeer(welcome=pb.Welcome(slot=slot, head=head))
        case Refusal(code=code, why=why, closes=closes):
            sentence = checks.encodable(why)[: checks.WHY_CHARS_MAX]
            return pb.ToPeer(refusal=pb.Refusal(code=int(code), why=sentence, closes=closes))
        case _:
            assert_never(message)


def encode_payloads(payloads: Sequence[bytes]) -> pb.ToPeer:
    """Make a feed message of records that are bytes already, as the store keeps them."""
    return pb.ToPeer(records=payloads)


def decode_to_peer(message: pb.ToPeer, *, first: Position, decoder: RecordDecoder) -> ToPeer:
    """Check a coordinator's message.

    Args:
        message: what came.
        first: position of the next record of the feed; records carry no positions.
        decoder: numbers the rounds; it must have seen everything before `first`.

    Raises:
        WireError: unknown, or beyond a limit.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        if not message.records:
            raise checks.malformed("a message with no content")
        return Records(first=first, records=tuple(map(decoder.decode, message.records)))
    if message.records:
        raise checks.malformed(f"a {kind} with records")
    match kind:
        case "challenge":
            return Challenge(nonce=checks.exact_bytes(message.challenge.nonce, checks.NONCE_BYTES, "the nonce"))
        case "welcome":
            return Welcome(slot=checks.slot(message.welcome.slot), head=checks.position(message.welcome.head))
        case "refusal":
            return _refusal(message.refusal)
        case _:
            assert_never(kind)


def parse_to_peer(data: bytes, *, first: Position, decoder: RecordDecoder) -> ToPeer:
    """Decode the bytes of a coordinator's message; see `decode_to_peer`.

    Raises:
        WireError: OVERSIZED or MALFORMED.
    """
    if len(data) > SERVER_MESSAGE_BYTES_MAX:
        why = f"the message has {len(data)} bytes; at most {SERVER_MESSAGE_BYTES_MAX} are allowed"
        raise WireError(RejectCode.OVERSIZED, why)
    try:
        return decode_to_peer(pb.ToPeer.FromString(data), first=first, decoder=decoder)
    except DecodeError as error:
        raise checks.malformed(f"the message does not decode: {error}") from error


def _hello(message: Hello) -> pb.Hello:
    return pb.Hello(
        protocol=message.protocol,
        key=message.key,
        name=message.name,
        token=message.token,
        spec_digest=message.spec_digest,
        base_digest=message.base_digest,
        manifest_digest=message.manifest_digest,
        position=message.position,
        chain=message.chain,
    )


def _checked_hello(message: pb.Hello) -> Hello:
    return Hello(
        protocol=message.protocol,
        key=checks.key(message.key),
        name=checks.name(message.name),
        token=checks.token(message.token),
        spec_digest=checks.exact_bytes(message.spec_digest, checks.DIGEST_BYTES, "the RunSpec digest"),
        base_digest=checks.exact_bytes(message.base_digest, checks.DIGEST_BYTES, "the digest of the base weights"),
        manifest_digest=checks.exact_bytes(message.manifest_digest, checks.DIGEST_BYTES, "the manifest digest"),
        position=checks.position(message.position),
        chain=checks.exact_bytes(message.chain, checks.DIGEST_BYTES, "the chain hash"),
    )


def _contribution(message: pb.FromPeer) -> Contribution:
    if not message.codes:
        raise WireError(RejectCode.EMPTY_CONTRIBUTION, "a contribution without codes, or a message of no known kind")
    if len(message.codes) > limits.PROBES_PER_CONTRIBUTION_MAX:
        why = f"a contribution of {len(message.codes)} codes; at most {limits.PROBES_PER_CONTRIBUTION_MAX} are allowed"
        raise WireError(RejectCode.TOO_MANY_CODES, why)
    return Contribution(
        round=RoundNumber(message.round),
        codes=message.codes,
        loss=checks.loss(message.loss),
        digest=message.digest,
        is_exact=message.exact,
    )


def _refusal(message: pb.Refusal) -> Refusal:
    try:
        code = RejectCode(message.code)
    except ValueError:
        raise checks.malformed(f"{message.code} is not a refusal code") from None
    return Refusal(code=code, why=checks.text(message.why, checks.WHY_CHARS_MAX), closes=message.closes)
