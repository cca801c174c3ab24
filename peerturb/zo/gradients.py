"""The gradient of a mean loss by backward passes: micro-batch after micro-batch, sums in f32, weights never written.

Memory is estimated from what one real example leaves behind for its backward pass; where it runs out all the same the
micro-batches are halved, then activations are computed twice. Knows nothing of perturbations or codes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from peerturb.errors import ModelError
from peerturb.zo.batch import Evaluator
from peerturb.zo.free import free_bytes
from peerturb.zo.perturbation import HALVES
from peerturb.zo.recompute import blocks_of, recomputed
from peerturb.zo.room import SHARE
from peerturb.zo.shortage import is_out_of_memory

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Activations = Literal["auto", "keep", "recompute"]

MICRO_TOKENS = {"cpu": 4_096, "cuda": 32_768}
"""Tokens in one backward pass, padding counted, where memory is no limit."""

TRANSIENT = 1.5
"""What a backward pass needs at its widest, in units of what its forward has left behind (measured: 1.1 to 1.4)."""

REMEDY = 'set estimator = "spsa" on this node, which needs no gradients'


@runtime_checkable
class Differentiable(Evaluator[ItemIn], Protocol[ItemIn]):
    """An evaluator whose losses can be differentiated."""

    def graph_losses(self, items: Sequence[ItemIn]) -> Tensor:
        """Return the losses of the weights as they are, [examples], with gradients where they are switched on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a gradient takes, in bytes."""

    sums: int
    """Gradients of all trained tensors; in half precision f32 sums beside the widest tensor's own."""
    token: float
    """Activations kept for one token of a row, all layers together."""
    token_recomputed: float
    """The same where blocks are computed twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Of the mean loss over some examples."""

    tensors: list[Tensor]
    """One for each trained tensor, in its shape; f32 (f64 for f64 weights). Not finite where the model broke down."""
    loss: float
    """The mean; NaN or infinite where one of the losses is."""
    tokens: int
    """Of the examples, each read once."""


