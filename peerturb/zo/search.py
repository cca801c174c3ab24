"""Which (epsilon, learning rate) to try next, and which to recommend. Pure: it sees outcomes, no model.

Rates first, in steps of three from the start until the best one lies between two that were tried; then epsilon, ten
times larger and smaller, at the best rate. Few rounds flatter large rates: a rate can lead after ten rounds and rise
from there on. So what time is left goes to a longer trial of the best rate against a third of it, both at the epsilon
that is recommended: what is recommended has been tried as it stands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peerturb.presets import two_digits

RATE_STEP = 3.0
EPSILON_STEP = 10.0
RATES_MAX = 6
"""Rates tried at most."""

SETTINGS_TYPICAL = 6
"""Settings that a sweep usually comes to: four rates, two more epsilons."""

ENOUGH_GAIN = 0.9
"""Of settings that gain nearly as much as the best, the smallest rate is taken: a short sweep flatters large ones."""

ERRORS = 2.0
"""Standard errors by which a loss must differ from another to count as different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a sweep varies."""

    epsilon: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What some rounds with a setting did to the weights' losses."""

    setting: Setting
    rounds: int
    """Fewer than planned where the loss ran away."""
    before: float
    """Mean loss of a fixed sample of the training data, before the first round."""
    after: float
    """The same after the last one."""
    error: float
    """Standard error of `after - before`, from the differences of the single examples."""
    held_out_before: float | None
    held_out_after: float | None
    clipped: float
    """Fraction of the valid codes at +-127."""
    rms: float
    """Of the valid codes; the shared scale aims at 32."""
    void: float
    """Fraction of the codes whose loss was not finite."""
    seconds: float

    @property
    def score(self) -> float:
        """What is compared: the held-out loss if there is one. Infinite where it is not finite."""
        value = self.after if self.held_out_after is None else self.held_out_after
        return value if math.isfinite(value) else math.inf

    @property
    def gain(self) -> float:
        """By how much that loss fell."""
        before = self.before if self.held_out_before is None else self.held_out_before
        return before - self.score

    @property
    def has_diverged(self) -> bool:
        """Whether the training loss is higher than before by more than its error, or no number at all."""
        rise = self.after - self.before
        return not math.isfinite(self.after) or rise > ERRORS * self.error

    @property
    def has_learned(self) -> bool:
        """Whether the training loss fell by more than its error, and the compared loss fell."""
        return self.gain > 0 and self.before - self.after > ERRORS * self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to write into RUN.toml."""

    setting: Setting | None
    """None: nothing that was tried can be recommended."""
    text: str
    """Why, in a sentence or two, and what to do."""


def next_setting(start: Setting, done: Sequence[Outcome], *, has_epsilon: bool = True) -> Setting | None:
    """Return what to try after these outcomes, None when the search is over; without `has_epsilon` rates alone."""
    rates = {one.setting.learning_rate: one for one in done if one.setting.epsilon == start.epsilon}
    if not rates:
        return start
    best = min(rates.values(), key=lambda one: (one.has_diverged, one.score, one.setting.learning_rate))
    rate = min(rates) if best.has_diverged else best.setting.learning_rate
    if len(rates) < RATES_MAX:
        if rate == min(rates) and (best.has_diverged or len(rates) > 1):
            return Setting(epsilon=start.epsilon, learning_rate=two_digits(rate / RATE_STEP))
        if rate == max(rates):
            return Setting(epsilon=start.epsilon, learning_rate=two_digits(rate * RATE_STEP))
    if best.has_diverged or not has_epsilon:
        return None
    tried = {one.setting.epsilon for one in done}
    for epsilon in (start.epsilon * EPSILON_STEP, start.epsilon / EPSILON_STEP):
        if two_digits(epsilon) not in tried and epsilon <= 1:
            return Setting(epsilon=two_digits(epsilon), learning_rate=rate)
    return None


def finalists(start: Setting, done: Sequence[Outcome]) -> list[Setting]:
    """Return what to try for longer: the rate that gained most, and a third of it, at the better epsilon. Nothing if
    nothing has learned."""
    learned = _learned(done)
    if not learned:
        return []
    most = max(_at_the_better_epsilon(start, learned), key=lambda one: one.gain).setting
    return [replace(most, learning_rate=two_digits(most.learning_rate / RATE_STEP)), most]


def recommend(start: Setting, done: Sequence[Outcome], final: Sequence[Outcome] = ()) -> Recommendation:
    """Return the setting to use and why: one that was tried, never a rate from here and an epsilon from there.

    Among rates whose gain is nearly the best, the smallest one; another epsilon than the start's only where it gains
    more by more than its error.

    Args:
        start: where the search began.
        done: outcomes of the search.
        final: outcomes of the longer trials; if there are any, only they count: a rate that rises in the end is none to
            recommend, whatever it did at first.
    """
    learned = _learned(done)
    if not learned:
        return Recommendation(setting=None, text=_nothing(done))
    candidates = _learned(final) if final else _at_the_better_epsilon(start, learned)
    if not candidates:
        return Recommendation(setting=None, text=_none_lasts(final))
    most = max(one.gain for one in candidates)
    enough = [one for one in candidates if one.gain >= ENOUGH_GAIN * most]
    chosen = min(enough, key=lambda one: one.setting.learning_rate)
    rate, epsilon = chosen.setting.learning_rate, chosen.setting.epsilon
    gain = f"the loss falls by {chosen.gain:.4f} in {chosen.rounds} rounds"
    text = f"learning rate {rate:g}, epsilon {epsilon:g}: {gain}; {_neighbours(chosen, final, done)}"
    return Recommendation(setting=chosen.setting, text=text)


def _learned(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if one.has_learned and not one.has_diverged]


def _at_the_better_epsilon(start: Setting, learned: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes at the start's epsilon, or at another that gains more by more than its error."""
    at_start = [one for one in learned if one.setting.epsilon == start.epsilon]
    others = [one for one in learned if one.setting.epsilon != start.epsilon]
    if not others:
        return at_start
    better = max(others, key=lambda one: one.gain)
    if at_start and better.gain - max(one.gain for one in at_start) <= ERRORS * better.error:
        return at_start
    return [one for one in others if one.setting.epsilon == better.setting.epsilon]


