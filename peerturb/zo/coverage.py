"""Prove, before a run starts, that the engine perturbs every trainable parameter of a model, completely and rightly.

A tiny forward with perturbed rows is compared with forwards whose parameters are replaced by perturbed copies wherever
they appear: slow, but right for any model. A parameter the two treat differently,
or that the model never uses, is refused by name.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peerturb.errors import ModelError
from peerturb.manifest import Manifest, Parameter
from peerturb.zo.kinds import end_token, kind_of, shared_tables
from peerturb.zo.perturbation import FAMILIES, HALVES
from peerturb.zo.perturbed import PerturbedForward

PROBES = 3
EXAMPLES = 2
TOKENS = 5
EXAMPLES_MAX = PROBES * EXAMPLES
"""Layout of the trial: small numbers, all different, so that a mixed-up layout cannot pass."""

_HALF_EPSILONS = (2.0**-6, 2.0**-4, 2.0**-7)
TRIAL_EPSILONS = {
    torch.float64: (2.0**-6,), torch.float32: (2.0**-6,), torch.float16: _HALF_EPSILONS, torch.bfloat16: _HALF_EPSILONS,
}  # fmt: skip
"""One attempt each, with signs of its own; a right model agrees in one of them. In half precision no epsilon suits all:
too small a one drowns in rounding, too large a one for a deep model's small weights is chaos, and a router may send a
token to another expert by chance."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Largest difference of the two results, as a fraction of the perturbation's own effect. In bfloat16 right models come
to 0.01 to 0.05 at their best epsilon; a matrix of a small model left out to 0.1 and more, of a large one to less."""

ROUNDINGS = {torch.float64: 128, torch.float32: 128, torch.float16: 4, torch.bfloat16: 4}
"""What rounding alone may do, for parameters that hardly move the result: so many times a unit in its last place,
squared."""


class TrialSigns:
    """Reproducible signs for the trial; the run's own generator is not needed here."""

    def __init__(
        self, manifest: Sequence[Parameter], probes: int, *, epsilon: float, only: str | None = None, seed: int = 1
    ) -> None:
        self.epsilon = epsilon
        self._generator = torch.Generator().manual_seed(seed)
        self._only = only
        self._left = {p.index: self._signs(p, probes, p.stacked[0] * p.stacked[1]) for p in manifest}
        self._right = {p.index: self._signs(p, probes, p.stacked[0] * p.stacked[2]) for p in manifest}

    def _signs(self, parameter: Parameter, probes: int, count: int) -> Tensor:
        signs = torch.randint(0, 2, (probes, count), generator=self._generator, dtype=torch.int8) * 2 - 1
        return signs if self._only in (None, parameter.name) else signs * 0

    def left(self, parameter: Parameter) -> Tensor:
        """See `Signs`."""
        return self._left[parameter.index]

    def right(self, parameter: Parameter) -> Tensor:
        """See `Signs`."""
        return self._right[parameter.index]

    def dense(self, parameter: Parameter, probe: int) -> Tensor:
        """See `Signs`: the outer product of the factors, so that both families can be compared with one reference."""
        matrices, rows, columns = parameter.stacked
        left = self._left[parameter.index][probe].view(matrices, rows, 1)
        if parameter.kind == "vector":
            return left.view(rows, 1)
        return (left * self._right[parameter.index][probe].view(matrices, 1, columns)).view(matrices * rows, columns)


class Replaced(TorchFunctionMode):
    """Context in which each parameter is a perturbed copy of itself: the same for all rows, right in any operation."""

    def __init__(self, parameters: Sequence[tuple[Parameter, Tensor]], signs: TrialSigns, probe: int, step: float):
        super().__init__()
        self._parameters = {id(tensor): (entry, tensor) for entry, tensor in parameters}
        self._signs, self._probe, self._step = signs, probe, step

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Perform `func` on perturbed copies."""
        given = {name: self._copy(value) for name, value in (kwargs or {}).items()}
        return func(*(self._copy(value) for value in args), **given)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(self._copy(item) for item in value) if type(value) in (list, tuple) else value
        found = self._parameters.get(id(value))
        if found is None:
            return value
        entry, tensor = found
        z = self._signs.dense(entry, self._probe).view(tensor.shape).to(tensor.device, tensor.dtype)
        return tensor + z * (self._step * 2.0**entry.exponent)


Trial = Callable[[Tensor], Tensor]
"""A forward over made-up examples: their numbers, int64[n] below `EXAMPLES_MAX` on the CPU, to outputs [n, ...]."""

Parameters = Sequence[tuple[Parameter, Tensor]]
"""What is trained: manifest entries and the model's tensors."""


def check_coverage(model: Any, manifest: Manifest, family: str = "rank1", *, sides: int = 2) -> None:
    """Refuse a transformers model that the engine cannot perturb wholly: see `check_trial`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [(entry, named[entry.name]) for entry in manifest]
    check_trial(text_trial(model), parameters, family, shared=shared_tables(model), sides=sides)


def text_trial(model: Any) -> Trial:
    """Return the trial of a transformers model: its logits over texts of `TOKENS` tokens."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    device = next(model.parameters()).device
    ids = (torch.arange(EXAMPLES_MAX * TOKENS, device=device).view(EXAMPLES_MAX, TOKENS) * 7 + 3) % vocabulary
    kind, end = kind_of(model), end_token(model)
    if end is not None:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end

    def forward(numbers: Tensor) -> Tensor:
        chosen = ids[numbers.to(device)]
        given: dict[str, Any] = {} if kind == "classes" else {"use_cache": False}
        if kind == "seq2seq":
            given["decoder_input_ids"] = chosen[:, 1:]  # another length: the two must not be mixed up
        logits: Tensor = model(input_ids=chosen, **given).logits
        return logits

    return forward


