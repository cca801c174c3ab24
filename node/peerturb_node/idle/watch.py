"""Watches the machine beside a node and tells it to pause and to go on. A failing sensor never stops training."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from peerturb_node.events import Events
from peerturb_node.idle.rule import Rule, Thresholds
from peerturb_node.idle.sampling import CardLoad, CpuLoad, Machine
from peerturb_node.settings import NodeSettings

SAMPLE_S = 1.0
"""Seconds between samples; shorter where a threshold's time is."""


class Pausing(Protocol):
    """The part of a node that a watch needs."""

    def pause(self, reason: str, why: str) -> None:
        """Take no part until `resume`."""

    def resume(self, why: str) -> None:
        """Go on."""


@contextlib.asynccontextmanager
async def watched(node: Pausing, settings: NodeSettings, compute: object, events: Events) -> AsyncIterator[None]:
    """Watch for as long as the context lasts, if the settings say so.

    Args:
        node: is told.
        settings: whether to watch, and the thresholds.
        compute: the node's; its `device` says what to watch.
        events: hear of a sensor that fails.

    Raises:
        SpecError: what others do on the card cannot be told.
    """
    if not settings.idle:
        yield
        return
    thresholds = Thresholds(
        pause_percent=settings.idle_pause_percent,
        resume_percent=settings.idle_resume_percent,
        pause_s=settings.idle_pause_s,
        resume_s=settings.idle_resume_s,
    )
    machine = Machine(_load_of(getattr(compute, "device", None)))
    task = asyncio.create_task(_watch(node, machine, thresholds, events), name="idle watch")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        machine.load.close()


async def _watch(node: Pausing, machine: Machine, thresholds: Thresholds, events: Events) -> None:
    rule = Rule(thresholds)
    every_s = min(SAMPLE_S, thresholds.pause_s / 2, thresholds.resume_s / 2)
    while True:
        await asyncio.sleep(every_s)
        try:
            is_change = rule.take(machine.sample())
        except Exception as error:
            # Whatever the sensor's library raises, the run matters more: train on, and say so.
            events.emit("notice", code="idle_off", text=f"--idle is switched off, a sensor failed: {error}")
            node.resume("a sensor failed")
            return
        if is_change and rule.cause is not None:
            node.pause(rule.cause.reason, rule.cause.text)
        elif is_change:
            node.resume("the machine is idle")


def _load_of(device: Any) -> CpuLoad | CardLoad:
    if device is None or device.type != "cuda":
        return CpuLoad()
    import torch

    return CardLoad(str(torch.cuda.get_device_properties(device).uuid))
