"""`peerturb bench sim`: the stopwatch counts each moment once, and the parts of the time make the whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peerturb_bench import sim
from peerturb_bench.sim import PARTS, Stopwatch
from peerturb_bench.simulated import crowd
from tests.simulation.real_small import real_section


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


def test_time_inside_another_call_counts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(sim, "time", clock)
    watch = Stopwatch()

    def spend(seconds: float) -> float:
        clock.now_s += seconds
        return seconds

    forward: Callable[[float], float] = watch.around("forward", spend)

    def probe() -> float:
        spend(1.0)
        forward(10.0)
        with pytest.raises(ZeroDivisionError):
            watch.around("update", lambda: spend(3.0) / 0)()
        return forward(20.0) + spend(2.0)

    assert watch.around("probe", probe)() == 22.0
    spend(100.0)
    assert watch.seconds == {"forward": 30.0, "probe": 3.0, "update": 3.0, "digest": 0.0}


def test_parts_make_the_whole(tmp_path: Path) -> None:
    section = real_section(tmp_path)
    objective = {"kind": "text", "template": "{text}", "tokens_max": 16}
    files = (Path(section.data[0]), Path(section.eval))
    scenario = crowd(Path(section.model), files, peers=3, probes=2, rounds=3, rate=1e-3, objective=objective)
    rows = sim._in_process(scenario, tmp_path, 1)
    assert len(rows) == len(PARTS) + 1
    shares = [row.value for row in rows if row.value is not None]
    assert sum(shares) == pytest.approx(1.0)
    assert all(share > 0 for share in shares)
    assert rows[0].ratio == pytest.approx(shares[0] / sim.WANTED)
