"""What the words of `peerturb sim plan` mean: lines by name or by numbers, cards looked up or measured."""

import math
import re

from peerturb.errors import SpecError
from peerturb_sim.cards import THIS, Card
from peerturb_sim.jobs import Job
from peerturb_sim.plan import Group, Line
from peerturb_sim.scenario import LINES
from peerturb_sim.speeds import Machine, TableCard

_LATENCY_MS = LINES["home"].latency_ms
"""Of a line that is given by its speed alone."""


def line_of(text: str, latency_ms: float | None, *, flag: str) -> Line:
    """Read a line: the name of a scenario's line, "DOWN/UP" in Mbit/s, or one number for both.

    Raises:
        SpecError: none of these, or not positive.
    """
    if text in LINES:
        known = LINES[text]
        latency = known.latency_ms if latency_ms is None else latency_ms
        return Line(down_mbit=known.down_mbit, up_mbit=known.up_mbit, latency_ms=latency)
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*(?:/\s*([\d.]+(?:e\d+)?)\s*)?", text)
    try:
        down, up = (float(part) for part in ((match[1], match[2] or match[1]) if match else ("", "")))
    except ValueError:
        raise SpecError(
            f"{flag} {text!r} is neither one of {', '.join(LINES)} nor DOWN/UP in Mbit/s, for instance 50/10"
        ) from None
    if not (0 < down < math.inf and 0 < up < math.inf):
        raise SpecError(f"{flag} {text!r}: a line needs a speed above 0 both ways")
    return Line(down_mbit=down, up_mbit=up, latency_ms=_LATENCY_MS if latency_ms is None else latency_ms)


def groups_of(
    job: Job, cards: dict[str, int], table: dict[str, Card], *, efficiency: float | None, watts: float | None,
    device: str, threads: int,
) -> list[Group]:  # fmt: skip
    """Make machines of card names; `this` loads the model.

    Raises:
        SpecError: the efficiency is not between 0 and 1, or `this` has no model to measure.
        ModelError: the model cannot be loaded or perturbed here.
    """
    if efficiency is not None and not 0 < efficiency <= 1:
        raise SpecError(f"--efficiency {efficiency:g} is no part of a card's peak: it lies above 0 and at most at 1")
    groups = []
    for name, count in cards.items():
        machine: Machine
        if name == THIS:
            if job.model.folder is None:
                raise SpecError(f"the card {THIS!r} is measured with the model itself: give its folder with --model")
            from peerturb_sim.measure import ThisMachine  # brings torch

            machine = ThisMachine(job, watts=watts, device=device, threads=threads)
        else:
            machine = TableCard(table[name], efficiency)
        groups.append(Group(name=name, count=count, machine=machine))
    return groups
