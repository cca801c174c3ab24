"""Checks that every decoded field passes. Each returns the value or raises `WireError`."""

import math

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.floats import is_f32
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.wire.errors import WireError

DIGEST_BYTES = 32
KEY_BYTES = 32
NONCE_BYTES = 32
SIGNATURE_BYTES = 64
WHY_CHARS_MAX = 1_024
PROTOCOL_MAX = 2**31 - 1


def malformed(why: str) -> WireError:
    """Return the error for a value that no honest side sends."""
    return WireError(RejectCode.MALFORMED, why)


def exact_bytes(value: bytes, length: int, what: str) -> bytes:
    """Require a byte string of one length."""
    if len(value) != length:
        raise malformed(f"{what} has {len(value)} bytes instead of {length}")
    return value


def key(value: bytes) -> PeerKey:
    """Require an identity key."""
    return PeerKey(exact_bytes(value, KEY_BYTES, "the identity key"))


def slot(value: int) -> Slot:
    """Require a slot a run can give out."""
    if not 0 <= value < limits.SLOTS_MAX:
        raise malformed(f"slot {value} is outside 0..{limits.SLOTS_MAX - 1}")
    return Slot(value)


def round_number(value: int) -> RoundNumber:
    """Require a round number."""
    if not 0 <= value <= limits.ROUNDS_MAX:
        raise malformed(f"round {value} is outside 0..{limits.ROUNDS_MAX}")
    return RoundNumber(value)


def position(value: int) -> Position:
    """Require a log position: any count of records, as far as arithmetic is safe."""
    if not 0 <= value < 2**63:
        raise malformed(f"position {value} is not a count of records")
    return Position(value)


def name(value: str) -> str:
    """Require a display name: 1 to 64 printable characters."""
    if not 1 <= len(value) <= limits.NAME_CHARS_MAX:
        raise malformed(f"a name has {len(value)} characters; 1 to {limits.NAME_CHARS_MAX} are allowed")
    if not value.isprintable():
        raise malformed("a name has characters that cannot be printed")
    return value


def text(value: str, chars_max: int) -> str:
    """Cut a sentence for people to a length; replace what cannot be printed, so that it cannot steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in value[:chars_max])


def token(value: str) -> str:
    """Require a join token of a sane length."""
    if len(value) > limits.TOKEN_CHARS_MAX:
        raise malformed(f"the join token has {len(value)} characters; at most {limits.TOKEN_CHARS_MAX} are allowed")
    return value


def positive(value: float, what: str) -> float:
    """Require a positive, finite f32 number."""
    if not (is_f32(value) and value > 0):
        raise malformed(f"{what} is {value!r}, which is not a positive single-precision number")
    return value


def loss(value: float) -> float:
    """Take any loss; every NaN becomes `math.nan`, so that equal messages compare equal."""
    return math.nan if math.isnan(value) else value


def fraction(value: float, what: str) -> float:
    """Require a number in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise malformed(f"{what} is {value!r}, which is not in 0..1")
    return value


def encodable(value: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot carry."""
    return value.encode("utf-8", "replace").decode("utf-8")
