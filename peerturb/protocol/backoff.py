"""When a peer tries again: exponential waiting with jitter that follows from its key, so that a run can be repeated."""

import hashlib

from peerturb.ids import PeerKey

WAIT_MS_MIN = 200
WAIT_MS_MAX = 10_000


def wait_ms(key: PeerKey, attempt: int) -> int:
    """Return how long to wait before an attempt (0 is the first after a loss): 200 ms doubling up to 10 s.

    Between half and all of it, chosen by SHA-256 of key and attempt: peers that lost one coordinator come back apart.
    """
    assert attempt >= 0
    longest = min(WAIT_MS_MIN << min(attempt, 16), WAIT_MS_MAX)
    digest = hashlib.sha256(key + attempt.to_bytes(8, "little")).digest()
    return longest // 2 + int.from_bytes(digest[:4], "little") % (longest // 2 + 1)
