"""When a node gives way to other work: the rule in numbers, and what is asked of the machine."""

import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb.errors import SpecError
from peerturb_node.idle.rule import Rule, Sample, Thresholds, cause_to_rest
from peerturb_node.idle.sampling import CpuLoad, Machine, on_battery
from peerturb_node.settings import NodeSettings, load
from tests.power_supply import power_supply

DEFAULT = Thresholds()


def second(percent: float, *, on_battery: bool = False, seconds: float = 1.0) -> Sample:
    return Sample(seconds=seconds, load=percent, where="cpu", on_battery=on_battery)


def states(samples: Sequence[Sample], thresholds: Thresholds = DEFAULT) -> list[bool]:
    """Whether the node is paused after each sample."""
    rule, found = Rule(thresholds), []
    for sample in samples:
        before = rule.cause is not None
        assert rule.take(sample) == ((rule.cause is not None) != before)
        found.append(rule.cause is not None)
    return found


def test_it_pauses_after_ten_busy_seconds_and_resumes_after_a_quiet_minute() -> None:
    paused = states([*[second(100.0)] * 30, *[second(0.0)] * 120])
    assert paused.index(True) == 9
    resumed = paused.index(False, 30)
    # The mean over the last minute is at most 10 % once 54 of its 60 seconds were quiet.
    assert resumed == 30 + 54 - 1
    assert not any(paused[resumed:])


def test_a_short_burst_does_not_matter() -> None:
    assert not any(states([*[second(2.0)] * 20, *[second(100.0)] * 1, *[second(2.0)] * 40]))


def test_a_load_between_the_thresholds_changes_nothing() -> None:
    assert not any(states([second(15.0)] * 300))
    assert all(states([*[second(100.0)] * 10, *[second(15.0)] * 300])[9:])


def test_a_load_around_one_threshold_does_not_flap() -> None:
    wobble = [second(35.0 if number % 2 else 0.0) for number in range(600)]
    assert sum(one != other for one, other in pairwise(states(wobble))) <= 1


