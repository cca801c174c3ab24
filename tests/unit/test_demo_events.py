"""The demo's story: what is counted, and what must not be overlooked."""

import math

import pytest

from peerturb_node.demo.events import Story
from tests.unit import demo_story
from tests.unit.demo_story import CODES, JOIN, KILL, begin, digest_after, round_event, tell


def test_a_whole_course_is_counted_right() -> None:
    story = demo_story.whole(40)
    assert story.round == 40
    assert [point.round for point in story.rounds] == list(range(1, 41))
    three = JOIN - KILL
    assert story.probes == CODES * (4 * (40 - three) + 3 * three)
    assert story.peers["node-4"].codes_up == KILL * CODES
    assert story.peers["node-5"].codes_up == (40 - JOIN) * CODES
    assert story.peers["node-5"].rounds_received == 40
    assert story.peers["node-5"].replayed == JOIN
    assert (story.killed, story.joined, story.coordinator_restarts) == (1, 1, 1)
    assert [mark.round for mark in story.marks] == [KILL, JOIN, demo_story.RESTART]
    assert story.are_digests_equal
    assert story.compared == 40
    assert all(peer.disorder == 0 for peer in story.peers.values())


def test_bytes_per_code_are_the_relays_bytes_over_the_codes_sealed_and_received() -> None:
    story = demo_story.whole(40)
    sent = sum(peer.codes_up for peer in story.peers.values())
    assert sent == story.probes
    assert story.bytes_up_per_code == pytest.approx((CODES + 50) / CODES)
    received = sum(peer.codes_down for peer in story.peers.values())
    assert story.bytes_down_per_code == pytest.approx(story.bytes_down / received)


def test_full_gradients_are_one_up_per_contribution_and_one_down_per_round_received() -> None:
    story = begin(nodes=2)
    for name in ("node-1", "node-2"):
        tell(story, name, 1, 2)
    story.take("node-1", round_event(2, own=False, codes=CODES, digest=None))
    assert story.full_gradient_bytes == (2 + 3) * 869_504 * 4


def test_one_other_digest_in_one_round_is_seen() -> None:
    story = begin(nodes=3)
    for round in (1, 2, 3):
        for name in ("node-1", "node-2"):
            tell(story, name, round, 3)
        tell(story, "node-3", round, 3, digest="00000000" if round == 2 else None)
    assert story.mismatches() == [2]
    assert not story.are_digests_equal


def test_nothing_compared_is_not_equal() -> None:
    story = begin(nodes=2)
    tell(story, "node-1", 1, 1)
    assert story.compared == 0
    assert not story.are_digests_equal


@pytest.mark.parametrize("next_round", [1, 3])
def test_a_round_seen_twice_or_skipped_is_disorder(next_round: int) -> None:
    story = begin(nodes=1)
    tell(story, "node-1", 1, 1)
    tell(story, "node-1", next_round, 1)
    assert story.peers["node-1"].disorder == 1


def test_a_contribution_that_came_too_late_is_not_counted_as_sent() -> None:
    story = begin(nodes=1)
    story.take("node-1", {"event": "measured", "round": 0, "codes": CODES})
    story.take("node-1", round_event(1, own=False, codes=96, digest=digest_after(1)))
    assert story.peers["node-1"].codes_up == 0
    assert story.peers["node-1"].rounds_part == 0


def test_events_of_a_killed_node_change_nothing_any_more() -> None:
    story = begin(nodes=2)
    story.peers["node-2"].state = "killed"
    tell(story, "node-2", 1, 2)
    assert story.peers["node-2"].state == "killed"
    assert story.round == 0


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": None},
        {"event": "round"},
        {"event": "round", "round": "7"},
        {"event": "round", "round": True},
        {"event": "eval", "accuracy": "high"},
        {"event": "model", "parameters": None},
        {"event": "joined"},
        {"event": "something new"},
    ],
)
def test_strange_events_do_no_harm(event: dict[str, object]) -> None:
    story = begin(nodes=1)
    story.take("node-1", event)
    story.take("nobody", event)
    assert story.round == 0
    assert story.parameters == 869_504


def test_states_follow_the_events() -> None:
    story = Story()
    peer = story.add_peer("node-1", pid=1)
    seen = [peer.state]
    for event in (
        {"event": "start"},
        {"event": "model"},
        {"event": "joined", "slot": 3},
        {"event": "behind", "rounds": 9},
        {"event": "training", "seconds": 0.5},
        {"event": "disconnected"},
        {"event": "joined", "slot": 3},
        {"event": "stop"},
    ):
        story.take("node-1", event)
        seen.append(peer.state)
    assert seen == [
        "starting", "loading", "joining", "joining", "catching up", "training", "reconnecting", "joining", "stopped",
    ]  # fmt: skip
    assert peer.slot == 3


def test_an_evaluation_is_kept_once_and_in_order() -> None:
    story = begin(nodes=1)
    for round in (10, 0, 10):
        story.take("node-1", {"event": "eval", "round": round, "loss": 0.4, "accuracy": 0.5})
    assert [point.round for point in story.evals] == [0, 10]


def test_figures_before_the_first_round_are_not_made_up() -> None:
    story = Story()
    assert math.isnan(story.bytes_up_per_code)
    assert math.isnan(story.bytes_down_per_code)
    assert story.rounds_per_s == 0
    assert story.round == 0
    assert story.full_gradient_bytes == 0


def test_speed_is_that_of_the_last_rounds() -> None:
    story = begin(nodes=1)
    for round in range(1, 30):
        story.at_s = round * (2.0 if round < 15 else 0.5)
        tell(story, "node-1", round, 1)
    assert story.rounds_per_s == pytest.approx(2.0)


def test_being_turned_away_is_told_once() -> None:
    story = Story()
    story.add_peer("node-1", pid=1)
    for _ in range(3):
        story.take("node-1", {"event": "joined", "slot": 0})
        story.take("node-1", {"event": "disconnected", "why": "strange bytes"})
    assert [entry.text for entry in story.entries] == ["node-1 was turned away: strange bytes"]


def test_losing_the_connection_in_the_middle_of_training_is_a_state_and_no_complaint() -> None:
    story = begin(nodes=1)
    tell(story, "node-1", 1, 1)
    before = len(story.entries)
    story.take("node-1", {"event": "disconnected", "why": "the coordinator restarts"})
    assert story.peers["node-1"].state == "reconnecting"
    assert len(story.entries) == before


def test_a_late_contribution_is_no_complaint_but_another_refusal_is() -> None:
    story = begin(nodes=1)
    before = len(story.entries)
    story.take("node-1", {"event": "refused", "code": "stale_round", "why": "round 0 is already sealed"})
    assert len(story.entries) == before
    story.take("node-1", {"event": "refused", "code": "model_mismatch", "why": "base weights differ"})
    assert story.entries[-1].text == "node-1 was refused: base weights differ"