class Backward(Generic[Item]):
    """Backward passes over one evaluator.

    Args:
        evaluator: gives losses; its weights are read, never written.
        items: those that gradients will be asked for; the longest is tried at once.
        rows_max: most rows in one pass; None: as many as memory and device suggest.
        activations: `keep` them for the backward pass, `recompute` those inside the blocks, or `auto`: recompute where
            not even one row fits otherwise.
        has_memory: whether the caller keeps a second set of gradients.

    Raises:
        ModelError: losses that cannot be differentiated, half precision of too small a range, or too little memory for
            one row.
    """

    def __init__(
        self,
        evaluator: Evaluator[Item],
        items: Sequence[Item],
        *,
        rows_max: int | None = None,
        activations: Activations = "auto",
        has_memory: bool = False,
    ) -> None:
        self.evaluator = _differentiable(evaluator)
        self._kind = "cuda" if evaluator.device.type == "cuda" else "cpu"
        self._trained = [tensor for _, tensor in evaluator.parameters]
        module = _module_of(evaluator)
        self._blocks = [] if module is None else blocks_of(module)
        self._padded = [
            part for part in _modules(module) if isinstance(part, nn.Embedding) and part.padding_idx is not None
        ]
        self._rows_max = rows_max or 2**31
        self._sets = 2 if has_memory else 1
        self.is_recomputed = activations == "recompute"
        """Whether blocks are computed twice to spare memory."""
        self._may_recompute = activations != "keep" and bool(self._blocks)
        sizes = [evaluator.size(item) for item in items]
        self._tokens_max = MICRO_TOKENS[self._kind]
        self._room_for_sums()
        longest = max(range(len(items)), key=lambda number: sizes[number].tokens * sizes[number].rows)
        self.need = self._tried(items[longest], sizes[longest].rows * sizes[longest].tokens)
        self._planned(sizes[longest].rows * sizes[longest].tokens)

    def gradient(self, items: Sequence[Item], *, should_stop: Callable[[], bool] = lambda: False) -> Gradient | None:
        """Return the gradient of the items' mean loss; None if stopped before the end.

        Raises:
            ModelError: memory runs out at a single row with blocks computed twice.
        """
        while True:
            try:
                return self._accumulated(items, should_stop)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._lower():
                    raise self._no_memory(str(error).splitlines()[0][:160]) from error
            # Not within the handler: until it ends, the error holds the failed pass's tensors.
            if self._kind == "cuda":
                torch.cuda.empty_cache()

    def micro_batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Cut items into passes: longest first, as many as `rows_max` and the tokens of a pass allow."""
        sizes = [self.evaluator.size(item) for item in items]
        order = sorted(range(len(items)), key=lambda number: -sizes[number].tokens)
        begin = 0
        while begin < len(order):
            size = sizes[order[begin]]
            rows = min(self._rows_max, max(1, int(self._tokens_max // size.tokens)))
            end = begin + max(1, rows // size.rows)
            yield [items[number] for number in order[begin:end]]
            begin = end

    def _accumulated(self, items: Sequence[Item], should_stop: Callable[[], bool]) -> Gradient | None:
        total, tokens = 0.0, sum(self.evaluator.size(item).tokens for item in items)
        with self._gradients() as sums:
            for part in self.micro_batches(items):
                if should_stop():
                    return None
                losses = self.evaluator.graph_losses(part)
                total += float(losses.detach().sum())
                (losses.sum() / len(items)).backward()
            return Gradient(tensors=sums(), loss=total / len(items), tokens=tokens)

    @contextmanager
    def _gradients(self) -> Iterator[Callable[[], list[Tensor]]]:
        """Context of backward passes; yields what returns the gradients."""
        with ExitStack() as stack:
            for part in self._padded:
                # torch drops the gradient of a lookup of the padding token; a perturbation of it does move the loss.
                stack.callback(setattr, part, "padding_idx", part.padding_idx)
                part.padding_idx = None
            if self.is_recomputed:
                stack.enter_context(recomputed(self._blocks))
            yield stack.enter_context(_gradients_of(self._trained))

    def _room_for_sums(self) -> None:
        """See that gradients fit at all, before the first one is made: on a CPU too much gets a program killed."""
        need, free = self._sets * _sums_bytes(self._trained), free_bytes(self.evaluator.device)
        if free is not None and need > SHARE[self._kind] * free:
            raise self._no_memory(f"they take {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")

    def _tried(self, item: Item, tokens: int) -> Need:
        """Do one example's passes: see that losses can be differentiated, and count what is kept in between."""
        known = {tensor.untyped_storage().data_ptr() for tensor in self._model_tensors()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        try:
            with self._gradients() as sums:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    losses = self.evaluator.graph_losses([item])
                    if not losses.requires_grad:
                        raise ModelError(
                            "the loss cannot be differentiated: no gradient leads from it to what is trained, as with "
                            f"accuracy, F1 or a reward; {REMEDY}"
                        )
                losses.sum().backward()
                sums()
        except ModelError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise self._no_memory(str(error).splitlines()[0][:160]) from error
            if isinstance(error, (RuntimeError, NotImplementedError)):
                raise ModelError(
                    f"the model or its loss cannot be differentiated: {str(error).splitlines()[0]:.200}; {REMEDY}"
                ) from error
            raise
        each = sum(kept.values()) / tokens
        return Need(
            sums=self._sets * _sums_bytes(self._trained),
            token=each,
            token_recomputed=each * min(1.0, 2 / max(1, len(self._blocks))),
        )

    def _planned(self, tokens: int) -> None:
        """Choose the tokens of a pass, and whether blocks are computed twice, by what is free.

        Args:
            tokens: of the longest example's rows.
        """
        free = free_bytes(self.evaluator.device)
        if free is None:
            return
        left = SHARE[self._kind] * free - self.need.sums

        def fitting(token: float) -> int:
            return int(left / (TRANSIENT * token)) if token else self._tokens_max

        if not self.is_recomputed and fitting(self.need.token) < tokens and self._may_recompute:
            self.is_recomputed = True
        token = self.need.token_recomputed if self.is_recomputed else self.need.token
        if fitting(token) < tokens:
            want = (self.need.sums + TRANSIENT * token * tokens) / SHARE[self._kind]
            raise self._no_memory(f"{want / 2**20:,.0f} MiB are wanted, {free / 2**20:,.0f} MiB are free")
        self._tokens_max = min(self._tokens_max, fitting(token))

    def _lower(self) -> bool:
        """Ask less of memory from now on; False if nothing is left to lower."""
        shortest = 2  # no row is shorter
        if self._tokens_max > shortest:
            self._tokens_max //= 2
            return True
        if self._may_recompute and not self.is_recomputed:
            self.is_recomputed = True
            return True
        return False

    def _no_memory(self, why: str) -> ModelError:
        return ModelError(
            f"not enough memory on {self.evaluator.device} for gradients ({why}). Lower objective.tokens_max, a node's "
            '--rows or what is trained (model.exclude, an adapter), set activations = "recompute", or '
            f"{REMEDY}"
        )

    def _model_tensors(self) -> list[Tensor]:
        module = _module_of(self.evaluator)
        return self._trained if module is None else [*module.parameters(), *module.buffers()]


@contextmanager
def _gradients_of(trained: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor]]]:
    """Context in which backward passes add to gradients of these tensors; yields what returns them.

    Half-precision gradients of micro-batches are added in f32, each tensor's as soon as it is whole.
    """
    sums: dict[int, Tensor] = {}

    def add(tensor: Tensor) -> None:
        assert tensor.grad is not None
        known = sums.get(id(tensor))
        if known is None:
            sums[id(tensor)] = tensor.grad.float()
        else:
            known.add_(tensor.grad)
        tensor.grad = None

    def found() -> list[Tensor]:
        given = [sums.get(id(tensor), tensor.grad) for tensor in trained]
        return [
            torch.zeros_like(tensor, dtype=torch.float32 if tensor.dtype in HALVES else tensor.dtype)
            if gradient is None
            else gradient
            for tensor, gradient in zip(trained, given, strict=True)
        ]

    with ExitStack() as stack:
        # Whoever calls may be computing without gradients; this must not.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for tensor in trained:
            tensor.requires_grad_(True)
            if tensor.dtype in HALVES:
                stack.callback(tensor.register_post_accumulate_grad_hook(add).remove)
        try:
            yield found
        finally:
            for tensor in trained:
                tensor.requires_grad_(False)
                tensor.grad = None


