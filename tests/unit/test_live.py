"""What the live page is told: bounded history, everything once, then changes; what fails there harms nobody."""

import asyncio
import io
import json
import math
from itertools import pairwise
from typing import Any

import pytest

from peerturb.ids import PeerKey, RoundNumber, Slot
from peerturb.protocol.records import Evaluated, LeaveReason, PeerJoined, PeerLeft, Record, RoundOpened, RoundSealed
from peerturb_coordinator.events import Events
from peerturb_coordinator.live import broadcast
from peerturb_coordinator.live.broadcast import BEHIND_MAX, Broadcast
from peerturb_coordinator.live.history import EVENTS_MAX, POINTS_MAX, TIMELINE_MAX, History
from peerturb_coordinator.traffic import FRAMING_BYTES, Traffic
from peerturb_coordinator.watching import Watchers


def opened(number: int) -> RoundOpened:
    return RoundOpened(round=RoundNumber(number), scale=1.0, deadline_ms=1_000)


def sealed(number: int, *, loss: float = 1.0, codes: int = 4) -> RoundSealed:
    return RoundSealed(
        round=RoundNumber(number), alpha=0.1, loss=loss, digest=7, slots=(Slot(0), Slot(3)), counts=(1, codes - 1),
        codes=bytes(codes),
    )  # fmt: skip


def test_rounds_of_an_earlier_process_have_no_times() -> None:
    history = History()
    history.hear(opened(0))
    history.hear(sealed(0, loss=math.nan))
    history.hear(opened(1), now_ms=5_000)
    history.hear(sealed(1, codes=6), now_ms=5_250, at_s=1e9, reason="deadline")
    assert history.curve.rows() == [[0, None, 4, 2, None, ""], [1, 1.0, 6, 2, 250, "deadline"]]
    assert (history.rounds, history.codes, history.codes_sent) == (2, 6, 12)


def test_a_long_run_stays_small_and_keeps_its_ends() -> None:
    history, rounds = History(), 5 * POINTS_MAX + 3
    for number in range(rounds):
        history.hear(opened(number), now_ms=100 * number)
        history.hear(sealed(number, loss=float(number)), now_ms=100 * number + 40, reason="everyone")
        history.hear(Evaluated(round=RoundNumber(number), slot=Slot(0), loss=2.0, accuracy=None, examples=1))
    rows = history.curve.rows()
    assert POINTS_MAX / 2 <= len(rows) <= POINTS_MAX
    assert rows[-1][0] == rounds - 1
    strides = {after[0] - before[0] for before, after in pairwise(rows[:-1])}
    assert len(strides) == 1, "all points but the last stand for equally many rounds"
    stride = strides.pop()
    assert rows[0][:2] == [stride - 1, (stride - 1) / 2], "the mean of its rounds"
    assert {row[4] for row in rows} == {40}
    assert [one.round for one in history.timeline] == list(range(rounds - TIMELINE_MAX, rounds))
    assert len(history.evaluations) < POINTS_MAX
    assert history.evaluations[0][0] == 0
    assert history.evaluations[-1][0] == rounds - 1, "the metrics' newest one"
    assert history.evaluations_seen == rounds


def test_members_come_and_go_by_name() -> None:
    history = History()
    history.hear(PeerJoined(slot=Slot(0), key=PeerKey(bytes(32)), name="ann"), at_s=1.0)
    history.hear(PeerLeft(slot=Slot(0), reason=LeaveReason.LEASE_EXPIRED), at_s=2.0)
    history.hear(PeerJoined(slot=Slot(0), key=PeerKey(bytes(32)), name="ann"), at_s=3.0)
    history.stand(Slot(0), is_there=False, at_s=4.0)
    history.stand(Slot(0), is_there=True, at_s=5.0)
    told = ["joined", "lease expired", "came back", "is away", "is back"]
    assert [row[2] for row in history.events] == told
    assert {tuple(row[3:]) for row in history.events} == {(0, "ann")}
    for slot in range(200):
        history.hear(PeerJoined(slot=Slot(slot), key=PeerKey(bytes(32)), name=""))
    assert len(history.events) == EVENTS_MAX
    assert history.events_seen == 205