def _nothing(done: Sequence[Outcome]) -> str:
    if not done:
        return "not one setting could be tried in the time given: raise --budget, or lower --probes"
    if all(one.has_diverged for one in done):
        smallest = min(one.setting.learning_rate for one in done)
        return f"the loss rises with every rate tried, {smallest:g} too: look at the data and the template first"
    return (
        "no setting lowers the loss by more than its error: raise --budget or --probes, and look at the data and the "
        "template (does the base model know the task at all?)"
    )


def _none_lasts(final: Sequence[Outcome]) -> str:
    smallest = min(one.setting.learning_rate for one in final)
    rates = " and ".join(f"{one.setting.learning_rate:g}" for one in final)
    return (
        f"what learned at first does not last: in longer trials the rates {rates} learn nothing; give "
        f"step.learning_rate = {two_digits(smallest / RATE_STEP):g} and tune again"
    )


def _neighbours(chosen: Outcome, *trials: Sequence[Outcome]) -> str:
    """Say what the next larger rate did at that epsilon, in the first of the trials that had one, and what it means."""
    rate, epsilon = chosen.setting.learning_rate, chosen.setting.epsilon
    what = "no larger rate was tried at that epsilon"
    for done in trials:
        larger = [one for one in done if one.setting.epsilon == epsilon and one.setting.learning_rate > rate]
        if larger:
            nearest = min(larger, key=lambda one: one.setting.learning_rate)
            learned = f"gains {nearest.gain:.4f} in {nearest.rounds}" if nearest.has_learned else "learns nothing"
            what = f"{nearest.setting.learning_rate:g} {'diverges' if nearest.has_diverged else learned}"
            break
    return f"{what}. A sweep is short and flatters large rates: let the rate fall (schedule linear, cosine or plateau)"
