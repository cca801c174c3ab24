"""Run a model over rows of sequences, perturbed or plain, and return each example's loss.

The one place that knows how rows, perturbation and objective meet. Used by probes, by evaluation and by the coverage
check.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peerturb.manifest import Manifest, Parameter
from peerturb.zo.coverage import Trial, text_trial
from peerturb.zo.kinds import kind_of, shared_tables
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.perturbed import PerturbedForward, owners_of
from peerturb.zo.recorded import Recorder
from peerturb.zo.rows import Rows

Item = TypeVar("Item", contravariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What one example costs in a forward, measured at one side of a probe."""

    rows: int = 1
    tokens: int
    """Of a row, before padding."""
    outputs: int
    """Numbers in the largest output of a row."""
    held: int = 0
    """Numbers that a row keeps from its first token to its last: the cache of a text that is being written."""


class Evaluator(Protocol[Item]):
    """What the probe engine asks of a model and its objective: losses, and how large examples are.

    Attributes:
        parameters: what is trained, entry by entry of the manifest, with the model's tensors.
        device: where the tensors are.
        dtype: type of the activations.
        owners: the modules inside which operations are seen, None for anywhere (`peerturb.zo.perturbed`). The probe
            engine sets it to None where a trial says so.
        is_whole: True if the loss is one of all a probe's examples together: they share a forward then.
    """

    parameters: list[tuple[Parameter, Tensor]]
    device: torch.device
    dtype: torch.dtype
    owners: Sequence[nn.Module] | None
    is_whole: bool

    def size(self, item: Item) -> Size:
        """Say what an example costs."""
        ...

    def losses(self, items: Sequence[Item], perturbation: Perturbation | None = None) -> Tensor:
        """Return losses: [examples], or [probes, sides, examples per probe] under a perturbation.

        The model's forward runs inside a `PerturbedForward`, also where the weights are perturbed already
        (`peerturb.zo.written`).
        """
        ...

    def trial(self, numbers: Tensor) -> Tensor:
        """Return outputs for made-up examples: see `peerturb.zo.coverage.Trial`."""
        ...


class Runner:
    """A transformers model, the tensors a run trains, and the objective (`Evaluator` of token sequences).

    Args:
        manifest: what is trained; the tensors are looked up in `model` once.
    """

    def __init__(self, model: Any, manifest: Manifest, objective: Objective) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self.kind = kind_of(model)
        self.shared = shared_tables(model)
        head = model.get_output_embeddings()
        self.model = model
        self.objective = objective
        self.parameters: list[tuple[Parameter, Tensor]] = [(entry, named[entry.name]) for entry in manifest]
        self.head: Tensor | None = None if head is None else head.weight
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.trial: Trial = text_trial(model)
        self.is_whole = False
        self.owners: Sequence[nn.Module] | None = None
        if not self.shared:  # such tables are used far from where they are looked up
            heads = [] if self.head is None else [self.head]
            self.owners = owners_of(model, [tensor for _, tensor in self.parameters] + heads)
        tensors = [tensor for _, tensor in self.parameters]
        self.recorder = Recorder(self._losses, tensors) if self.device.type == "cuda" else None
        self._head_owners = () if self.head is None else owners_of(model, [self.head])

    def size(self, item: TokenSequence) -> Size:
        """See `Evaluator`."""
        tokens = len(item.tokens)
        if self.kind == "classes":
            return Size(tokens=tokens, outputs=len(self.objective.label_values))
        scored = tokens - item.start + 1
        return Size(rows=self.objective.per_example, tokens=tokens, outputs=scored * self._vocabulary)

    def losses(self, sequences: Sequence[TokenSequence], perturbation: Perturbation | None = None) -> Tensor:
        """Return losses: [examples], or [probes, sides, examples per probe] under a perturbation.

        Args:
            sequences: the examples; under a perturbation those of its probes, one probe after the other.
        """
        rows = self.place(self.objective.rows(sequences))
        if perturbation is not None:
            rows = each_side(rows, perturbation)
        measure = self._losses if self.recorder is None else self.recorder.losses
        losses = measure(rows, perturbation)
        return losses if perturbation is None else losses.view(perturbation.probes, perturbation.sides, -1)

    def _losses(self, rows: Rows, perturbation: Perturbation | None) -> Tensor:
        """Return the losses of a batch on the device, every side's rows written out: [examples * sides]."""
        return self.objective.losses(self.logits(rows, perturbation), rows)

    def graph_losses(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Return plain losses, [examples], with gradients where the caller has them switched on."""
        rows = self.place(self.objective.rows(sequences))
        return self.objective.losses(self.forward(rows), rows)

    def place(self, rows: Rows) -> Rows:
        """Move a batch to the model's device."""
        if self.device.type == "cpu":
            return rows
        return replace(
            rows,
            ids=rows.ids.to(self.device),
            positions=None if rows.positions is None else rows.positions.to(self.device),
            targets=rows.targets.to(self.device),
            is_scored=rows.is_scored.to(self.device),
            answers=rows.answers.to(self.device),
            mask=None if rows.mask is None else rows.mask.to(self.device),
            decoder_ids=None if rows.decoder_ids is None else rows.decoder_ids.to(self.device),
        )

    @torch.inference_mode()
    def logits(self, rows: Rows, perturbation: Perturbation | None = None) -> Tensor:
        """Return the logits that predict the targets, [rows, scored, vocabulary], or those of [rows, classes]."""
        return self.forward(rows, perturbation)

    def forward(self, rows: Rows, perturbation: Perturbation | None = None) -> Tensor:
        """Return what `logits` returns, with gradients where the caller has them switched on."""
        if perturbation is None and rows.positions is None:
            context: Any = nullcontext()
        elif perturbation is None:
            context = PerturbedForward(
                [], None, rows=len(rows.ids), head=self.head, positions=rows.positions, owners=self._head_owners
            )
        else:
            context = PerturbedForward(
                self.parameters,
                perturbation,
                rows=len(rows.ids),
                head=self.head,
                positions=rows.positions,
                shared=self.shared,
                owners=self.owners,
            )
        given: dict[str, Any] = {} if self.kind == "classes" else {"use_cache": False}
        if rows.mask is not None:
            given["attention_mask"] = rows.mask
        if rows.decoder_ids is not None:
            given["decoder_input_ids"] = rows.decoder_ids
        with context:
            logits: Tensor = self.model(input_ids=rows.ids, **given).logits
        if rows.positions is None or context.has_kept:
            return logits
        return logits.gather(1, rows.positions[:, :, None].expand(-1, -1, logits.shape[2]))


def each_side(rows: Rows, perturbation: Perturbation) -> Rows:
    """Repeat each probe's rows for each of its sides: first measured at +epsilon, then at -epsilon."""
    probes, sides = perturbation.probes, perturbation.sides

    def repeat(value: Tensor) -> Tensor:
        shape = (probes, sides, len(value) // probes, *value.shape[1:])
        return value.view(probes, 1, *shape[2:]).expand(shape).reshape(sides * len(value), *value.shape[1:])

    return replace(
        rows,
        ids=repeat(rows.ids),
        positions=None if rows.positions is None else repeat(rows.positions),
        targets=repeat(rows.targets),
        is_scored=repeat(rows.is_scored),
        answers=repeat(rows.answers),
        mask=None if rows.mask is None else repeat(rows.mask),
        decoder_ids=None if rows.decoder_ids is None else repeat(rows.decoder_ids),
        tokens=perturbation.sides * rows.tokens,
    )