def test_battery_pauses_at_once_and_mains_power_must_last() -> None:
    samples = [second(0.0)] * 3 + [second(0.0, on_battery=True)] * 5 + [second(0.0)] * 70
    paused = states(samples)
    assert paused.index(True) == 3
    assert paused.index(False, 4) == 8 + 60 - 1
    flapping = [second(0.0, on_battery=bool(number // 20 % 2)) for number in range(200)]
    assert all(states(flapping)[20:])


def test_reasons_say_what_and_how_much() -> None:
    battery = cause_to_rest([second(0.0, on_battery=True)], DEFAULT, is_paused=False)
    assert battery is not None
    assert (battery.reason, battery.text) == ("battery", "the computer runs on battery")
    card = cause_to_rest([Sample(seconds=10.0, load=63.4, where="card")], DEFAULT, is_paused=False)
    assert card is not None
    assert (card.reason, card.text) == ("card", "other processes use 63 % of the card")
    assert cause_to_rest([], DEFAULT, is_paused=False) is None


SAMPLES = st.lists(
    st.builds(second, st.floats(0, 100), on_battery=st.booleans(), seconds=st.floats(0.01, 100.0)), max_size=60
)


@given(SAMPLES)
def test_the_rule_over_time_is_the_pure_function_of_all_samples(samples: list[Sample]) -> None:
    rule, seen, is_paused = Rule(DEFAULT), [], False
    for sample in samples:
        seen.append(sample)
        is_paused = cause_to_rest(seen, DEFAULT, is_paused=is_paused) is not None
        rule.take(sample)
        assert (rule.cause is not None) == is_paused


@given(st.lists(st.booleans(), min_size=200, max_size=400))
def test_changes_are_never_nearer_than_the_rule_allows(busy: list[bool]) -> None:
    paused = states([second(100.0 if one else 0.0) for one in busy])
    begun = [number for number in range(1, len(paused)) if paused[number] and not paused[number - 1]]
    for number in begun:
        # Once paused it rests: a mean of 10 % over a minute cannot hold before 54 quiet seconds are in it.
        rest = paused[number : number + 45]
        assert all(rest)


class Times(NamedTuple):
    """Seconds as psutil tells them of all cores."""

    user: float
    system: float
    idle: float
    iowait: float
    guest: float


class Own(NamedTuple):
    user: float
    system: float
    children_user: float
    children_system: float


def test_own_work_and_waiting_are_not_counted_and_guests_not_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = iter([Times(100, 20, 500, 30, 50), Times(105, 21, 512, 32, 54), Times(105, 21, 512, 32, 54)])
    own = iter([Own(10, 1, 2, 0), Own(12, 1.5, 2.5, 0), Own(13, 1.5, 2.5, 0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(whole))
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _: next(own))
    load = CpuLoad()
    assert load.percent() == pytest.approx(100 * (6 - 3) / 20)  # 6 s busy of 20 s, 3 s of them ours
    assert load.percent() == 0.0  # no time has passed


def test_the_real_machine_answers_in_range() -> None:
    load = CpuLoad()
    end_s = time.process_time() + 0.1
    while time.process_time() < end_s:
        pass
    assert 0.0 <= load.percent() <= 100.0


def test_a_sample_covers_the_time_since_the_last() -> None:
    clock = iter([5.0, 6.5, 6.5, 9.0])
    machine = Machine(CpuLoad(), now_s=lambda: next(clock))
    samples = [machine.sample() for _ in range(3)]
    assert [sample.seconds for sample in samples] == [1.5, 0.0, 2.5]
    assert {sample.where for sample in samples} == {"cpu"}


@pytest.mark.skipif(not psutil.LINUX, reason="the battery is read from Linux's sysfs")
def test_the_battery_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psutil import _pslinux

    monkeypatch.setattr(_pslinux, "POWER_SUPPLY_PATH", str(tmp_path))
    assert not on_battery()  # none is there
    power_supply(tmp_path, online=True)
    assert not on_battery()
    power_supply(tmp_path, online=False)
    assert on_battery()


def test_thresholds_that_would_flap_are_refused() -> None:
    with pytest.raises(SpecError, match=r"idle_resume_percent \(30\) is not below idle_pause_percent \(20\)"):
        load({"coordinator": "127.0.0.1:1", "idle_resume_percent": 30.0})


def test_the_settings_defaults_are_the_rules() -> None:
    settings = NodeSettings(coordinator="127.0.0.1:1")
    found = (settings.idle_pause_percent, settings.idle_resume_percent, settings.idle_pause_s, settings.idle_resume_s)
    assert found == (DEFAULT.pause_percent, DEFAULT.resume_percent, DEFAULT.pause_s, DEFAULT.resume_s)


def test_a_card_without_the_drivers_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from peerturb_node.idle.sampling import CardLoad

    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SpecError, match=r"nvidia-ml-py.*peerturb\[idle\]"):
        CardLoad("0" * 8)


class FakeCard:
    """Answers like NVML: the samples since a time, or that there are none."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    def __init__(self, running: list[int]) -> None:
        self.samples: list[tuple[int, int, int]] = []
        self.running, self.is_open = running, False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, card: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.running]

    def nvmlDeviceGetProcessUtilization(self, card: str, since: int) -> list[SimpleNamespace]:
        rows = [SimpleNamespace(pid=pid, timeStamp=at, smUtil=used) for pid, at, used in self.samples if at > since]
        if not rows:
            raise self.NVMLError_NotFound
        return rows


def test_a_card_s_load_is_the_newest_sample_of_each_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from peerturb_node.idle.sampling import CardLoad

    card = FakeCard(running=[os.getpid(), 1])
    monkeypatch.setitem(sys.modules, "pynvml", card)
    load = CardLoad("0" * 8)
    assert load.percent() == 0
    card.samples = [(1, 20, 30), (1, 10, 90), (2, 15, 5), (os.getpid(), 20, 60)]
    assert load.percent() == 35
    assert load.percent() == 0, "samples count once"
    card.samples += [(1, 30, 80), (2, 30, 70)]
    assert load.percent() == 100
    load.close()
    assert not card.is_open


def test_a_card_that_hides_process_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peerturb_node.idle.sampling import CardLoad

    card = FakeCard(running=[1])
    monkeypatch.setitem(sys.modules, "pynvml", card)
    with pytest.raises(SpecError, match="--pid=host"):
        CardLoad("0" * 8)
    assert not card.is_open
