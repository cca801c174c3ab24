"""Measure probes: draw the round's examples, evaluate the sides of every perturbation, encode the bytes.

Samples are measured in micro-batches; the caller's `should_stop` is asked between them, so a contribution ends when its
time is over. Knows the RunSpec and the node's data, but no clock and no network.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from peerturb.codec import encode, rounding_noise
from peerturb.errors import ObjectiveError
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import RunSpec
from peerturb.zo import fast
from peerturb.zo.batch import Evaluator, Size
from peerturb.zo.coverage import SlowWarning, slowness_of
from peerturb.zo.data import Draw
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.factors import PagedSigns, Pages
from peerturb.zo.families import FAMILIES
from peerturb.zo.packing import Units, cheapest_cuts
from peerturb.zo.perturbation import Signs
from peerturb.zo.room import Room
from peerturb.zo.written import written_losses

Item = TypeVar("Item")
Forward = Callable[..., NDArray[np.float64]]
"""(units, epsilon=...) -> [units, sides] summed losses, for one round and slot."""

FORWARD_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens in one forward by device type: enough to feed the cores, few enough for activations to stay in cache. Fewer
where memory is short (`peerturb.zo.room`)."""

CUT_TOKENS = {"cpu": 256, "cuda": 4_096}
"""What a forward costs however little it computes, in tokens: units are cut into more micro-batches, of more alike
lengths, as long as the padding this saves is more."""

OUTPUT_BYTES_MAX = {"cpu": 2**26, "cuda": 2**32}
"""Largest output of one forward: the logits of a small model with a large vocabulary outweigh its activations."""

PAGE_BYTES = {"compiled": 2**19, "cpu": 2**27, "cuda": 2**27}
"""Signs of a micro-batch that are made in one pass, about. Without compiled loops few passes are several times faster
than many; with them a page need only outweigh its calls, and large models keep the memory."""

WINDOW = 4
"""Micro-batches over which units are sorted by length when a contribution may be cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Losses of samples 0..n-1 of one contribution."""

    plus: NDArray[np.float64]
    """L(theta + epsilon z): [n]; NaN or infinite where the model broke down."""
    reference: NDArray[np.float64]
    """What `plus` is compared with: L(theta - epsilon z), or one-sided the clean loss L(theta) that all share: [n]."""
    tokens: int
    """Tokens of the examples, padding not counted: every side, and the clean loss, counted; an example with several
    labels is counted once."""

    @property
    def loss(self) -> float:
        """Mean of the finite losses; NaN without any."""
        both = np.concatenate([self.plus, self.reference])
        finite = both[np.isfinite(both)]
        return float(finite.mean()) if finite.size else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a peer contributes to a round."""

    codes: NDArray[np.int8]
    """One byte for each sample 0..n-1."""
    loss: float
    """Mean training loss over the contribution's examples; see `Measurement.loss`."""
    tokens: int


def encoded(
    gradients: NDArray[np.float64], spec: RunSpec, round_number: RoundNumber, *, slot: Slot, scale: float
) -> NDArray[np.int8]:
    """Return the codes of samples 0..n-1 from their projected gradients, rounded as the run says."""
    rounding, noise = spec.perturbation.rounding, None
    if rounding == "stochastic":
        samples = np.arange(len(gradients), dtype=np.uint64)
        noise = rounding_noise(run_key=spec.run_key, slot=slot, round=round_number, samples=samples)
    return encode(gradients, scale, rounding=rounding, noise=noise)