def _sums_bytes(trained: Sequence[Tensor]) -> int:
    numbers, size = sum(tensor.numel() for tensor in trained), trained[0].element_size()
    if trained[0].dtype not in HALVES:
        return numbers * size
    return 4 * numbers + size * max(tensor.numel() for tensor in trained)


def _module_of(evaluator: Any) -> nn.Module | None:
    found: nn.Module | None = getattr(evaluator, "model", None) or getattr(evaluator, "module", None)
    return found


def _modules(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else list(module.modules())


def _differentiable(evaluator: Evaluator[Item]) -> Differentiable[Item]:
    if not isinstance(evaluator, Differentiable):
        raise ModelError(
            "this objective cannot be differentiated (it judges what a model writes, or gives no losses with "
            f"gradients); {REMEDY}"
        )
    if evaluator.is_whole:
        raise ModelError(
            f"this objective judges a probe's examples together, and exact gradients are means over examples; {REMEDY}"
        )
    if evaluator.dtype == torch.float16:
        raise ModelError(
            'gradients in float16 run out of its range; set compute_dtype = "float32" or "bfloat16", or ' + REMEDY
        )
    return evaluator


def is_finite(gradient: Gradient) -> bool:
    """Tell whether a gradient and its loss can be used."""
    return math.isfinite(gradient.loss) and all(bool(torch.isfinite(tensor).all()) for tensor in gradient.tensors)
