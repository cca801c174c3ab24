"""Evaluate an unmodified model as if every row of the batch had its own perturbed weights; weights are never written.

`PerturbedForward` is a torch function mode: while it is active it sees each torch operation the model performs. An
operation that takes a trainable parameter is carried out with the plain weights and then corrected for each row
(`peerturb.zo.perturbation`). An operation it does not know is refused with the parameter's name, so nothing is left
unperturbed in silence; `peerturb.zo.coverage` checks besides, before training, that the result is right.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peerturb.errors import UnfollowedError
from peerturb.manifest import Parameter
from peerturb.zo.experts import Routing
from peerturb.zo.following import Tracked
from peerturb.zo.layers import known_forward
from peerturb.zo.operations import HANDLERS
from peerturb.zo.perturbation import Perturbation
from peerturb.zo.written import Written, uses


class PerturbedForward(TorchFunctionMode):
    """Context in which a model's forward runs perturbed.

    Args:
        parameters: every trainable parameter by identity: (manifest entry, the model's tensor).
        perturbation: what to add, or None (with no parameters) to keep `positions` only. `Written`: the weights are
            perturbed already, nothing is added.
        rows: rows of the batch, a multiple of sides * probes.
        head: the output embedding; where it is applied, only `positions` of each row are kept.
        positions: [rows, kept] indices of the tokens whose logits are wanted, or None for all.
        shared: names of embeddings looked up once for all rows (`peerturb.zo.kinds.shared_tables`,
            `peerturb.zo.lookups.shared_lookups`).
        owners: the modules inside which operations are seen (`owners_of`): all others run at full speed. None: all
            operations of the forward are seen.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Parameter, Tensor]],
        perturbation: Perturbation | None,
        *,
        rows: int,
        head: Tensor | None = None,
        positions: Tensor | None = None,
        shared: Collection[str] = (),
        owners: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if parameters and perturbation is None:
            raise ValueError("parameters without a perturbation")
        self._perturbation = perturbation
        self.probes = perturbation.probes if perturbation is not None else 0
        self.sides = perturbation.sides if perturbation is not None else 0
        self.rows = rows
        self.head = head
        self.positions = positions
        self.shared = shared
        self.used: set[str] = set()
        """Names of the parameters met so far."""
        self.has_kept = False
        """True once the head was applied to `positions` only."""
        followed = () if isinstance(perturbation, Written) else parameters
        self._tracked = {id(tensor): Tracked(parameter=entry, tensor=tensor) for entry, tensor in followed}
        self._owners = owners
        self._replaced: list[tuple[nn.Module, Any]] = []
        self.is_inside = False
        """True inside a module whose operations are all seen."""

    def __enter__(self) -> Self:
        """Begin to see operations."""
        if self._owners is None:
            super().__enter__()  # type: ignore[no-untyped-call]
        try:
            for module in self._owners or ():
                seen = self._seen(module)
                self._replaced.append((module, module.__dict__.get("forward")))
                # As an attribute of the object it goes before the class's method; `setattr` of a module is slow.
                module.__dict__["forward"] = seen
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop seeing them."""
        if self._owners is None:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._restore()

    def _restore(self) -> None:
        """Give the modules their own forwards back."""
        while self._replaced:
            module, forward = self._replaced.pop()
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward

    def _seen(self, module: nn.Module) -> Callable[..., Any]:
        """Return a module's forward, its operations seen."""
        forward = module.forward

        def enclosed(*args: Any, **kwargs: Any) -> Any:
            if self.is_inside:
                return forward(*args, **kwargs)
            self.is_inside = True
            TorchFunctionMode.__enter__(self)
            try:
                return forward(*args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)
                self.is_inside = False

        return known_forward(self, module, enclosed)

    @property
    def perturbation(self) -> Perturbation:
        """What is added; handlers ask only once they have met a tracked parameter."""
        assert self._perturbation is not None
        return self._perturbation

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Perform `func`, corrected where it takes a trainable parameter."""
        given = dict(kwargs) if kwargs else {}
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, given)
        found = self.find(args, given)
        if found is None:
            return func(*args, **given)
        return self._pass_or_refuse(found, func, args, given)

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tracked | None:
        """Return the first tracked tensor among the arguments, lists of tensors included."""
        tracked = self._tracked  # this runs hundreds of times a forward: plain loops, no copies
        for value in args:
            if id(value) in tracked:
                return tracked[id(value)]
            if isinstance(value, (tuple, list)):
                for item in value:
                    if id(item) in tracked:
                        return tracked[id(item)]
        return self.find(tuple(kwargs.values()), {}) if kwargs else None

    def known(self, value: Any) -> Tracked | None:
        """Return what is known about one argument."""
        return self._tracked.get(id(value))

    def track(self, value: Any) -> Tracked | None:
        """Return what is known about one argument, and note that the parameter was used."""
        found = self.known(value)
        if found is not None:
            self.used.add(found.parameter.name)
        return found

    def derive(
        self,
        source: Tracked,
        tensor: Tensor,
        *,
        rows: Tensor | None = None,
        table: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """Track `tensor`, computed from `source`."""
        if tensor is not source.tensor:
            self._tracked[id(tensor)] = Tracked(
                parameter=source.parameter, tensor=tensor, is_transposed=transposed, rows=rows, table=table
            )
        return tensor

    def keep(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keep the hidden states at `positions`: [rows, tokens, width] -> [rows, kept, width]."""
        self.has_kept = True
        return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))

    def vector(self, found: Tracked) -> Tensor:
        """Return a tracked vector's perturbed value for every row: [probes, sides, 1, elements]."""
        if found.rows is not None:
            return found.rows
        if found.parameter.kind != "vector":
            self.refuse(found, "takes the matrix as a whole, element by element")
        return found.tensor.reshape(-1) + self.perturbation.vector(found.parameter)

    def grouped(self, found: Tracked, value: Tensor, last: int) -> Tensor:
        """View an activation as [probes, sides, rest, last].

        Raises:
            UnfollowedError: its rows cannot be told apart.
        """
        if value.dim() == 0 or value.shape[0] == 0 or value.shape[0] % self.rows or value.shape[-1] % last:
            self.refuse(found, f"meets an activation of shape {tuple(value.shape)}, whose rows cannot be told apart")
        return value.reshape(self.probes, self.sides, -1, last)

    def groups(self, found: Tracked, routing: Routing) -> Tensor:
        """Return sides * probe + side of each routed pair: [pairs].

        Raises:
            UnfollowedError: the tokens are not those of the batch's rows.
        """
        if routing.tokens_total % self.rows:
            self.refuse(found, f"routes {routing.tokens_total} tokens, which are not those of {self.rows} rows")
        return routing.tokens // (routing.tokens_total // self.perturbation.groups)

    def refuse(self, found: Tracked, why: str) -> NoReturn:
        """Raise the error that names the parameter and the remedy."""
        raise UnfollowedError(found.parameter.name, why)

    def _pass_or_refuse(
        self, found: Tracked, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Allow questions about a parameter (its shape, dtype, ...); refuse operations that are not known."""
        result = func(*args, **kwargs)
        if uses(func, result, found.tensor):
            self.refuse(found, f"uses it in `{getattr(func, '__qualname__', None) or func}`")
        return result


def owners_of(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[nn.Module, ...]:
    """Return the modules that hold any of these tensors themselves."""
    wanted = {id(tensor) for tensor in tensors}
    return tuple(
        module for module in model.modules() if any(id(tensor) in wanted for tensor in module.parameters(recurse=False))
    )
