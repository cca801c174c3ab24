"""How long cards take for probes and for an update, with the sums. A card of the table: arithmetic on its peak figures.

It knows no networks and no peers.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from peerturb_node.doctor.machine import memory_needed
from peerturb_sim import amounts
from peerturb_sim.cards import Card
from peerturb_sim.factors import (
    CPU_EFFICIENCY_HALF,
    CPU_EFFICIENCY_SINGLE,
    CPU_UPDATE_RATE,
    GPU_EFFICIENCY,
    STEP_HALF,
    STEP_SINGLE,
    Factor,
)
from peerturb_sim.jobs import BYTES, Job

FORWARD_TOKENS = {"cpu": 4_096, "gpu": 65_536}
"""Tokens of one forward (`peerturb.zo.probe`, which would load torch): how often the weights are read at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A piece of work: how long it takes, and how that was found."""

    seconds: float
    sum: str


class Machine(Protocol):
    """What a plan asks of a card."""

    title: str
    watts: float | None
    memory_bytes: float
    factors: tuple[Factor, ...]
    """What its answers rest on."""
    source: str
    """Where its own figures come from; empty where nobody says."""

    def probing(self, job: Job, probes: int) -> Work:
        """Return the time of a contribution of so many probes."""

    def updating(self, job: Job, codes: int) -> Work:
        """Return the time of applying a round of so many codes, the digest included."""


def memory(job: Job) -> Work:
    """Return the bytes that a node needs, as `peerturb doctor` estimates them (in `seconds`' place)."""
    model = job.model
    tokens = job.spec.perturbation.side_count * job.tokens
    needed = memory_needed(job.weight_bytes, model.vocabulary, model.width, tokens=tokens)
    rest = needed - job.weight_bytes
    what = "program, update and activations" if model.width else "program and update, activations not known"
    return Work(seconds=needed, sum=f"{amounts.size(job.weight_bytes)} weights + {amounts.size(rest)} {what}")


class TableCard:
    """A card of the table.

    Args:
        card: its row.
        efficiency: part of the peak that forwards reach, instead of the factor.
    """

    def __init__(self, card: Card, efficiency: float | None = None) -> None:
        self._card = card
        self.title, self.source = card.title, card.source
        self.watts: float | None = card.watts
        self.memory_bytes = card.memory_gib * 2.0**30
        self._single = self._half = GPU_EFFICIENCY
        if card.kind == "cpu":
            self._single, self._half = CPU_EFFICIENCY_SINGLE, CPU_EFFICIENCY_HALF
        if efficiency is not None:
            self._single = self._half = Factor(value=efficiency, source="efficiency: --efficiency")
        self.factors: tuple[Factor, ...] = (*dict.fromkeys((self._single, self._half)), STEP_SINGLE, STEP_HALF)
        if card.kind == "cpu":
            self.factors = (*self.factors, CPU_UPDATE_RATE)

    def probing(self, job: Job, probes: int) -> Work:
        """Take 2 operations for each parameter and token, or the reading of all weights if that is longer."""
        card, model = self._card, job.model
        is_single = job.compute_dtype == "float32"
        peak = card.tflops_single if is_single else card.tflops_half
        step, efficiency = (STEP_SINGLE, self._single) if is_single else (STEP_HALF, self._half)
        passes = job.passes(probes)
        tokens = passes * job.tokens
        work = 2.0 * model.parameters * tokens
        computing = work / (peak * 1e12 * efficiency.value)
        forwards = math.ceil(tokens / FORWARD_TOKENS[card.kind])
        each = min(job.weight_bytes, model.parameters * BYTES[job.compute_dtype])
        reading = forwards * each / (card.bandwidth * 1e9)
        said = f"{passes:,} examples x {job.tokens} tokens x 2 x {amounts.many(model.parameters, 'parameters')}"
        if computing >= reading:
            said += f" = {amounts.many(work, 'FLOP')} / ({peak:g} TFLOP/s x {efficiency.value:g})"
        else:
            said = (
                f"{said.partition(' x 2 ')[0]}: {forwards} x {amounts.size(each)} of weights read at "
                f"{card.bandwidth:g} GB/s, longer than computing"
            )
        return Work(seconds=max(computing, reading) * step.value, sum=f"{said} x {step.value:g} (step)")

    def updating(self, job: Job, codes: int) -> Work:
        """Take one product of signs and codes, one pass that reads and writes the weights, and one for the digest."""
        card, trained = self._card, job.model.trained
        written = trained * BYTES[job.spec.model.dtype]
        passes = 3 * written / (card.bandwidth * 1e9)
        if card.kind == "cpu":
            rate = CPU_UPDATE_RATE.value * card.cores
            product = codes * trained / rate
            said = f"/ ({card.cores} cores x {amounts.many(CPU_UPDATE_RATE.value, '/s')})"
        else:
            rate = card.tflops_half * 1e12 * self._half.value
            product = 2.0 * codes * trained / rate
            said = f"x 2 / ({card.tflops_half:g} TFLOP/s x {self._half.value:g})"
        return Work(
            seconds=product + passes,
            sum=(
                f"{codes:,} codes x {amounts.many(trained, 'parameters')} {said} + 3 x {amounts.size(written)} / "
                f"{card.bandwidth:g} GB/s (read, write, digest)"
            ),
        )
