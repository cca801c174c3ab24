"""How the run goes, told every few seconds: a line that renews itself on a terminal, events elsewhere.

It reads the runner's status and changes nothing.
"""

import asyncio
import contextlib
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peerturb_coordinator.events import Events
from peerturb_coordinator.runner import Runner

if TYPE_CHECKING:
    from rich.live import Live

_REFRESH_S = 0.5


@contextlib.contextmanager
def live_line(*, is_wanted: bool) -> Iterator["Live | None"]:
    """Own the bottom line of the terminal; print events above it. None where there is no terminal."""
    if not (is_wanted and sys.stdout.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    # No refresh thread: the event loop renews the line, and nothing else writes to the terminal. Soft wrap: a join
    # command must survive copying.
    with Live(console=Console(soft_wrap=True), auto_refresh=False, transient=True) as live:
        yield live


async def report(runner: Runner, events: Events, live: "Live | None", *, every_s: float) -> None:
    """Say again and again how the run goes, until cancelled."""
    if live is None:
        await _report_events(runner, events, every_s)
    else:
        await _report_line(runner, live)


async def _report_events(runner: Runner, events: Events, every_s: float) -> None:
    """Write an event every few seconds, if anything changed."""
    loop = asyncio.get_running_loop()
    last: dict[str, Any] = {}
    last_round, last_s = runner.status().round, loop.time()
    while True:
        await asyncio.sleep(every_s)
        status, now_s = runner.status(), loop.time()
        is_moving = status.round > last_round
        fields: dict[str, Any] = {
            "round": status.round,
            "loss": round(status.loss, 6) if math.isfinite(status.loss) else None,
            "connected": status.connected,
            "probes": status.probes,
            "waiting_for": runner.fault or ("" if is_moving or status.is_finished else status.waiting_for),
        }
        if fields != last:
            pace = (status.round - last_round) / (now_s - last_s)
            events.info("progress", **fields, rounds_per_s=round(pace, 2))
        last, last_round, last_s = fields, status.round, now_s


async def _report_line(runner: Runner, live: "Live") -> None:
    """Renew the line twice a second."""
    from rich.text import Text

    loop = asyncio.get_running_loop()
    first_round, first_s = runner.status().round, loop.time()
    while True:
        status = runner.status()
        pace = (status.round - first_round) / max(loop.time() - first_s, _REFRESH_S)
        loss = f"{status.loss:.4f}" if math.isfinite(status.loss) else "-"
        line = Text.assemble(
            ("round ", "dim"), (str(status.round), "bold"),
            ("  loss ", "dim"), loss,
            ("  peers ", "dim"), str(status.connected),
            ("  probes ", "dim"), f"{status.probes:,}",
            ("  rounds/s ", "dim"), f"{pace:.1f}  ",
            (runner.fault, "bold red") if runner.fault else (status.waiting_for, "dim"),
        )  # fmt: skip
        line.truncate(max(live.console.width - 1, 1), overflow="ellipsis")
        live.update(line, refresh=True)
        await asyncio.sleep(_REFRESH_S)
