"""A run in one process: measure, encode, seal, apply, digest, by the same functions as nodes and coordinator.

For experiments and for modules and objectives of one's own (docs/custom.md). Knows no network and no files.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from peerturb import mixing, stepping
from peerturb.errors import DataError, ModelError
from peerturb.floats import f32
from peerturb.ids import RoundNumber, Slot
from peerturb.plateau import Plateau
from peerturb.spec import RunSpec
from peerturb.trend import Trend
from peerturb.zo.base import check_base
from peerturb.zo.batch import Evaluator
from peerturb.zo.choosing import Wanted, choose_engine
from peerturb.zo.coverage import SlowWarning
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.room import in_parts
from peerturb.zo.update import apply_update

Item = TypeVar("Item")

_log = logging.getLogger(__name__)


ADVICE = (
    "the learning rate is probably too large: begin a new run with a lower step.learning_rate, on the base weights or "
    "on those of an earlier round (peerturb.zo.replay.replay with until_round)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRound:
    """A sealed round; `peerturb.zo.replay.replay` takes a list of them."""

    round: int
    scale: float
    """What the codes are multiples of."""
    alpha: float
    """Step size."""
    digest: int
    """Short digest of the weights before the round."""
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    codes: bytes
    """int8, slot after slot."""
    loss: float
    """Mean of the peers' finite losses, weighted by their valid codes, an f32 value; NaN if every probe is void."""
    tokens: int
    exact: tuple[int, ...] = ()
    """Those of `slots` whose codes are exact projections."""
    exact_scale: float = 0.0
    """What those are multiples of, where the run allows both estimators; 0 otherwise."""
    warning: str = ""
    """What to tell people while the loss rises, more than noise explains; empty otherwise."""


class LocalRun(Generic[Item]):
    """Rounds with all peers in this process. Every peer measures all its probes: `round.budget_ms` means nothing here.

    Args:
        evaluator: a `CustomEvaluator`, `Runner` or another; its tensors are trained in place.
        spec: the run's.
        parts: each peer's private items; slot 0, 1, ...
        rows_max: most rows in one forward; None: chosen from size and device.
        estimators: how each peer finds its projected gradients, `auto`, `spsa` or `exact`; None: `auto` for all.
        base_digest: hexadecimal, of all weights as built or loaded, frozen ones too (`peerturb.zo.custom.base_spec`,
            or `peerturb.zo.model.base_digest` before an adapter is attached). None: what is trained is compared with
            the RunSpec where that is the whole model; with frozen weights or an adapter nothing is compared.

    Raises:
        RefusedError: the weights are not those of the RunSpec's `model.digest`.
        ModelError: a parameter cannot be perturbed.
        DataError: a part has fewer items than a probe needs.
    """

    def __init__(
        self,
        evaluator: Evaluator[Item],
        spec: RunSpec,
        parts: Sequence[Sequence[Item]],
        *,
        rows_max: int | None = None,
        estimators: Sequence[Wanted] | None = None,
        base_digest: str | None = None,
    ) -> None:
        if not parts:
            raise ModelError("a run needs at least one peer: give a list with one part of the data for each")
        self.spec = spec
        self.evaluator = evaluator
        self.manifest = tuple(entry for entry, _ in evaluator.parameters)
        self.weights = [tensor.data for _, tensor in evaluator.parameters]
        self.rounds: list[LocalRound] = []
        """What has been sealed so far: with the base weights, the whole run."""
        self.scale = f32(max(spec.perturbation.initial_scale, stepping.SCALE_MIN))
        self.exact_scale = self.scale if spec.perturbation.is_mixed else 0.0
        self.plateau = Plateau()
        self.trend = Trend()
        if base_digest is None and spec.first_digest is not None:
            base_digest = self.digest().hex()
        if base_digest is not None:
            remedy = "build the weights anew, or describe them as they are now (peerturb.zo.custom.base_spec)"
            check_base(spec, base_digest, holder="the evaluator", remedy=remedy)
        wishes: Sequence[Wanted] = estimators or ["auto"] * len(parts)
        self._peers = [
            choose_engine(evaluator, spec, part, wanted=wanted, rows_max=rows_max)
            for part, wanted in zip(parts, wishes, strict=True)
        ]
        for slowness in {peer.engine.slowness for peer in self._peers} - {None}:
            warnings.warn(str(slowness), SlowWarning, stacklevel=2)

    def step(self) -> LocalRound:
        """Do one round; return what was sealed."""
        number = RoundNumber(len(self.rounds))
        scales = self.scale, self.exact_scale
        exact = tuple(slot for slot, peer in enumerate(self._peers) if peer.estimator == "exact")
        results = [
            peer.engine.contribute(
                number, slot=Slot(slot), scale=(self.exact_scale if slot in exact else 0.0) or self.scale
            )
            for slot, peer in enumerate(self._peers)
        ]
        parts = [result.codes.tobytes() for result in results]
        codes = b"".join(parts)
        both = (
            b"".join(part for slot, part in enumerate(parts) if slot not in exact),
            b"".join(part for slot, part in enumerate(parts) if slot in exact),
        )
        step, rounds = self.spec.step, self.spec.round.count
        alpha = mixing.alpha_after(step, number, scales, both, rounds, fraction=self.plateau.fraction)
        weight = self.spec.perturbation.exact_rules.examples / self.spec.objective.examples_per_probe
        losses = ((result.codes, f32(result.loss)) for result in results)
        loss = f32(stepping.mean_loss(losses, exact=exact, exact_weight=weight))
        self.plateau.take(step, number, loss)
        self.trend.take(number, loss)
        sealed = LocalRound(
            round=number,
            scale=self.scale,
            alpha=alpha,
            digest=short_digest(self.digest()),
            slots=tuple(range(len(results))),
            counts=tuple(len(result.codes) for result in results),
            codes=codes,
            loss=loss,
            tokens=sum(result.tokens for result in results),
            exact=exact,
            exact_scale=self.exact_scale,
            warning="" if self.trend.rising is None else f"{self.trend.rising.rise}; {ADVICE}",
        )
        apply_update(
            self.weights,
            self.manifest,
            family=self.spec.perturbation.family,
            run_key=self.spec.run_key,
            round=sealed.round,
            slots=sealed.slots,
            counts=sealed.counts,
            codes=sealed.codes,
            alpha=sealed.alpha,
        )
        self.scale, self.exact_scale = mixing.scales_after(scales, both)
        if sealed.warning and not (self.rounds and self.rounds[-1].warning):
            _log.warning("%s", sealed.warning)
        self.rounds.append(sealed)
        return sealed

    def run(self, rounds: int) -> Iterator[LocalRound]:
        """Do so many rounds, yielding each."""
        for _ in range(rounds):
            yield self.step()

    def loss(self, items: Sequence[Any]) -> float:
        """Return the mean loss of items, weights as they are; of all together where the evaluator judges them so.

        Raises:
            DataError: there are none.
        """
        if not items:
            raise DataError("the loss of no items was asked for: give at least one")
        parts = list(in_parts(self.evaluator, items, self.evaluator.losses, items_max=len(items)))
        return float(torch.cat(parts).mean())

    def digest(self) -> bytes:
        """Return the run digest of the weights."""
        return run_digest(self.manifest, self.weights)
