"""Hypothesis strategies for the protocol's values."""

from hypothesis import strategies as st

from peerturb import limits
from peerturb.errors import RejectCode
from peerturb.floats import f32
from peerturb.ids import PeerKey, Position, RoundNumber, Slot
from peerturb.protocol.messages import (
    Challenge,
    Contribution,
    Evaluation,
    FromPeer,
    Hello,
    Leave,
    Proof,
    Refusal,
    Welcome,
)
from peerturb.protocol.records import (
    Evaluated,
    LeaveReason,
    PeerJoined,
    PeerLeft,
    Record,
    RoundOpened,
    RoundSealed,
    RunFinished,
    RunStarted,
)
from peerturb.spec import ModelSpec, RoundSpec, RunSpec

U32 = st.integers(0, 2**32 - 1)
ROUNDS = U32.map(RoundNumber)
SLOTS = st.integers(0, limits.SLOTS_MAX - 1).map(Slot)
KEYS = st.binary(min_size=32, max_size=32).map(PeerKey)
DIGESTS = st.binary(min_size=32, max_size=32)
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=limits.NAME_CHARS_MAX)
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
LOSSES = st.floats(width=32).map(f32)
POSITIVE = F32.filter(lambda value: value > 0)
FRACTIONS = st.none() | st.floats(0, 1, width=32)
SPECS = st.builds(
    lambda name, seed, count: RunSpec(
        name=name, seed=seed, model=ModelSpec(name="toy", digest="ab" * 32), round=RoundSpec(count=count)
    ),
    NAMES,
    st.integers(0, 2**63 - 1),
    st.integers(0, 100),
)


@st.composite
def sealed_rounds(draw: st.DrawFn, round_: int) -> RoundSealed:
    """A well-formed sealed round, equal counts or not."""
    dense = st.integers(0, 40).map(Slot)  # short enough for a bitmap
    slots = sorted(draw(st.sets(draw(st.sampled_from([SLOTS, dense])), min_size=1, max_size=6)))
    equal = draw(st.booleans())
    count = draw(st.integers(1, 9))
    counts = [count if equal else draw(st.integers(1, 9)) for _ in slots]
    codes = draw(st.binary(min_size=sum(counts), max_size=sum(counts)))
    return RoundSealed(
        round=RoundNumber(round_),
        alpha=draw(F32),
        loss=draw(LOSSES),
        digest=draw(U32),
        slots=tuple(slots),
        counts=tuple(counts),
        codes=codes,
        exact=tuple(slot for slot in slots if draw(st.booleans())),
    )


def records(round_: int) -> st.SearchStrategy[Record]:
    """Any record that may stand after `round_` sealed rounds, looked at alone."""
    return st.one_of(
        st.builds(RunStarted, spec=SPECS),
        st.builds(PeerJoined, slot=SLOTS, key=KEYS, name=NAMES),
        st.builds(PeerLeft, slot=SLOTS, reason=st.sampled_from(LeaveReason)),
        st.builds(
            RoundOpened,
            round=st.just(RoundNumber(round_)),
            scale=POSITIVE,
            deadline_ms=U32,
            exact_scale=st.just(0.0) | POSITIVE,
        ),
        sealed_rounds(round_),
        st.builds(Evaluated, round=ROUNDS, slot=SLOTS, loss=LOSSES, accuracy=FRACTIONS, examples=U32),
        st.builds(RunFinished, rounds=U32),
    )


FROM_PEER: st.SearchStrategy[FromPeer] = st.one_of(
    st.builds(
        Hello,
        protocol=U32,
        key=KEYS,
        name=NAMES,
        token=st.text(st.characters(exclude_categories=("C", "Z")), max_size=limits.TOKEN_CHARS_MAX),
        spec_digest=DIGESTS,
        base_digest=DIGESTS,
        manifest_digest=DIGESTS,
        position=st.integers(0, 2**63 - 1).map(Position),
        chain=DIGESTS,
    ),
    st.builds(Proof, signature=st.binary(min_size=64, max_size=64)),
    st.builds(
        Contribution,
        round=ROUNDS,
        codes=st.binary(min_size=1, max_size=300),
        loss=LOSSES,
        digest=U32,
        is_exact=st.booleans(),
    ),
    st.builds(Evaluation, round=ROUNDS, loss=LOSSES, accuracy=FRACTIONS, examples=U32),
    st.just(Leave()),
)

TO_PEER = st.one_of(
    st.builds(Challenge, nonce=DIGESTS),
    st.builds(Welcome, slot=SLOTS, head=st.integers(0, 2**63 - 1).map(Position)),
    st.builds(
        Refusal,
        code=st.sampled_from(RejectCode),
        why=st.text(st.characters(exclude_categories=("C", "Z")), max_size=100),
        closes=st.booleans(),
    ),
)
