"""Measure probes: draw the round's examples, evaluate the sides of every perturbation, encode the bytes.

Samples are measured in micro-batches; the caller's `should_stop` is asked between them, so a contribution ends when its
time is over. Knows the RunSpec and the node's data, but no clock and no network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from peerturb.codec import encode, rounding_noise
from peerturb.ids import RoundNumber, Slot
from peerturb.spec import RunSpec
from peerturb.zo import fast
from peerturb.zo.batch import Evaluator
from peerturb.zo.coverage import can_follow
from peerturb.zo.data import Draw
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.factors import PagedSigns, Pages
from peerturb.zo.perturbation import FAMILIES, Signs
from peerturb.zo.written import written_losses

Item = TypeVar("Item")

FORWARD_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens in one forward by device type: enough to feed the cores, few enough for activations to stay in cache."""

CUT_TOKENS = {"cpu": 256, "cuda": 4_096}
"""What a forward costs however little it computes, in tokens: samples are cut into more micro-batches, of more alike
lengths, as long as the padding this saves is more."""

OUTPUT_BYTES_MAX = {"cpu": 2**26, "cuda": 2**30}
"""Largest output of one forward: the logits of a small model with a large vocabulary outweigh its activations."""

PAGE_BYTES = {"compiled": 2**19, "cpu": 2**27, "cuda": 2**27}
"""Signs of a micro-batch that are made in one pass, about. Without compiled loops few passes are several times faster
than many; with them a page need only outweigh its calls, and large models keep the memory."""

WINDOW = 4
"""Micro-batches over which samples are sorted by length when a contribution may be cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Losses of samples 0..n-1 of one contribution."""

    plus: NDArray[np.float64]
    """L(theta + epsilon z): [n]; NaN or infinite where the model broke down."""
    reference: NDArray[np.float64]
    """What `plus` is compared with: L(theta - epsilon z), or one-sided the clean loss L(theta) that all share: [n]."""
    tokens: int
    """Tokens read by the model, padding not counted: every side, and the clean loss, counted."""

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


