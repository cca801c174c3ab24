"""The seal rule against a naive twin, and its sentences."""

from collections.abc import Set

from hypothesis import example, given
from hypothesis import strategies as st

from peerturb.ids import Slot
from peerturb.protocol.sealing import SealReason, seal_decision

SLOTS = st.sets(st.integers(0, 5).map(Slot))


def naive(
    contributed: Set[int], awaited: Set[int], connected: Set[int], min_peers: int, due_in_ms: int | None
) -> SealReason:
    """The rule as one would tell it, case by case."""
    everyone_in = all(slot in contributed for slot in awaited)
    deadline_over = due_in_ms is not None and not due_in_ms > 0
    enough = len(contributed) >= min_peers
    if enough and everyone_in:
        return SealReason.EVERYONE
    if enough and deadline_over:
        return SealReason.DEADLINE
    if enough:
        return SealReason.AWAITING
    if len(connected) == 0:
        return SealReason.NO_PEERS
    someone_may_come = any(slot not in contributed for slot in [*awaited, *connected])
    if deadline_over or not someone_may_come:
        return SealReason.TOO_FEW
    return SealReason.AWAITING


@given(SLOTS, SLOTS, SLOTS, st.integers(1, 4), st.none() | st.integers(-5, 5))
@example(set(), set(), set(), 1, None)
@example({Slot(0)}, {Slot(1)}, {Slot(1)}, 1, 0)
def test_the_rule_is_the_naive_one(
    contributed: set[Slot], awaited: set[Slot], connected: set[Slot], min_peers: int, due_in_ms: int | None
) -> None:
    decision = seal_decision(
        contributed=contributed, awaited=awaited, connected=connected, min_peers=min_peers, due_in_ms=due_in_ms
    )
    assert decision.reason is naive(contributed, awaited, connected, min_peers, due_in_ms)
    assert decision.is_seal == (decision.reason in (SealReason.EVERYONE, SealReason.DEADLINE))
    assert str(len(contributed)) in decision.text


def test_the_sentence_says_what_is_missing() -> None:
    one = {Slot(3)}
    text = seal_decision(contributed=one, awaited=one, connected=one, min_peers=2, due_in_ms=5).text
    assert text == "have 1 contribution, need min_peers 2"


def test_the_sentence_names_a_few_slots_and_counts_the_rest() -> None:
    many = {Slot(number) for number in range(20)}
    text = seal_decision(contributed=set(), awaited=many, connected=many, min_peers=1, due_in_ms=7).text
    assert text == "have 0 contributions, awaiting slots 0, 1, 2, 3, 4, 5, 6, 7 and 12 more (deadline in 7 ms)"
