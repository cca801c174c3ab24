"""Three ways to fine-tune the same model on the same data: peerturb, MeZO and backprop with AdamW.

Each is a `Learner`: it does one step at a time on the case's model and counts what it computed. None knows a clock.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from peerturb.manifest import DType
from peerturb.zo.batch import Runner
from peerturb.zo.model import TORCH_DTYPES, build_manifest, trainable_weights
from peerturb.zo.objective import TokenSequence
from peerturb.zo.shadow import Shadow
from peerturb_bench.single import ByteExchange, Case, Trainer, forwards


class Learner(Protocol):
    """One run from the base weights; leaving the context puts them back."""

    forwards: int
    """Sequences that went through the model forwards so far; a backward pass counts as two."""

    @property
    def is_finished(self) -> bool:
        """Whether its schedule has come to its end."""
        ...

    def step(self) -> None:
        """Do one step."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Peerturb:
    """The product in one process: a round of probes on one slot, bytes, exact update."""

    def __init__(self, case: Case, *, seed: int, probes: int, compute: DType = "float32") -> None:
        spec = case.run_spec(seed=seed, probes_max=probes)
        self.forwards = 0
        self._trainer = Trainer(case, ByteExchange(spec), spec, compute=TORCH_DTYPES[compute])
        self._per_step = forwards(spec) * case.objective.per_example * len(case.parts)

    @property
    def is_finished(self) -> bool:
        """See `Learner`."""
        return 0 < self._trainer.spec.round.count <= self._trainer.round_number

    def step(self) -> None:
        """See `Learner`."""
        self._trainer.step()
        self.forwards += self._per_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._trainer.close()


class _Plain:
    """What MeZO and AdamW share: the weights, batches of the data in random order, the way back."""

    is_finished = False

    def __init__(self, case: Case, *, seed: int, batch: int) -> None:
        manifest = build_manifest(case.model, case.spec.model)
        self.case = case
        self.forwards = 0
        self.weights = list(trainable_weights(case.model, manifest).values())
        self.runner = Runner(case.model, manifest, case.objective)
        self._base = [weight.clone() for weight in self.weights]
        self._batches = _batches([item for part in case.parts for item in part], batch, seed)
        self._per_batch = batch * case.objective.per_example

    def batch(self) -> list[TokenSequence]:
        """Return the next batch."""
        return next(self._batches)

    def count(self, passes: int) -> None:
        """Note forward passes over a batch."""
        self.forwards += passes * self._per_batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for weight, base in zip(self.weights, self._base, strict=True):
            weight.copy_(base)


class Mezo(_Plain):
    """MeZO (Malladi et al. 2023, algorithm 1): one Gaussian direction a step, weights moved in place.

    W += e z; loss; W -= 2 e z; loss; W += e z; W -= lr g z with g = (l+ - l-) / 2e, z drawn again from its seed for
    each sweep. Where losses are computed in half precision the weights stay in float32, and a copy is cast for each of
    the two: in weights of half precision themselves steps and updates would be rounded away.
    """

    def __init__(
        self,
        case: Case,
        *,
        seed: int,
        learning_rate: float,
        epsilon: float = 1e-3,
        batch: int = 16,
        compute: DType = "float32",
    ) -> None:
        super().__init__(case, seed=seed, batch=batch)
        is_cast = TORCH_DTYPES[compute] != self.runner.dtype
        self._shadow = Shadow(case.model, TORCH_DTYPES[compute]) if is_cast else None
        if self._shadow is not None:
            self.runner = Runner(self._shadow.model, build_manifest(case.model, case.spec.model), case.objective)
        self._rate, self._epsilon = learning_rate, epsilon
        self._seeds = np.random.default_rng(seed)

    def step(self) -> None:
        """See `Learner`."""
        items, seed = self.batch(), int(self._seeds.integers(2**31))
        self._move(seed, self._epsilon)
        plus = self._loss(items)
        self._move(seed, -2 * self._epsilon)
        minus = self._loss(items)
        self._move(seed, self._epsilon)
        self._move(seed, -self._rate * (plus - minus) / (2 * self._epsilon))
        self.count(2)

    def _loss(self, items: list[TokenSequence]) -> float:
        if self._shadow is not None:
            self._shadow.expire()
            self._shadow.refresh()
        return float(self.runner.losses(items).mean())

    @torch.inference_mode()
    def _move(self, seed: int, factor: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in self.weights:
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=factor)


class AdamW(_Plain):
    """Backprop: the honest ceiling, with the memory it takes."""

    def __init__(self, case: Case, *, seed: int, learning_rate: float, batch: int = 16) -> None:
        super().__init__(case, seed=seed, batch=batch)
        self._parameters = [entry for _, entry in self.runner.parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)

    def step(self) -> None:
        """See `Learner`."""
        rows = self.runner.place(self.case.objective.rows(self.batch()))
        self._optimizer.zero_grad(set_to_none=True)
        self.case.objective.losses(self.runner.forward(rows), rows).mean().backward()
        self._optimizer.step()
        self.count(3)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        super().__exit__()


def _batches(items: list[TokenSequence], size: int, seed: int) -> Iterator[list[TokenSequence]]:
    """Yield batches for ever, each epoch in another order."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(items)).tolist()
        for begin in range(0, len(order) - size + 1, size):
            yield [items[index] for index in order[begin : begin + size]]
