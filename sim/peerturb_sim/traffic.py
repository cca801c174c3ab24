"""Bytes of the messages of a round, counted on the messages themselves: made by the encoder that nodes use."""

import math

from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.messages import Contribution
from peerturb.protocol.records import RoundOpened, RoundSealed
from peerturb.wire.messages import encode_from_peer, encode_payloads
from peerturb.wire.records import encode_record
from peerturb_sim.factors import FRAMING_BYTES

_ROUND = RoundNumber(300)
"""A round number of two bytes, as most of a run's have."""
_FRAME_BYTES, _FRAME_HEADER = 16_384, 9
"""HTTP/2 cuts a message into DATA frames of at most so many bytes; the first header is in `FRAMING_BYTES`."""


def contribution_bytes(codes: int) -> int:
    """Return what a peer sends in a round, above TCP."""
    message = Contribution(round=_ROUND, codes=bytes(codes), loss=2.5, digest=0x12345678)
    return _framed(len(encode_from_peer(message).SerializeToString()))


def feed_bytes(counts: list[int]) -> int:
    """Return what every peer receives in a round, above TCP: the sealed round and the opening of the next.

    Args:
        counts: codes of each peer, in the order of their slots.
    """
    sealed = RoundSealed(
        round=_ROUND, alpha=1e-3, loss=2.5, digest=0x12345678, slots=tuple(map(Slot, range(len(counts)))),
        counts=tuple(counts), codes=bytes(sum(counts)),
    )  # fmt: skip
    opened = RoundOpened(round=_ROUND, scale=0.5, deadline_ms=1_000)
    return _framed(len(encode_payloads([encode_record(sealed), encode_record(opened)]).SerializeToString()))


def _framed(message: int) -> int:
    return message + int(FRAMING_BYTES.value) + _FRAME_HEADER * (math.ceil(message / _FRAME_BYTES) - 1)
