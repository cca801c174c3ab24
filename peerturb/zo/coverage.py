"""Prove, before a run starts, that the engine perturbs every trainable parameter of a model, completely and rightly.

A tiny forward with perturbed rows is compared with forwards whose parameters are replaced by perturbed copies wherever
they appear: slow, but right for any model. A parameter the two treat differently forces the engine to measure in that
slow way too; one that the model never uses is refused by name.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peerturb.errors import ModelError, UnfollowedError
from peerturb.manifest import Manifest, Parameter
from peerturb.zo.families import FAMILIES
from peerturb.zo.kinds import end_token, kind_of, shared_tables
from peerturb.zo.perturbation import HALVES
from peerturb.zo.perturbed import PerturbedForward
from peerturb.zo.shortage import is_out_of_memory
from peerturb.zo.written import Replaced

if TYPE_CHECKING:
    from peerturb.zo.batch import Evaluator

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
        self,
        manifest: Sequence[Parameter],
        probes: int,
        *,
        epsilon: float,
        device: torch.device,
        only: str | None = None,
        seed: int = 1,
    ) -> None:
        self.epsilon = epsilon
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._only = only
        self._left = {p.index: self._signs(p, probes, p.stacked[0] * p.stacked[1]) for p in manifest}
        self._right = {p.index: self._signs(p, probes, p.stacked[0] * p.stacked[2]) for p in manifest}

    def _signs(self, parameter: Parameter, probes: int, count: int) -> Tensor:
        signs = torch.randint(0, 2, (probes, count), generator=self._generator, dtype=torch.int8) * 2 - 1
        return (signs if self._only in (None, parameter.name) else signs * 0).to(self._device)

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


Trial = Callable[[Tensor], Tensor]
"""A forward over made-up examples: their numbers, int64[n] below `EXAMPLES_MAX` on the CPU, to outputs [n, ...]."""

Parameters = Sequence[tuple[Parameter, Tensor]]
"""What is trained: manifest entries and the model's tensors."""


def check_coverage(model: Any, manifest: Manifest, family: str = "rank1", *, sides: int = 2) -> None:
    """Refuse a transformers model that the engine cannot perturb wholly: see `check_trial`."""
    check_trial(text_trial(model), _pairs(model, manifest), family, shared=shared_tables(model), sides=sides)


def text_slowness(model: Any, manifest: Manifest, family: str, *, sides: int = 2) -> str | None:
    """Return what measuring a transformers model slowly costs; None where all its rows can be perturbed at once.

    Raises:
        ModelError: it cannot be perturbed at all.
    """
    try:
        check_coverage(model, manifest, family, sides=sides)
    except UnfollowedError as error:
        parameters = _pairs(model, manifest)
        check_written(text_trial(model), parameters, error)
        return slowness(error, parameters[0][1].dtype)
    return None


def _pairs(model: nn.Module, manifest: Manifest) -> list[tuple[Parameter, Tensor]]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return [(entry, named[entry.name]) for entry in manifest]


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


class SlowWarning(RuntimeWarning):
    """Losses are measured one probe and side at a time."""


def slowness_of(evaluator: "Evaluator[Any]", family: str, *, sides: int = 2) -> str | None:
    """Check an evaluator, set the `owners` it shall use; return None if all its rows can be perturbed at once.

    If not, each side of each probe must be measured by itself (`peerturb.zo.written`): the sentence says why.

    Raises:
        ModelError: that would not be right either; see `check_written`.
    """
    try:
        evaluator.owners = check_owners(
            evaluator.trial,
            evaluator.parameters,
            family,
            shared=getattr(evaluator, "shared", frozenset()),
            sides=sides,
            owners=evaluator.owners,
        )
    except UnfollowedError as error:
        check_written(evaluator.trial, evaluator.parameters, error)
        return slowness(error, evaluator.dtype)
    return None