class ProbeEngine(Generic[Item]):
    """A model with its objective, a node's private examples and the rules of a run.

    Args:
        evaluator: a `peerturb.zo.batch.Runner`, or what else gives losses; weights are read, never written.
        items: the node's examples, as the evaluator takes them (for a `Runner` what `Objective.load` returns).
        rows_max: most rows in one forward; by default chosen from device, length of examples and size of outputs.

    Raises:
        ModelError: the engine cannot perturb some parameter; see `peerturb.zo.coverage`. One that it cannot follow for
            all rows at once is no error but a warning: each side of each probe is then measured by itself.
        DataError: fewer examples than one probe needs.
    """

    def __init__(
        self, evaluator: Evaluator[Item], spec: RunSpec, items: Sequence[Item], *, rows_max: int | None = None
    ) -> None:
        self._is_followed = can_follow(evaluator, spec.perturbation.family, sides=spec.perturbation.side_count)
        self.spec = spec
        self.evaluator = evaluator
        self.items = items
        self.rows_max = rows_max
        self._sizes = [evaluator.size(item) for item in items]
        self._lengths = np.array([size.tokens for size in self._sizes], np.int64)
        self._outputs = np.array([size.outputs for size in self._sizes], np.int64)
        self._pages = lru_cache(maxsize=4)(partial(Pages, [entry for entry, _ in evaluator.parameters]))
        self._draw: tuple[Slot, Draw] | None = None
        self._draw_for(Slot(0))

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
        gradients = self.projected_gradients(measured)
        rounding = self.spec.perturbation.rounding
        noise = None
        if rounding == "stochastic":
            samples = np.arange(len(gradients), dtype=np.uint64)
            noise = rounding_noise(run_key=self.spec.run_key, slot=slot, round=round_number, samples=samples)
        codes = encode(gradients, scale, rounding=rounding, noise=noise)
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
        """Measure samples 0..count-1, or as many of them as there is time for."""
        count = self.spec.round.probes_max if count is None else count
        sides = self.spec.perturbation.side_count
        drawn = self.drawn(round_number, slot, count)
        losses = np.full((count, 2), np.nan)
        is_done = np.zeros(count, dtype=np.bool_)
        tokens = 0
        if self._is_shared:
            losses[:, 1] = self._clean(round_number, slot, drawn)
            tokens += self._tokens(drawn[0])
        for samples in self.micro_batches(drawn):
            if is_done.any() and should_stop():
                break
            losses[samples, :sides] = self._losses(round_number, slot, samples, drawn)
            is_done[samples] = True
            tokens += sides * self._tokens(drawn[samples])
        # Samples of a window are measured by length: keep the ones before the first that is missing.
        done = count if is_done.all() else int(np.argmin(is_done))
        return Measurement(plus=losses[:done, 0], reference=losses[:done, 1], tokens=tokens)

    def _tokens(self, drawn: NDArray[np.int64]) -> int:
        """Tokens of these examples, each read once."""
        return sum(self._sizes[index].tokens for index in drawn.flatten().tolist())

    def _clean(self, round_number: RoundNumber, slot: Slot, drawn: NDArray[np.int64]) -> float:
        """Return the loss of the weights as they are, on the examples that all samples share.

        Measured as sample 0 with epsilon 0: the same operations round alike, and their difference is the noise alone.
        """
        return float(self._forward(round_number, slot, np.zeros(1, np.int64), drawn, epsilon=0.0)[0, 0])

    def _losses(
        self, round_number: RoundNumber, slot: Slot, samples: NDArray[np.int64], drawn: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return [samples, sides] mean losses. Where memory runs out the micro-batch is halved, for good."""
        try:
            return self._forward(round_number, slot, samples, drawn)
        except (torch.OutOfMemoryError, MemoryError):
            if len(samples) == 1:
                raise
        if self.evaluator.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(samples) // 2
        self.rows_max = max(1, half * self._rows(drawn[samples]))
        return np.concatenate(
            [self._losses(round_number, slot, part, drawn) for part in (samples[:half], samples[half:])]
        )

    def _forward(
        self,
        round_number: RoundNumber,
        slot: Slot,
        samples: NDArray[np.int64],
        drawn: NDArray[np.int64],
        *,
        epsilon: float | None = None,
    ) -> NDArray[np.float64]:
        """Return [samples, sides] mean losses, at the run's epsilon unless another is given."""
        evaluator, rules = self.evaluator, self.spec.perturbation
        probes = Probes.of(run_key=self.spec.run_key, round=round_number, slots=slot, samples=samples)
        perturbation = FAMILIES[rules.family](
            self._signs(probes),
            probes=len(samples),
            epsilon=rules.epsilon if epsilon is None else epsilon,
            dtype=evaluator.dtype,
            device=evaluator.device,
            sides=rules.side_count,
        )
        if self._is_shared:  # all that is compared with one clean loss draws alike
            perturbation.draw_key = f"{self.spec.run_key} {round_number} {slot}".encode()
        sums: NDArray[np.float64] = np.zeros((len(samples), rules.side_count))
        chosen = drawn[samples]
        per_probe = self.spec.objective.examples_per_probe
        step = max(1, self._rows_limit(chosen) * per_probe // (len(samples) * self._rows(chosen)))
        for begin in range(0, per_probe, step):  # more than one pass only where one probe's examples fill a forward
            part = [self.items[index] for index in chosen[:, begin : begin + step].flatten().tolist()]
            measure = evaluator.losses if self._is_followed else partial(written_losses, evaluator)
            sums += measure(part, perturbation).sum(2).cpu().numpy()
        return sums / per_probe

    def _signs(self, probes: Probes) -> Signs:
        """Return where a micro-batch's signs come from."""
        device = self.evaluator.device
        if self.spec.perturbation.family != "rank1":
            return Directions(probes, device)
        kind = "cuda" if device.type == "cuda" else "compiled" if fast.compiled() else "cpu"
        # Powers of two: micro-batches of nearly equal size share a layout.
        columns_max = PAGE_BYTES[kind] >> (len(probes) - 1).bit_length()
        return PagedSigns(self._pages(columns_max), probes, device)

    def micro_batches(self, drawn: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield groups of samples, of similar length, such that a group's rows fit one forward."""
        if not self._is_followed:
            yield from np.arange(len(drawn))[:, None]
            return
        lengths = self._lengths[drawn].max(1)
        longest = drawn[int(lengths.argmax())][None, :]
        typical = max(1, self._rows_limit(longest) // self._rows(longest))
        window = len(drawn) if self.spec.round.budget_ms == 0 else WINDOW * typical
        for begin in range(0, len(drawn), window):
            order = begin + np.argsort(-lengths[begin : begin + window], kind="stable")
            groups = [order[first:stop] for first, stop in self._cuts(drawn[order], lengths[order])]
            # Only what reaches from sample 0 on without a gap counts: the group with the lowest sample comes first.
            yield from sorted(groups, key=lambda group: int(group.min()))

    def _cuts(self, drawn: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return where to cut samples that are sorted by falling length, such that the least is computed in all.

        A group computes its rows at the length of its first sample; each group costs `CUT_TOKENS` besides. Solved from
        the end: the best cuts of a tail follow from those of the tails behind it.
        """
        count = len(lengths)
        cut_tokens = CUT_TOKENS["cuda" if self.evaluator.device.type == "cuda" else "cpu"]
        costs, sizes = np.zeros(count + 1), np.ones(count, np.int64)
        rows = self._rows(drawn)
        most = np.maximum(1, self._rows_limits(drawn) // rows)
        for first in range(count - 1, -1, -1):
            ends = np.arange(1, min(int(most[first]), count - first) + 1)
            tried = cut_tokens + rows * ends * lengths[first] + costs[first + ends]
            best = int(tried.argmin())
            sizes[first], costs[first] = best + 1, tried[best]
        cuts, first = [], 0
        while first < count:
            cuts.append((first, first + int(sizes[first])))
            first = cuts[-1][1]
        return cuts

    def _rows(self, drawn: NDArray[np.int64]) -> int:
        """Rows of the largest of these samples, all sides."""
        samples: list[list[int]] = drawn.tolist()
        return self.spec.perturbation.side_count * max(
            sum(self._sizes[index].rows for index in sample) for sample in samples
        )

    def _rows_limit(self, drawn: NDArray[np.int64]) -> int:
        """Rows of examples as long as the longest of these that fit one forward."""
        return int(self._rows_limits(drawn.reshape(1, -1))[0])

    def _rows_limits(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for each sample: [samples]."""
        if self.rows_max is not None:
            return np.full(len(drawn), self.rows_max, np.int64)
        kind = "cuda" if self.evaluator.device.type == "cuda" else "cpu"
        tokens, outputs = self._lengths[drawn].max(1), self._outputs[drawn].max(1)
        limits: NDArray[np.int64] = np.minimum(FORWARD_TOKENS[kind] // tokens, OUTPUT_BYTES_MAX[kind] // (4 * outputs))
        return np.maximum(1, limits)

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
