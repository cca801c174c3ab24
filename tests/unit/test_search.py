"""The search for a learning rate on made-up landscapes: it brackets the best rate, ends, recommends with a margin."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb.zo.search import RATES_MAX, Outcome, Setting, finalists, next_setting, recommend

START = Setting(epsilon=1e-3, learning_rate=1e-2)


def outcome(setting: Setting, after: float, *, error: float = 0.02, held: float | None = None) -> Outcome:
    return Outcome(
        setting=setting,
        rounds=10,
        before=5.0,
        after=after,
        error=error,
        held_out_before=None if held is None else 6.0,
        held_out_after=held,
        clipped=0.0,
        rms=32.0,
        void=0.0,
        seconds=1.0,
    )


def valley(best: float) -> Callable[[Setting], float]:
    """The loss falls with the rate up to `best`, then rises, and is NaN far above."""

    def loss(setting: Setting) -> float:
        ratio = setting.learning_rate / best
        return 5 - ratio if ratio <= 1 else 5 - 2 / ratio**2 + 1 if ratio < 30 else math.nan

    return loss


def search(loss: Callable[[Setting], float], start: Setting = START) -> list[Outcome]:
    done: list[Outcome] = []
    while (setting := next_setting(start, done)) is not None:
        assert setting not in [one.setting for one in done]
        assert len(done) < RATES_MAX + 2
        done.append(outcome(setting, loss(setting)))
    return done


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0])
def test_the_best_rate_is_found_from_two_orders_of_magnitude_away(best: float) -> None:
    done = search(valley(best))
    found = recommend(START, done).setting
    assert found is not None
    assert best / 3.5 <= found.learning_rate <= best * 1.5


def test_epsilons_are_tried_at_the_best_rate() -> None:
    done = search(valley(1e-2))
    assert done[0].setting == START
    epsilons = [one.setting for one in done if one.setting.epsilon != START.epsilon]
    assert epsilons == [Setting(epsilon=1e-2, learning_rate=1e-2), Setting(epsilon=1e-4, learning_rate=1e-2)]


def test_no_epsilon_above_one_is_tried() -> None:
    start = Setting(epsilon=0.5, learning_rate=1e-2)
    assert all(one.setting.epsilon <= 1 for one in search(valley(1e-2), start))


LOSSES = st.sampled_from([1.0, 3.0, 4.0, 4.9, 5.0, 5.02, 8.0, math.nan, math.inf])


@given(st.lists(LOSSES, min_size=RATES_MAX + 2, max_size=RATES_MAX + 2), st.lists(LOSSES, min_size=2, max_size=2))
def test_what_is_recommended_has_been_tried_for_longer_and_the_gain_is_its_own(
    losses: list[float], ends: list[float]
) -> None:
    done = search(lambda setting: losses.pop())
    final = [outcome(setting, end) for setting, end in zip(finalists(START, done), ends, strict=False)]
    assert len({one.setting.epsilon for one in final}) <= 1
    for trials, found in ((done, recommend(START, done)), (final or done, recommend(START, done, final))):
        assert found.text
        if found.setting is not None:
            (tried,) = [one for one in trials if one.setting == found.setting]
            assert tried.has_learned
            assert f"falls by {tried.gain:.4f} in {tried.rounds} rounds" in found.text


@given(st.lists(st.sampled_from([1.0, 4.9, 5.0, 5.02, 8.0, math.nan, math.inf]), min_size=10, max_size=10))
def test_the_search_ends_whatever_comes(losses: list[float]) -> None:
    left = list(losses)
    done = search(lambda setting: left.pop())
    found = recommend(START, done)
    assert found.text
    if found.setting is not None:
        assert found.setting.learning_rate in [one.setting.learning_rate for one in done if one.has_learned]


def test_nearly_as_good_and_smaller_is_better() -> None:
    done = [outcome(Setting(epsilon=1e-3, learning_rate=rate), after) for rate, after in ((1e-2, 4.05), (3e-2, 4.0))]
    assert recommend(START, done).setting == Setting(epsilon=1e-3, learning_rate=1e-2)
    done = [outcome(Setting(epsilon=1e-3, learning_rate=rate), after) for rate, after in ((1e-2, 4.2), (3e-2, 4.0))]
    assert recommend(START, done).setting == Setting(epsilon=1e-3, learning_rate=3e-2)


def test_another_epsilon_must_be_better_by_more_than_its_error() -> None:
    other = Setting(epsilon=1e-2, learning_rate=1e-2)
    assert recommend(START, [outcome(START, 4.0), outcome(other, 3.97)]).setting == START
    assert recommend(START, [outcome(START, 4.0), outcome(other, 3.9)]).setting == other


def test_the_held_out_loss_decides_where_there_is_one() -> None:
    large = Setting(epsilon=1e-3, learning_rate=3e-2)
    done = [outcome(START, 4.5, held=5.0), outcome(large, 4.0, held=5.9)]
    assert recommend(START, done).setting == START
    assert next_setting(START, done) == Setting(epsilon=1e-3, learning_rate=3.3e-3)


def test_what_is_said_when_nothing_can_be_recommended() -> None:
    assert "--budget" in recommend(START, []).text
    rising = [outcome(Setting(epsilon=1e-3, learning_rate=rate), 6.0) for rate in (1e-2, 1e-3)]
    found = recommend(START, rising)
    assert found.setting is None
    assert "0.001 too" in found.text
    level = recommend(START, [outcome(START, 4.99)])
    assert level.setting is None
    assert "template" in level.text


def test_the_sentence_names_what_the_next_larger_rate_did() -> None:
    done = [outcome(START, 4.0), outcome(Setting(epsilon=1e-3, learning_rate=3e-2), math.nan)]
    assert "0.03 diverges" in recommend(START, done).text


def test_the_longer_trial_decides_over_a_rate_that_only_led_at_first() -> None:
    large, small = Setting(epsilon=1e-3, learning_rate=3e-2), START
    done = [outcome(small, 4.5), outcome(large, 4.0)]
    assert recommend(START, done).setting == large
    assert finalists(START, done) == [small, large]
    assert recommend(START, done, [outcome(small, 3.8), outcome(large, 3.9)]).setting == small
    assert recommend(START, done, [outcome(small, 3.8), outcome(large, math.nan)]).setting == small
    assert recommend(START, done, [outcome(small, 3.8), outcome(large, 3.4)]).setting == large
    assert "0.03 diverges" in recommend(START, done, [outcome(small, 3.8), outcome(large, math.nan)]).text


def test_without_anything_learned_there_is_no_longer_trial() -> None:
    assert finalists(START, [outcome(START, 6.0)]) == []
    assert finalists(START, []) == []


def test_longer_trials_are_at_the_epsilon_that_is_recommended() -> None:
    """Each with the rates of its own: a gain at one epsilon says nothing of the same rate at another."""
    other = Setting(epsilon=1e-2, learning_rate=1e-2)
    for at_start, at_other, epsilon in ((4.5, 4.0, 1e-2), (4.5, 4.47, 1e-3), (6.0, 4.0, 1e-2), (4.5, 6.0, 1e-3)):
        done = [outcome(START, at_start), outcome(other, at_other)]
        small, large = finalists(START, done)
        assert (small.epsilon, small.learning_rate, large.learning_rate) == (epsilon, 3.3e-3, 1e-2)
        assert large.epsilon == epsilon
        assert recommend(START, done).setting == large
        assert recommend(START, done, [outcome(small, 3.8), outcome(large, 4.1)]).setting == small


def test_rates_that_rise_in_longer_trials_are_not_recommended() -> None:
    done = [outcome(START, 4.0)]
    final = [outcome(setting, 6.0) for setting in finalists(START, done)]
    found = recommend(START, done, final)
    assert found.setting is None
    assert "0.0033 and 0.01 learn nothing; give step.learning_rate = 0.0011" in found.text


def test_a_larger_rate_is_named_from_the_search_where_no_longer_trial_had_one() -> None:
    larger = Setting(epsilon=1e-3, learning_rate=3e-2)
    done = [outcome(START, 4.0), outcome(larger, math.nan)]
    final = [outcome(Setting(epsilon=1e-3, learning_rate=3.3e-3), 4.5), outcome(START, 3.5)]
    assert "1.5000 in 10 rounds; 0.03 diverges" in recommend(START, done, final).text
    assert "no larger rate" in recommend(START, done[:1], final).text
    assert "0.03 learns nothing" in recommend(START, [done[0], outcome(larger, 5.01)], final).text


def test_without_epsilon_only_rates_are_tried() -> None:
    done: list[Outcome] = []
    while (setting := next_setting(START, done, has_epsilon=False)) is not None:
        done.append(outcome(setting, valley(1e-2)(setting)))
    assert {one.setting.epsilon for one in done} == {START.epsilon}
    assert len(done) > 1