def check_owners(
    trial: Trial,
    parameters: Parameters,
    family: str,
    *,
    shared: Collection[str] = (),
    sides: int = 2,
    owners: Sequence[nn.Module] | None = None,
) -> Sequence[nn.Module] | None:
    """Check a model as `check_trial` does; return where its operations must be seen: in `owners`, or (None) anywhere.

    A parameter may be used outside the module that holds it. Then all operations are seen, which is slower.
    """
    if owners is not None:
        try:
            check_trial(trial, parameters, family, shared=shared, sides=sides, owners=owners)
        except ModelError:
            pass
        else:
            return owners
    check_trial(trial, parameters, family, shared=shared, sides=sides)
    return None


@torch.inference_mode()
def check_trial(
    trial: Trial,
    parameters: Parameters,
    family: str,
    *,
    shared: Collection[str] = (),
    sides: int = 2,
    owners: Sequence[nn.Module] | None = None,
) -> None:
    """Refuse a model that the engine cannot perturb wholly.

    Args:
        shared, owners: see `PerturbedForward`.
        sides: see `Perturbation`.

    Raises:
        ModelError: names the first parameter that is unused, used in an unknown way or perturbed wrongly.
    """
    manifest = [entry for entry, _ in parameters]
    attempts = [
        TrialSigns(manifest, PROBES, epsilon=epsilon, seed=seed)
        for seed, epsilon in enumerate(TRIAL_EPSILONS[parameters[0][1].dtype], 1)
    ]
    _perturbed(trial, parameters, attempts[0], family, shared, sides, owners)
    # Again: a tensor that the model derives once and keeps would miss the second forward.
    result, used = _perturbed(trial, parameters, attempts[0], family, shared, sides, owners)
    unused = [entry.name for entry in manifest if entry.name not in used]
    if unused:
        raise ModelError(
            f"the model never uses the parameter {unused[0]}"
            f"{f' (nor {len(unused) - 1} more)' if len(unused) > 1 else ''} in a forward, so it cannot be "
            f'trained. Keep it frozen: add "{unused[0]}" (or a pattern that covers it) to model.exclude'
        )
    if _agrees(trial, parameters, attempts[0], result):
        return
    for signs in attempts[1:]:
        result, _ = _perturbed(trial, parameters, signs, family, shared, sides, owners)
        if _agrees(trial, parameters, signs, result):
            return
    if owners is not None:
        raise ModelError("a parameter is used outside the module that holds it")
    raise _culprit(trial, parameters, family, shared, sides)


def _perturbed(
    trial: Trial,
    parameters: Parameters,
    signs: TrialSigns,
    family: str,
    shared: Collection[str],
    sides: int,
    owners: Sequence[nn.Module] | None = None,
) -> tuple[Tensor, set[str]]:
    first = parameters[0][1]
    perturbation = FAMILIES[family](
        signs, probes=PROBES, epsilon=signs.epsilon, dtype=first.dtype, device=first.device, sides=sides
    )
    numbers = torch.arange(EXAMPLES_MAX).view(PROBES, 1, EXAMPLES).expand(-1, sides, -1).flatten()
    with PerturbedForward(parameters, perturbation, rows=len(numbers), shared=shared, owners=owners) as mode:
        result = trial(numbers)
    return result.float() if result.dtype in HALVES else result, mode.used


def _agrees(trial: Trial, parameters: Parameters, signs: TrialSigns, result: Tensor) -> bool:
    """Compare with weights replaced, relative to how far the perturbation moves the result."""
    numbers = torch.arange(EXAMPLES_MAX).view(PROBES, EXAMPLES)
    plain = torch.stack([trial(part) for part in numbers]).to(result.dtype)
    groups = result.view(-1, *plain.shape[1:])
    dtype = parameters[0][1].dtype
    difference = effect = 0.0
    for group, found in enumerate(groups):
        probe, side = divmod(group, len(groups) // PROBES)
        with Replaced(parameters, signs, probe, -signs.epsilon if side else signs.epsilon):
            truth = trial(numbers[probe]).to(result.dtype)
        difference += float((found - truth).square().sum())
        effect += float((truth - plain[probe]).square().sum())
    floor = float(plain.square().sum()) * ROUNDINGS[dtype] * float(torch.finfo(dtype).eps) ** 2
    return bool(difference <= max(TOLERANCE[dtype] ** 2 * effect, floor))


def _culprit(trial: Trial, parameters: Parameters, family: str, shared: Collection[str], sides: int) -> ModelError:
    """Find the first parameter whose own perturbation comes out wrong."""
    manifest = [entry for entry, _ in parameters]
    epsilon = max(TRIAL_EPSILONS[parameters[0][1].dtype])  # what a single parameter does must stand out
    for entry in manifest:
        signs = TrialSigns(manifest, PROBES, epsilon=epsilon, only=entry.name)
        result, _ = _perturbed(trial, parameters, signs, family, shared, sides)
        if not _agrees(trial, parameters, signs, result):
            return ModelError(
                f"the parameter {entry.name} cannot be perturbed: the model uses it in a way the engine does not "
                f'follow (a trial forward came out wrong). Keep it frozen: add "{entry.name}" to model.exclude'
            )
    return ModelError("a trial forward of the perturbed model came out wrong, and no single parameter explains it")
