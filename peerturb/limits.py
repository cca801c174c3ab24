"""Every maximum in one place, with the sum that justifies it. Checked at both ends of every pipe."""

SLOTS_MAX = 65_536
"""Identities a run may ever admit. A slot is one u32 of the Philox key; ffffffff is the rounding noise's."""

SESSIONS_MAX = 1_024
"""Peers connected at once. Each costs the coordinator about 100 KB, so this is 100 MB."""

DISPUTES_MAX = 8
"""Rounds in a row that the log may state on other weights than exact ones before ours are believed wrong."""
HALF_OPEN_MAX = 64
"""Streams whose handshake is not complete, beside the sessions; the oldest gives way to a new one. A handshake takes
two round trips, so an honest peer with 200 ms each is shut out only by more than 160 new streams a second."""

PROBES_PER_CONTRIBUTION_MAX = 65_536
"""Codes in one contribution: 64 KiB on the wire."""

PROBES_PER_UPDATE_MAX = 131_072
"""Probes summed in one integer update: 127 * 131 072 = 16 646 144 < 2**24, so U stays exact in f32."""

ROUNDS_MAX = 2**32 - 1
"""The round is one u32 of the Philox counter."""

RECORD_BYTES_MAX = 96 * 1024 * 1024
"""One log record; a sealed round of SESSIONS_MAX full contributions is 64 MiB of codes."""

CLIENT_MESSAGE_BYTES_MAX = PROBES_PER_CONTRIBUTION_MAX + 4_096
"""What a peer may send in one message: a full contribution and its fields."""

RECORD_BATCH_BYTES = 256 * 1024
"""Records are sent to a peer that catches up in batches of about this size."""

SPEC_BYTES_MAX = 64 * 1024
"""Canonical JSON of a RunSpec."""

NAME_CHARS_MAX = 64
"""A peer's or run's display name."""

TOKEN_CHARS_MAX = 256
"""A join token."""

SEQUENCE_TOKENS_MAX = 32_768
"""Tokens in one sequence a RunSpec may ask for."""

CLASSES_MAX = 1_024
"""Classes of a classification head."""