class View:
    """Stands for what is told."""

    def __init__(self) -> None:
        self.number = 0
        self.fails = False

    def everything(self) -> dict[str, Any]:
        return {"number": self.number}

    def changes(self) -> dict[str, Any]:
        if self.fails:
            raise ZeroDivisionError
        rows: dict[str, list[Any]] = {key: [] for key in ("evaluations", "events", "peers")}
        return {"now": {"number": self.number, "uptime_s": 0}, "timeline": [], **rows}


def told(event: bytes) -> tuple[str, Any]:
    name, data, *_ = event.decode().splitlines()
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_a_watcher_is_told_everything_then_changes_and_nothing_twice() -> None:
    view, failures = View(), list[Exception]()
    news = Broadcast(view, on_failure=failures.append, every_s=0.005)  # type: ignore[arg-type]
    watching = news.watch()
    assert told(await anext(watching)) == ("everything", {"number": 0})
    view.number = 1
    name, changes = told(await anext(watching))
    assert (name, changes["now"]["number"]) == ("changes", 1)
    quiet = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0.05)
    assert not quiet.done(), "nothing has changed, so nothing is said"
    view.number = 2
    assert told(await quiet)[1]["now"]["number"] == 2
    await news.close()
    with pytest.raises(StopAsyncIteration):
        await anext(watching)
    assert failures == []


async def test_who_does_not_read_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View()
    news = Broadcast(view, on_failure=lambda error: None, every_s=0.001)  # type: ignore[arg-type]
    monkeypatch.setattr(broadcast, "WATCHERS_MAX", 1)
    watching = news.watch()
    await anext(watching)
    full = [news.is_full]
    while full[-1]:
        view.number += 1
        full.append(news.is_full)
        await asyncio.sleep(0.002)
    got = [told(event)[1]["now"]["number"] async for event in watching]
    assert len(got) == BEHIND_MAX
    assert got == sorted(got)
    await news.close()


async def test_a_page_that_fails_lets_its_watchers_go_and_begins_anew() -> None:
    view, failures = View(), list[Exception]()
    news = Broadcast(view, on_failure=failures.append, every_s=0.001)  # type: ignore[arg-type]
    watching = news.watch()
    await anext(watching)
    view.fails = True
    with pytest.raises(StopAsyncIteration):
        await anext(watching)
    assert [type(error) for error in failures] == [ZeroDivisionError]
    view.fails = False
    again = news.watch()
    assert told(await anext(again))[0] == "everything"
    await news.close()


def test_a_monitor_that_fails_is_told_once_and_heard_no_more() -> None:
    stream, heard, stood = io.StringIO(), list[Record](), list[Slot]()

    class Broken:
        def hear(self, record: Record, **_: object) -> None:
            raise ZeroDivisionError("on purpose")

        def stand(self, slot: Slot, **_: object) -> None:
            pytest.fail("it is heard no more")

    class Sound:
        def hear(self, record: Record, **_: object) -> None:
            heard.append(record)

        def stand(self, slot: Slot, **_: object) -> None:
            stood.append(slot)

    watchers = Watchers(Events(stream, as_json=True))
    watchers.add(Broken())
    watchers.add(Sound())
    for number in range(3):
        watchers.hear(opened(number), now_ms=0, at_s=0.0, reason="")
    watchers.stand(Slot(5), is_there=False, at_s=0.0)
    assert len(heard) == 3
    assert stood == [Slot(5)]
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "monitor_failed"
    assert json.loads(line)["monitor"] == "Broken"


def test_traffic_counts_messages_and_their_framing() -> None:
    traffic = Traffic()
    assert set(traffic.bytes.values()) == set(traffic.messages.values()) == {0}, "series begin at nothing"
    assert len(traffic.bytes) == len(traffic.messages) == 7
    traffic.count("up", "contribution", 100)
    traffic.count("up", "hello", 10)
    traffic.count("down", "records", 1_000)
    assert traffic.total("up") == 110 + 2 * FRAMING_BYTES
    assert traffic.bytes["down", "records"] == 1_000 + FRAMING_BYTES
    assert traffic.messages["up", "contribution"] == 1
