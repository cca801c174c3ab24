"""Whether and when a peer tries again: waiting doubles, with jitter that follows from its key."""

import hashlib

from peerturb.errors import RejectCode
from peerturb.ids import PeerKey

WAIT_MS_MIN = 200
WAIT_MS_MAX = 10_000

HANDSHAKE_MS_MAX = 30_000
"""From `Connect` to the welcome; after that the attempt counts as lost."""

REFUSALS_MAX = 8
"""Closing refusals in a row, without a welcome between them, after which a peer gives up."""

_PASSING = frozenset({RejectCode.RUN_FULL, RejectCode.SHUTTING_DOWN})
_ODD = frozenset({RejectCode.NOT_JOINED, RejectCode.OVERSIZED, RejectCode.MALFORMED})


def is_worth_retrying(code: RejectCode, refusals: int) -> bool:
    """Tell whether to come back after the `refusals`th closing refusal in a row.

    A full or stopping coordinator passes; what may be an accident of one session is tried a few times; anything else
    says what no second attempt can change.
    """
    return code in _PASSING or (code in _ODD and refusals < REFUSALS_MAX)


def wait_ms(key: PeerKey, attempt: int) -> int:
    """Return how long to wait before an attempt (0 is the first after a loss): 200 ms doubling up to 10 s.

    Between half and all of it, chosen by SHA-256 of key and attempt: peers that lost one coordinator come back apart.
    """
    assert attempt >= 0
    longest = min(WAIT_MS_MIN << min(attempt, 16), WAIT_MS_MAX)
    digest = hashlib.sha256(key + attempt.to_bytes(8, "little")).digest()
    return longest // 2 + int.from_bytes(digest[:4], "little") % (longest // 2 + 1)
