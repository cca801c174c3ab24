"""Train any `torch.nn.Module` on any loss: the entry point for what is no causal language model of the usual kind.

The loss need not be differentiable: it is only ever evaluated. Functions come from the user's own program, never from
a run or a peer. Knows nothing of rounds; `peerturb.zo.local` and the nodes use it like any other evaluator.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from peerturb.errors import ModelError, ObjectiveError
from peerturb.manifest import Manifest, Parameter
from peerturb.spec import ModelSpec
from peerturb.zo.batch import Size
from peerturb.zo.coverage import EXAMPLES, EXAMPLES_MAX
from peerturb.zo.lookups import shared_lookups
from peerturb.zo.model import TORCH_DTYPES, build_manifest
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.perturbed import PerturbedForward

Item = TypeVar("Item")

CHECKED_EXAMPLES = 4
"""Examples whose losses are compared, alone and together, before training."""

ROW_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1}
"""How far an example's loss may depend on its batch, relative to it: rounding, nothing more."""


class CustomEvaluator(Generic[Item]):
    """A user's module and functions (`Evaluator` of the user's items).

    Args:
        module: its parameters in one floating-point type; it is switched to evaluation, its gradients off.
        spec: RunSpec section `model`: what stays frozen, scale exponents, type.
        examples: some of the items training will see; the functions are tried on them.
        loss: (outputs, batch) -> one number for each row, lower is better: a tensor [rows] or a sequence of numbers.
        forward: (module, batch) -> outputs, floating-point [rows, ...]; by default `module(batch[0])`.
        collate: items -> batch; by default tensors, numbers, tuples and dictionaries of them are stacked.
        tokens: what an item costs, in tokens (1 for a small vector); bounds the rows of a forward.
        per_probe: for a loss of a group as a whole, such as F1, the run's `objective.examples_per_probe`: the loss gets
            the outputs and batch of the examples of one side of one probe, and returns a single number.

    Raises:
        ModelError: the parameters are of other types, or nothing is left to train.
        ObjectiveError: a function returns another shape or type, is not finite, or mixes rows.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        examples: Sequence[Item],
        *,
        loss: Callable[[Tensor, Any], Any],
        forward: Callable[[Any, Any], Tensor] | None = None,
        collate: Callable[[Sequence[Item]], Any] | None = None,
        tokens: Callable[[Item], int] | None = None,
        per_probe: int = 0,
    ) -> None:
        if not examples:
            raise ObjectiveError("no examples were given; loss and forward are tried on some before training")
        self.module = module.eval().requires_grad_(False)
        self.manifest: Manifest = build_manifest(module, spec)
        named = dict(module.named_parameters(remove_duplicate=False))
        self.parameters: list[tuple[Parameter, Tensor]] = [(entry, named[entry.name]) for entry in self.manifest]
        self.device = self.parameters[0][1].device
        self.owners: Sequence[nn.Module] | None = None
        self.dtype = TORCH_DTYPES[spec.dtype]
        self._loss, self._forward = loss, forward or _call
        self._collate = collate or stack
        self._tokens = tokens
        self._per_probe, self.is_whole = per_probe, per_probe > 0
        self._examples = list(examples[:EXAMPLES_MAX])
        self._outputs = 1
        self._check()
        self.shared = shared_lookups(self.trial, self.parameters)

    def size(self, item: Item) -> Size:
        """See `Evaluator`."""
        tokens: Any = 1 if self._tokens is None else self._tokens(item)  # a user's function may return anything
        if not isinstance(tokens, int) or tokens < 1:
            raise ObjectiveError(f"`tokens` returned {tokens!r} for an item; it must return how long it is, 1 or more")
        return Size(tokens=tokens, outputs=self._outputs)

    @torch.inference_mode()
    def losses(self, items: Sequence[Item], perturbation: Perturbation | None = None) -> Tensor:
        """See `Evaluator`; f64."""
        # All sides of a probe see the same examples: +epsilon first.
        rows = list(items) if perturbation is None else [items[row] for row in perturbation.each_side(len(items))]
        batch = self._batch(rows)
        if perturbation is None:
            outputs = self._run(batch, len(rows))
        else:
            with PerturbedForward(self.parameters, perturbation, rows=len(rows), shared=self.shared):
                outputs = self._run(batch, len(rows))
        if self._per_probe:
            size = len(rows) if perturbation is None else len(items) // perturbation.probes
            if perturbation is not None:
                check_whole(size, self._per_probe)
            losses = self._group_losses(outputs, [rows[begin : begin + size] for begin in range(0, len(rows), size)])
        else:
            losses = as_losses(self._loss(outputs, batch), len(rows))
        return losses if perturbation is None else losses.view(perturbation.probes, perturbation.sides, -1)

    def graph_losses(self, items: Sequence[Item]) -> Tensor:
        """Return plain losses, f64 [items], with gradients where they are switched on and the loss has some."""
        batch = self._batch(items)
        return as_losses(self._loss(self._run(batch, len(items)), batch), len(items))

    def trial(self, numbers: Tensor) -> Tensor:
        """See `peerturb.zo.coverage.Trial`: the outputs, which show every perturbation; a loss might hide it."""
        items = [self._examples[number % len(self._examples)] for number in numbers.tolist()]
        return self._run(self._batch(items), len(items))

    def _batch(self, items: Sequence[Item]) -> Any:
        return to_device(self._collate(items), self.device)

    def _run(self, batch: Any, rows: int) -> Tensor:
        outputs = self._forward(self.module, batch)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            found = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ObjectiveError(f"`forward` returned {found}; it must return a floating-point tensor [rows, ...]")
        if outputs.dim() == 0 or outputs.shape[0] != rows:
            raise ObjectiveError(
                f"`forward` returned shape {tuple(outputs.shape)} for {rows} examples; its first dimension must be rows"
            )
        return outputs

    def _group_losses(self, outputs: Tensor, groups: list[list[Item]]) -> Tensor:
        size = len(groups[0])
        values = []
        for number, group in enumerate(groups):
            value = self._loss(outputs[number * size : (number + 1) * size], self._batch(group))
            values.append(as_losses(value, 1, what="per_probe: `loss` must return a single number"))
        return torch.cat(values).repeat_interleave(size)

    @torch.inference_mode()
    def _check(self) -> None:
        """Try the functions on a few examples, together and alone."""
        items = self._examples[:CHECKED_EXAMPLES]
        outputs = self._run(self._batch(items), len(items))
        self._outputs = max(1, outputs[0].numel())
        losses = self.losses(items)
        if not bool(torch.isfinite(losses).all()):
            number = int((~torch.isfinite(losses)).nonzero()[0])
            raise ObjectiveError(f"the loss of example {number} is {float(losses[number])} before any training")
        tolerance = ROW_TOLERANCE[self.dtype]
        for number, item in enumerate(items):
            alone = self._run(self._batch([item]), 1)[0].double()
            together = outputs[number].double()
            if alone.shape != together.shape:
                continue  # padded to the longest: the losses below must agree all the same
            _same(alone, together, tolerance, "`forward`", number)
        if not self._per_probe:
            for number, item in enumerate(items):
                _same(self.losses([item])[0], losses[number], tolerance, "`loss`", number)
        # Examples padded to other lengths give outputs of other shapes, which no trial can compare: one pair must do.
        if len({self.trial(pair).shape for pair in torch.arange(EXAMPLES_MAX).split(EXAMPLES)}) > 1:
            self._examples = self._examples[:EXAMPLES]


def stack(items: Sequence[Any]) -> Any:
    """Stack tensors and numbers; tuples and dictionaries of them entry by entry. Everything else stays a list.

    Raises:
        ObjectiveError: tensors of different shapes.
    """
    first = items[0]
    if isinstance(first, (tuple, list)):
        return tuple(stack(column) for column in zip(*items, strict=True))
    if isinstance(first, dict):
        return {key: stack([item[key] for item in items]) for key in first}
    if isinstance(first, Tensor):
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise ObjectiveError(f"items of shapes {sorted(shapes)} cannot be stacked; give a `collate` that pads them")
        return torch.stack(list(items))
    if isinstance(first, (bool, int, float)):
        return torch.tensor(items)
    return list(items)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if type(batch) in (tuple, list):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch


def as_losses(value: Any, rows: int, *, what: str = "`loss` must return one number for each row") -> Tensor:
    """Return what a user's function gave as f64 [rows].

    Raises:
        ObjectiveError: another number of values, or no numbers.
    """
    try:
        losses = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObjectiveError(f"{what}; it returned {type(value).__name__} ({error})") from error
    if rows == 1 and losses.dim() == 0:
        losses = losses.view(1)
    if losses.shape != (rows,) or losses.is_complex():
        hint = ' (reduction="none" in most of torch\'s losses)' if losses.dim() == 0 else ""
        raise ObjectiveError(f"{what}{hint}: expected shape ({rows},), got {tuple(losses.shape)}")
    return losses.double()


def check_whole(found: int, per_probe: int) -> None:
    """Refuse to measure a group's loss on a part of it.

    Raises:
        ObjectiveError: a forward holds fewer examples than a probe has, or the RunSpec says another number.
    """
    if found != per_probe:
        raise ObjectiveError(
            f"a loss of {per_probe} examples together was asked for {found} of them: per_probe must be "
            "objective.examples_per_probe, and one probe's examples must fit a forward (raise rows_max, or lower "
            "examples_per_probe)"
        )


def base_spec(module: nn.Module, *, name: str, exclude: Sequence[str] = ()) -> ModelSpec:
    """Return the RunSpec section `model` of a module as it is now: type and digest of all its parameters.

    Raises:
        ModelError: parameters of several types, or of one that cannot be trained.
    """
    from peerturb.zo.model import base_digest

    found = sorted({str(parameter.dtype) for parameter in module.parameters()})
    types = {str(value): key for key, value in TORCH_DTYPES.items()}
    if len(found) != 1 or found[0] not in types:
        raise ModelError(f"the module's parameters are {', '.join(found) or 'none'}; all must be float32 or bfloat16")
    dtype = types[found[0]]
    return ModelSpec(name=name, digest=base_digest(module, dtype), dtype=dtype, exclude=tuple(exclude))


def _call(module: Any, batch: Any) -> Any:
    if not isinstance(batch, tuple):
        raise ObjectiveError(
            f"the batch is a {type(batch).__name__}, not a tuple whose first entry the module takes; give `forward`"
        )
    return module(batch[0])


def _same(alone: Tensor, together: Tensor, tolerance: float, what: str, number: int) -> None:
    scale = float(together.abs().max()) if together.numel() else 0.0
    if together.numel() and float((alone - together).abs().max()) > tolerance * (scale + 1e-3):
        raise ObjectiveError(
            f"{what} gives example {number} another value alone than among others: every row must be computed by "
            "itself, without statistics of the batch"
        )
