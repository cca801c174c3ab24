"""Signals to a node: leave, end at once, wait for what is being written."""

import asyncio
import os
import signal
from typing import Any

import pytest

from peerturb_node.events import Event, Events
from peerturb_node.stopping import StopSignals


class Node:
    """Remembers why it was asked to leave."""

    def __init__(self) -> None:
        self.is_leaving = False
        self.asked: list[str] = []
        self.has_been_asked = asyncio.Event()

    def leave(self, why: str) -> None:
        self.is_leaving = True
        self.asked.append(why)
        self.has_been_asked.set()


class Sink:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


class Ended(Exception):
    """Stands for the end of the process."""


def signals_of(node: Node, sink: Sink) -> StopSignals:
    def end(code: int) -> Any:
        raise Ended(code)

    return StopSignals(node, Events(sink), end=end)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_leaves_and_the_second_ends(first: signal.Signals, second: signal.Signals) -> None:
    node = Node()
    sink = Sink()
    signals = signals_of(node, sink)
    signals.on_signal(first)
    assert node.asked == [f"asked to stop ({first.name})"]
    assert not sink.is_closed
    with pytest.raises(Ended, match=str(128 + second)):
        signals.on_signal(second)
    assert len(node.asked) == 1
    assert sink.is_closed  # a live view gives the terminal back first


def test_a_wish_to_stop_is_handed_on_to_the_next_node() -> None:
    """A signal between two nodes reaches the first, which has ended already and does nothing about it."""
    first, second = Node(), Node()
    signals = signals_of(first, Sink())
    signals.on_signal(signal.SIGTERM)
    signals.hand_on(second)
    assert second.is_leaving
    assert second.asked[0].startswith("asked to stop")
    with pytest.raises(Ended):
        signals.on_signal(signal.SIGTERM)


def test_a_node_that_takes_over_in_peace_is_not_asked_to_stop() -> None:
    first, second = Node(), Node()
    signals = signals_of(first, Sink())
    signals.hand_on(second)
    assert not second.is_leaving
    signals.on_signal(signal.SIGINT)
    assert (first.asked, second.asked) == ([], ["asked to stop (SIGINT)"])


@pytest.mark.parametrize("is_leaving", [False, True])
def test_sigterm_waits_for_what_is_being_written(is_leaving: bool) -> None:
    node, sink = Node(), Sink()
    node.is_leaving = is_leaving
    signals = signals_of(node, sink)
    with signals.held_off("the model is written"):
        for _ in range(3):
            signals.on_signal(signal.SIGTERM)
    assert not node.asked
    assert [event["text"] for event in sink.events] == ["SIGTERM: the node ends once the model is written"] * 3


def test_a_second_ctrl_c_ends_what_is_being_written() -> None:
    sink = Sink()
    signals = signals_of(Node(), sink)
    with signals.held_off("the model is written"):
        signals.on_signal(signal.SIGTERM)
        signals.on_signal(signal.SIGINT)
        assert "a second one ends it" in sink.events[-1]["text"]
        with pytest.raises(Ended, match="130"):
            signals.on_signal(signal.SIGINT)


def test_what_is_written_holds_nothing_off_afterwards() -> None:
    node = Node()
    signals = signals_of(node, Sink())
    with pytest.raises(RuntimeError), signals.held_off("the model is written"):
        raise RuntimeError
    signals.on_signal(signal.SIGTERM)
    assert node.is_leaving


async def test_the_signals_of_the_process_arrive() -> None:
    node = Node()
    signals = signals_of(node, Sink())
    loop = asyncio.get_running_loop()
    signals.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(node.has_been_asked.wait(), 20)
        assert node.is_leaving
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