def slowness(error: UnfollowedError, dtype: torch.dtype) -> str:
    """Say what it costs that a parameter cannot be followed, and how to avoid it."""
    name = str(dtype).removeprefix("torch.")
    lost = f" The copies are {name}: what epsilon adds to a weight several hundred times as large rounds away."
    return (
        "losses are measured the slow way, one forward for each probe and side instead of one for many, with perturbed "
        f"copies of the weights: the parameter {error.parameter} cannot be perturbed row by row, since the model "
        f"{error.why}.{lost if dtype in HALVES else ''} To measure fast, freeze it and others like it: add "
        f'"{error.parameter}" (or a pattern that covers it) to model.exclude'
    )


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
        ModelError: names the first parameter that is unused; an `UnfollowedError` one that is used in an unknown way or
            perturbed wrongly.
    """
    manifest = [entry for entry, _ in parameters]
    attempts = [
        TrialSigns(manifest, PROBES, epsilon=epsilon, device=parameters[0][1].device, seed=seed)
        for seed, epsilon in enumerate(TRIAL_EPSILONS[parameters[0][1].dtype], 1)
    ]
    try:
        _perturbed(trial, parameters, attempts[0], family, shared, sides, owners)
    except ModelError:
        raise
    except Exception as error:  # shapes that are wrong once rows have weights of their own, and whatever follows
        if is_out_of_memory(error):  # says nothing about the model
            raise
        trial(torch.arange(EXAMPLES_MAX))  # if that fails too, it is not the perturbation's fault
        raise _breaker(trial, parameters, attempts[0], family, shared, sides) from error
    # Again: a tensor that the model derives once and keeps would miss the second forward.
    result, used = _perturbed(trial, parameters, attempts[0], family, shared, sides, owners)
    _check_used(manifest, used)
    if _agrees(trial, parameters, attempts[0], result):
        return
    for signs in attempts[1:]:
        result, _ = _perturbed(trial, parameters, signs, family, shared, sides, owners)
        if _agrees(trial, parameters, signs, result):
            return
    if owners is not None:
        raise ModelError("a parameter is used outside the module that holds it")
    raise _culprit(trial, parameters, family, shared, sides)


@torch.inference_mode()
def check_written(trial: Trial, parameters: Parameters, error: UnfollowedError) -> None:
    """Refuse a model that cannot be measured with its weights written out either.

    Raises:
        UnfollowedError: `error`, where rows depend on each other, or are all alike and do not show it.
        ModelError: names a parameter that is unused.
    """
    manifest, dtype = [entry for entry, _ in parameters], parameters[0][1].dtype
    numbers = torch.arange(EXAMPLES_MAX)
    signs = TrialSigns(manifest, 1, epsilon=TRIAL_EPSILONS[dtype][0], device=parameters[0][1].device)
    noise = partial(signs.dense, probe=0)
    with Replaced(parameters, noise, signs.epsilon):
        trial(numbers)
    # Again: a tensor that the model derives once and keeps would miss the second forward.
    with Replaced(parameters, noise, signs.epsilon) as mode:
        together = trial(numbers)
        alone = [trial(number) for number in numbers.split(1)]
    _check_used(manifest, mode.used)
    if any(one.shape[1:] != together.shape[1:] for one in alone):
        return  # padded to the longest: only losses can be compared, and whoever pads does
    apart = torch.cat(alone).double()
    spread = float((apart - apart.mean(0)).square().sum())
    difference = float((together.double() - apart).square().sum())
    if not spread or difference > max(TOLERANCE[dtype] ** 2 * spread, _floor(apart, dtype)):
        raise error


def _check_used(manifest: Sequence[Parameter], used: Collection[str]) -> None:
    unused = [entry.name for entry in manifest if entry.name not in used]
    if unused:
        raise ModelError(
            f"the model never uses the parameter {unused[0]}"
            f"{f' (nor {len(unused) - 1} more)' if len(unused) > 1 else ''} in a forward, so it cannot be "
            f'trained. Keep it frozen: add "{unused[0]}" (or a pattern that covers it) to model.exclude'
        )


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
        with Replaced(parameters, partial(signs.dense, probe=probe), -signs.epsilon if side else signs.epsilon):
            truth = trial(numbers[probe]).to(result.dtype)
        difference += float((found - truth).square().sum())
        effect += float((truth - plain[probe]).square().sum())
    return bool(difference <= max(TOLERANCE[dtype] ** 2 * effect, _floor(plain, dtype)))


def _breaker(
    trial: Trial, parameters: Parameters, signs: TrialSigns, family: str, shared: Collection[str], sides: int
) -> ModelError:
    """Find the first parameter that breaks a forward when it is followed."""
    for pair in parameters:
        try:
            _perturbed(trial, [pair], signs, family, shared, sides)
        except ModelError as error:
            return error
        except Exception:
            return UnfollowedError(pair[0].name, "fails when every row has a value of its own of it")
    return UnfollowedError(parameters[0][0].name, "fails when every row has weights of its own")


def _floor(plain: Tensor, dtype: torch.dtype) -> float:
    """Return the squared difference that rounding alone may make."""
    return float(plain.square().sum()) * ROUNDINGS[dtype] * float(torch.finfo(dtype).eps) ** 2


def _culprit(trial: Trial, parameters: Parameters, family: str, shared: Collection[str], sides: int) -> ModelError:
    """Find the first parameter whose own perturbation comes out wrong."""
    manifest = [entry for entry, _ in parameters]
    epsilon = max(TRIAL_EPSILONS[parameters[0][1].dtype])  # what a single parameter does must stand out
    for entry in manifest:
        signs = TrialSigns(manifest, PROBES, epsilon=epsilon, device=parameters[0][1].device, only=entry.name)
        result, _ = _perturbed(trial, parameters, signs, family, shared, sides)
        if not _agrees(trial, parameters, signs, result):
            return UnfollowedError(
                entry.name, "uses it in a way the engine does not follow (a trial forward came out wrong)"
            )
    return ModelError("a trial forward of the perturbed model came out wrong, and no single parameter explains it")
