"""Divergence is noticed, noise is not, and each is said once by coordinator and node."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from peerturb.protocol.outputs import CoordinatorOutput, Notice, PeerOutput
from peerturb.protocol.records import Record, RoundSealed
from peerturb.protocol.trend import DIVERGING, TrendNews
from peerturb.trend import SCALES, Trend
from peerturb_coordinator.status import to_wire
from tests.unit.test_coordinator_machine import Shell as CoordinatorShell
from tests.unit.test_coordinator_machine import make_spec
from tests.unit.test_peer_machine import Shell as PeerShell
from tests.unit.test_peer_machine import make_log

Losses = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Losses]

NOISES: dict[str, Noise] = {
    "normal": lambda draw, rounds: draw.normal(0, 1, rounds),
    # Outliers on both sides, and on one: a few hard examples.
    "student": lambda draw, rounds: draw.standard_t(3, rounds) / 3**0.5,
    "lognormal": lambda draw, rounds: (draw.lognormal(0, 1, rounds) - math.e**0.5) / 2.16,
}
ROUNDS = 1_000


def alarms_at(losses: Iterable[float]) -> int | None:
    """Round after which the trend is first called rising."""
    trend = Trend()
    for round_, loss in enumerate(losses):
        trend.take(round_, loss)
        if trend.is_rising:
            return round_
    return None


def curve(kind: str) -> Losses:
    rounds = np.arange(ROUNDS)
    return {"flat": np.full(ROUNDS, 2.0), "falling": 0.1 + 2 * np.exp(-rounds / 100)}[kind]


@pytest.mark.parametrize("kind", ["flat", "falling"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("size", [0.003, 0.03, 0.3])
def test_noise_is_no_divergence(kind: str, noise: str, size: float) -> None:
    for seed in range(10):
        draw = np.random.default_rng(seed)
        assert alarms_at(curve(kind) + size * NOISES[noise](draw, ROUNDS)) is None, f"seed {seed}"


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("slope", "size", "rounds"), [(0.03, 0.03, 64), (0.03, 0.1, 128), (0.01, 0.03, 96)])
def test_a_rise_is_noticed_soon(noise: str, slope: float, size: float, rounds: int) -> None:
    falling, rising = 5 - 0.02 * np.arange(50), 4 + slope * np.arange(rounds)
    for seed in range(20):
        draw = np.random.default_rng(seed)
        clean = np.concatenate([falling, rising])
        at = alarms_at(clean + size * NOISES[noise](draw, len(clean)))
        assert at is not None, f"seed {seed}"
        assert at > len(falling), f"seed {seed}"


def test_a_run_that_rises_from_the_start_is_noticed_in_three_windows() -> None:
    draw = np.random.default_rng(0)
    at = alarms_at(4.7 + 0.05 * np.arange(40) + 0.03 * draw.normal(0, 1, 40))
    assert at == 3 * SCALES[0][0] - 1


def test_a_slow_rise_under_much_noise_is_found_in_long_windows() -> None:
    """As measured: few examples of a classification task, a rate ten times too large (docs/LOG.md)."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        at = alarms_at(1.2 + 0.02 * np.arange(200) + 0.48 * draw.normal(0, 1, 200))
        assert at is not None, f"seed {seed}"


def test_a_jump_of_one_window_is_passed_over() -> None:
    losses = [2.0, 2.01] * 20
    losses[16:24] = [4.0] * 8
    assert alarms_at(losses) is None


def test_losses_that_are_no_numbers_are_a_divergence() -> None:
    trend = Trend()
    for round_, loss in enumerate([3.0] * 8 + [math.nan] * 16):
        trend.take(round_, loss)
    assert trend.is_rising
    assert "most losses of rounds 16-23 are not finite" in trend.warning
    # A few are not.
    assert alarms_at([3.0, 2.9, math.nan, 3.0] * 20) is None


def test_the_warning_says_where_and_what_to_do_and_ends_with_the_rise() -> None:
    trend, news, said = Trend(), TrendNews(), []
    losses = [5.0] * 8 + [4.0] * 8 + [4.5] * 8 + [6.0] * 24 + [3.9] * 24 + [6.0] * 24
    for round_, loss in enumerate(losses):
        trend.take(round_, loss)
        if (notice := news.next(trend)) is not None:
            said.append((round_, notice.code))
            if len(said) == 1:
                assert "rises: 6 in rounds 24-31, at best 4 in rounds 8-15" in notice.text
                assert "learning_rate" in notice.text
                assert "`peerturb tune`" in notice.text
                assert "`peerturb log export --until 16 --out FOLDER`" in notice.text
        assert bool(trend.warning) == trend.is_rising
    assert said == [(31, DIVERGING), (55, "recovered"), (87, DIVERGING)]


# --- machines -------------------------------------------------------------------------------------------------------


def notices(effects: Iterable[CoordinatorOutput | PeerOutput]) -> list[str]:
    return [effect.code for effect in effects if isinstance(effect, Notice)]


def diverging(round_: int) -> float:
    return 3.0 if round_ < 16 else 3.0 + 0.1 * (round_ - 15)


def test_the_coordinator_says_it_once_and_its_status_goes_on_saying_it() -> None:
    shell = CoordinatorShell(make_spec())
    shell.join(0)
    said = []
    for round_ in range(60):
        said += notices(shell.contribute(0, round_, loss=diverging(round_)))
    assert said.count(DIVERGING) == 1
    status = shell.machine.status(shell.now_ms)
    assert "rises" in status.warning
    wire = to_wire(
        status, counters=shell.machine.counters, chain=bytes(32), fault="", uptime_ms=0, with_keys=False
    )  # fmt: skip
    assert wire.warning == status.warning
    # A coordinator started again says it again, to whoever reads it now.
    again = CoordinatorShell(shell.spec)
    assert again.machine.status(0).warning == ""
    again.machine = type(shell.machine).from_records(shell.spec, shell.log)
    assert notices(again.perform([])).count(DIVERGING) == 1
    assert notices(again.perform([])) == []


def log_with(loss: Callable[[int], float]) -> list[Record]:
    """A run of 60 rounds with these losses."""
    return [
        replace(record, loss=loss(record.round)) if isinstance(record, RoundSealed) else record
        for record in make_log(60)
    ]


def test_a_node_says_it_at_the_head_of_the_log_and_not_while_it_catches_up() -> None:
    # 3 rises to 5, then lies low again: over by the time the node is there.
    log = log_with(lambda round_: diverging(round_) if round_ < 40 else 1.0)
    shell = PeerShell(log)
    assert DIVERGING not in notices(shell.join(len(log)))
    assert shell.machine.status.warning == ""

    log = log_with(diverging)
    shell = PeerShell(log)
    assert notices(shell.join(len(log))).count(DIVERGING) == 1
    assert "rises" in shell.machine.status.warning