class ProbeEngine(Generic[Item]):
    """A model with its objective, a node's private examples and the rules of a run.

    Args:
        evaluator: a `peerturb.zo.batch.Runner`, or what else gives losses; weights are read, never written.
        items: the node's examples, as the evaluator takes them (for a `Runner` what `Objective.load` returns).
        rows_max: most rows in one forward; by default chosen from device, length of examples, size of outputs and free
            memory. Where memory runs out there are fewer.

    Raises:
        ModelError: the engine cannot perturb some parameter; see `peerturb.zo.coverage`. One that it cannot follow for
            all rows at once is no error but a warning: each side of each probe is then measured by itself.
        DataError: fewer examples than one probe needs.
        ObjectiveError: `rows_max` is below 1, or less than a probe's examples need that are judged together.
    """

    def __init__(
        self, evaluator: Evaluator[Item], spec: RunSpec, items: Sequence[Item], *, rows_max: int | None = None
    ) -> None:
        if rows_max is not None and rows_max < 1:
            raise ObjectiveError(f"rows_max is {rows_max}; give 1 or more, or None to let memory and device choose")
        self.slowness = slowness_of(evaluator, spec.perturbation.family, sides=spec.perturbation.side_count)
        """Why losses are measured one probe and side at a time, and what to do about it; None: they are not."""
        if self.slowness is not None:
            warnings.warn(self.slowness, SlowWarning, stacklevel=2)
        self._is_followed = self.slowness is None
        self.spec = spec
        self.evaluator = evaluator
        self.items = items
        self._kind = "cuda" if evaluator.device.type == "cuda" else "cpu"
        copies = 0 if self._is_followed else sum(t.numel() * t.element_size() for _, t in evaluator.parameters)
        self._room = Room(evaluator, family=spec.perturbation.family, is_planned=rows_max is None, besides=copies)
        sizes = [evaluator.size(item) for item in items]
        self._rows_each = max((size.rows for size in sizes), default=1)
        self._lengths = np.array([size.tokens for size in sizes], np.int64)
        self._row_bytes = np.array([self._room.row_bytes(size) for size in sizes], np.int64)
        self._rows_max = np.array([rows_max or self._fed(size) for size in sizes], np.int64)
        """Rows as long as those of each item that a forward may have, if memory is no limit."""
        self._pages = lru_cache(maxsize=4)(partial(Pages, [entry for entry, _ in evaluator.parameters]))
        self._draw: tuple[Slot, Draw] | None = None
        self._draw_for(Slot(0))
        per_probe = spec.objective.examples_per_probe
        rows = self._rows(per_probe)
        if evaluator.is_whole and rows_max is not None and rows > rows_max:
            raise ObjectiveError(
                f"the {per_probe} examples of a probe are judged together, in one forward of {rows} rows, and rows_max "
                f"is {rows_max}: raise rows_max, or lower objective.examples_per_probe"
            )

    def contribute(
        self,
        round_number: RoundNumber,
        *,
        slot: Slot,
        scale: float,
        count: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ProbeResult:
        """Measure up to `count` samples (by default the RunSpec's most) and encode their projected gradients.

        The micro-batch of sample 0 is measured, whatever `should_stop` says.
        """
        measured = self.measure(round_number, slot=slot, count=count, should_stop=should_stop)
        codes = encoded(self.projected_gradients(measured), self.spec, round_number, slot=slot, scale=scale)
        return ProbeResult(codes=codes, loss=measured.loss, tokens=measured.tokens)

    def projected_gradients(self, measured: Measurement) -> NDArray[np.float64]:
        """Return g = (L+ - L-) / (2 epsilon), one-sided (L+ - L) / epsilon: [n]; not finite where a loss is not."""
        rules = self.spec.perturbation
        with np.errstate(invalid="ignore"):
            gradients: NDArray[np.float64] = (measured.plus - measured.reference) / (rules.side_count * rules.epsilon)
        return gradients

    def measure(
        self,
        round_number: RoundNumber,
        *,
        slot: Slot,
        count: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Measurement:
        """Measure samples 0..count-1, or as many of them as there is time for.

        Raises:
            ModelError: memory runs out in the smallest forward there is.
        """
        self._room.look()
        count = self.spec.round.probes_max if count is None else count
        sides, per_probe = self.spec.perturbation.side_count, self.spec.objective.examples_per_probe
        drawn = self.drawn(round_number, slot, count)
        forward = partial(self._forward, round_number, slot)
        sums = np.zeros((count, 2))
        missing = np.full(count, per_probe)
        tokens = 0
        if self._is_shared:
            sums[:, 1], tokens = self._clean(forward, drawn)
        for units in self.micro_batches(drawn):
            if not missing[0] and should_stop():
                break
            np.add.at(sums[:, :sides], units.samples, self._sums(forward, units))
            np.subtract.at(missing, units.samples, units.together)
            tokens += sides * self._tokens(units)
        # Units of a window are measured by length: keep the samples before the first that is not complete.
        done = int(np.argmax(missing > 0)) if missing.any() else count
        losses = sums[:done] / per_probe
        return Measurement(plus=losses[:, 0], reference=losses[:, 1], tokens=tokens)

    def _clean(self, forward: Forward, drawn: NDArray[np.int64]) -> tuple[float, int]:
        """Return the summed losses of the weights as they are, on the examples that all samples share, and the tokens.

        Measured as sample 0 with epsilon 0: the same operations round alike, and their difference is the noise alone.
        """
        total, tokens = 0.0, 0
        for units in self.micro_batches(drawn[:1]):
            total += float(self._sums(partial(forward, epsilon=0.0), units).sum())
            tokens += self._tokens(units)
        return total, tokens

    def _tokens(self, units: Units) -> int:
        """Tokens of these examples, each read once."""
        return int(self._lengths[units.examples].sum())

    def _sums(self, forward: Forward, units: Units) -> NDArray[np.float64]:
        """Return [units, sides] summed losses. Where memory runs out the micro-batch is halved, and so are later ones.

        Raises:
            ModelError: memory runs out in the smallest forward there is.
        """
        rows = len(units) * self._rows(units.together)
        is_smallest = len(units) == 1 and (units.together == 1 or self.evaluator.is_whole)
        can_share = self._is_followed or len(units) == 1
        # A micro-batch that was made before memory ran out may be too large by now.
        if is_smallest or (can_share and rows <= self._limit(units.examples)):
            sums = self._room.attempt(
                partial(forward, units),
                rows=rows,
                row_bytes=int(self._row_bytes[units.examples].max()),
                tokens=int(self._lengths[units.examples].max()),
                is_smallest=is_smallest,
            )
            if sums is not None:
                return sums
        first, second = (self._sums(forward, part) for part in units.halves())
        return first + second if len(units) == 1 else np.concatenate([first, second])

    def _forward(
        self, round_number: RoundNumber, slot: Slot, units: Units, *, epsilon: float | None = None
    ) -> NDArray[np.float64]:
        """Return [units, sides] summed losses, at the run's epsilon unless another is given."""
        evaluator, rules = self.evaluator, self.spec.perturbation
        probes = Probes.of(run_key=self.spec.run_key, round=round_number, slots=slot, samples=units.samples)
        perturbation = FAMILIES[rules.family](
            self._signs(probes),
            probes=len(units),
            epsilon=rules.epsilon if epsilon is None else epsilon,
            dtype=evaluator.dtype,
            device=evaluator.device,
            sides=rules.side_count,
        )
        if self._is_shared:  # all that is compared with one clean loss draws alike
            perturbation.draw_key = f"{self.spec.run_key} {round_number} {slot}".encode()
        perturbation.places = units.places
        items = [self.items[index] for index in units.examples.flatten().tolist()]
        measure = evaluator.losses if self._is_followed else partial(written_losses, evaluator)
        sums: NDArray[np.float64] = measure(items, perturbation).sum(2).cpu().numpy()
        return sums

    def _signs(self, probes: Probes) -> Signs:
        """Return where a micro-batch's signs come from."""
        device = self.evaluator.device
        if self.spec.perturbation.family != "rank1":
            return Directions(probes, device)
        kind = "compiled" if self._kind == "cpu" and fast.compiled() else self._kind
        # Powers of two: micro-batches of nearly equal size share a layout.
        columns_max = PAGE_BYTES[kind] >> (len(probes) - 1).bit_length()
        return PagedSigns(self._pages(columns_max), probes, device)

    def micro_batches(self, drawn: NDArray[np.int64]) -> Iterator[Units]:
        """Yield units of similar length whose rows fit one forward, such that all examples of all samples are covered.

        Args:
            drawn: [samples, examples per probe] numbers of examples, as `drawn` returns them.
        """
        if not self._is_followed:
            yield from (
                Units.of(drawn[sample : sample + 1], first=sample, is_whole=True) for sample in range(len(drawn))
            )
            return
        limit = self._limit(drawn)
        is_whole = self._is_whole(limit)
        typical = max(1, limit // self._rows(drawn.shape[1]))
        window = len(drawn) if self.spec.round.budget_ms == 0 else WINDOW * typical
        for first in range(0, len(drawn), window):
            units = Units.of(drawn[first : first + window], first=first, is_whole=is_whole)
            lengths, rows = self._lengths[units.examples].max(1), self._rows(units.together)
            order = np.argsort(-lengths, kind="stable")
            units, lengths = units.take(order), lengths[order]
            most = np.maximum(1, self._limits(units.examples) // rows)
            cuts = cheapest_cuts(lengths, most, rows=rows, cut_tokens=CUT_TOKENS[self._kind])
            # Only what reaches from sample 0 on without a gap counts: the group with the lowest sample comes first.
            yield from sorted((units.take(cut) for cut in cuts), key=lambda group: int(group.samples.min()))

    def _is_whole(self, limit: int) -> bool:
        """True if a probe's examples stay in one forward.

        One by one they can be sorted by length, so that less is padded; each then has its signs made for itself, which
        is little in `rank1` and most of the work in `dense`.
        """
        is_padded = int(self._lengths.min()) < int(self._lengths.max())
        is_cheap_apart = self.spec.perturbation.family == "rank1"
        fits = self._rows(self.spec.objective.examples_per_probe) <= limit
        return self.evaluator.is_whole or (fits and not (is_padded and is_cheap_apart))

    def _rows(self, examples: int) -> int:
        """Rows of so many examples in a forward: on all sides, or on one where they are measured one by one."""
        return (self.spec.perturbation.side_count if self._is_followed else 1) * examples * self._rows_each

    def _limit(self, examples: NDArray[np.int64]) -> int:
        """Rows as large as the largest of these examples that may share a forward."""
        return int(self._limits(examples.reshape(1, -1))[0])

    def _limits(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for each unit: [units] of [units, examples]."""
        limits: NDArray[np.int64] = np.minimum(
            self._rows_max[examples].min(1), self._room.rows(self._row_bytes[examples].max(1))
        )
        return limits

    def _fed(self, size: Size) -> int:
        """Rows that feed the device."""
        return max(
            1, min(FORWARD_TOKENS[self._kind] // size.tokens, OUTPUT_BYTES_MAX[self._kind] // (4 * size.outputs))
        )

    def drawn(self, round_number: RoundNumber, slot: Slot, count: int) -> NDArray[np.int64]:
        """Return the examples of samples 0..count-1 of a round, by number: [count, examples per probe]; one-sided
        those of sample 0 for all of them."""
        draw = self._draw_for(slot)
        drawn = [draw.indices(int(round_number), sample) for sample in range(1 if self._is_shared else count)]
        return np.array(drawn * count if self._is_shared else drawn, np.int64)

    @property
    def _is_shared(self) -> bool:
        """True if all samples of a contribution see the same examples: those of their one clean loss."""
        return self.spec.perturbation.sides == "one"

    def _draw_for(self, slot: Slot) -> Draw:
        if self._draw is None or self._draw[0] != slot:
            draw = Draw(
                run_key=self.spec.run_key,
                slot=slot,
                total=len(self.items),
                per_probe=self.spec.objective.examples_per_probe,
                probes_max=1 if self._is_shared else self.spec.round.probes_max,
            )
            self._draw = (slot, draw)
        return self._draw[1]
