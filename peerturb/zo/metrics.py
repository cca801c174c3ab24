"""Objectives that have no gradient, for classification by label words or a head: accuracy, F1, or a user's own.

`ScoredRunner` is a `Runner` whose loss is a function of the labels' or classes' scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peerturb.errors import ObjectiveError
from peerturb.manifest import Manifest
from peerturb.zo.batch import Runner, each_side
from peerturb.zo.custom import as_losses, check_whole
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.perturbation import Perturbation

Metric = Callable[[Tensor, Tensor], Any]
"""(scores [examples, labels], answers [examples]) -> a loss for each example, or one for all of them."""


def error_rate(scores: Tensor, answers: Tensor) -> Tensor:
    """Return 1 for each wrong answer and 0 for each right one: its mean is 1 - accuracy."""
    return (scores.argmax(1) != answers).double()


def f1_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Return 1 - macro F1 over the labels that occur as answer or as right one: a single number for all examples."""
    chosen, labels = scores.argmax(1), scores.shape[1]
    right = torch.bincount(answers[chosen == answers], minlength=labels).double()
    both = torch.bincount(answers, minlength=labels) + torch.bincount(chosen, minlength=labels)
    occurs = both > 0
    return 1.0 - (2.0 * right[occurs] / both[occurs]).mean()


class ScoredRunner(Runner):
    """A model with a metric of the labels' or classes' scores as its loss.

    Args:
        model: see `Runner`.
        manifest: see `Runner`.
        objective: of kind `labels` or `classes`.
        metric: what is minimised.
        per_probe: the metric gives one number for all examples of one side of a probe.

    Raises:
        ObjectiveError: the objective has neither labels nor classes.
    """

    def __init__(
        self, model: Any, manifest: Manifest, objective: Objective, metric: Metric, *, per_probe: bool = False
    ) -> None:
        kind = objective.spec.kind
        if kind not in ("labels", "classes"):
            raise ObjectiveError(f'a metric of labels needs objective.kind = "labels" or "classes", not "{kind}"')
        super().__init__(model, manifest, objective)
        self._metric, self.is_whole = metric, per_probe

    def losses(self, sequences: Sequence[TokenSequence], perturbation: Perturbation | None = None) -> Tensor:
        """See `Evaluator`; f64."""
        rows = self.place(self.objective.rows(sequences))
        if perturbation is not None:
            rows = each_side(rows, perturbation)
        scores = self.objective.scores(self.logits(rows, perturbation), rows)
        groups = 1 if perturbation is None else perturbation.groups
        if self.is_whole:
            size = len(scores) // groups
            if perturbation is not None:
                check_whole(size, self.objective.spec.examples_per_probe)
            parts = zip(scores.split(size), rows.answers.split(size), strict=True)
            what = "per_probe: the metric must return a single number"
            losses = torch.cat([as_losses(self._metric(*part), 1, what=what) for part in parts])
            losses = losses.repeat_interleave(size)
        else:
            what = "the metric must return one number for each example"
            losses = as_losses(self._metric(scores, rows.answers), len(scores), what=what)
        return losses if perturbation is None else losses.view(perturbation.probes, perturbation.sides, -1)
