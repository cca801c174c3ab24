"""The product with exact projected gradients in one process: a `Learner` beside those of `peerturb_bench.learners`."""

import numpy as np

from peerturb import stepping
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import DType
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.exact import ExactEngine
from peerturb.zo.model import TORCH_DTYPES, build_manifest, trainable_weights
from peerturb.zo.shadow import Shadow
from peerturb.zo.update import apply_update
from peerturb_bench.single import Case


class Exact:
    """One slot whose contributions are exact: a gradient over some examples, thousands of codes, exact update.

    Args:
        codes: of a round.
        examples: behind the gradient of a round.
        carry: what is left of a gradient in the next round's.
        compute: type in which the gradient is computed, as a node's `--compute-dtype`.
    """

    is_finished = False

    def __init__(
        self,
        case: Case,
        *,
        seed: int,
        codes: int,
        examples: int,
        learning_rate: float,
        compute: DType = "float32",
        carry: float = 0.0,
    ) -> None:
        self.spec = exact_spec(case, seed=seed, codes=codes, examples=examples, learning_rate=learning_rate)
        self.forwards, self.bytes, self._round = 0, 0, 0
        self._manifest = build_manifest(case.model, self.spec.model)
        self._weights = list(trainable_weights(case.model, self._manifest).values())
        self._base = [weight.clone() for weight in self._weights]
        runner = Runner(case.model, self._manifest, case.objective)
        wanted = TORCH_DTYPES[compute]
        self._shadow = None if runner.dtype == wanted else Shadow(case.model, wanted)
        if self._shadow is not None:
            runner = Runner(self._shadow.model, self._manifest, case.objective)
        self._engine = ExactEngine(runner, self.spec, [item for part in case.parts for item in part], carry=carry)
        self._per_step = 3 * self._engine.examples * case.objective.per_example
        self._scale = float(np.float32(self.spec.perturbation.initial_scale))

    def step(self) -> None:
        """See `Learner`."""
        spec, number = self.spec, RoundNumber(self._round)
        if self._shadow is not None:
            self._shadow.refresh()
        codes = self._engine.contribute(number, slot=Slot(0), scale=self._scale).codes
        alpha = stepping.step_size(spec.step, number, self._scale, codes, spec.round.count)
        apply_update(
            self._weights, self._manifest, family=spec.perturbation.family, run_key=spec.run_key, round=number,
            slots=[0], counts=[len(codes)], codes=codes, alpha=alpha,
        )  # fmt: skip
        self._scale = stepping.next_scale(self._scale, codes)
        self._round += 1
        self.forwards += self._per_step
        self.bytes += len(codes)
        if self._shadow is not None:
            self._shadow.expire()

    def __enter__(self) -> "Exact":
        return self

    def __exit__(self, *_: object) -> None:
        for weight, base in zip(self._weights, self._base, strict=True):
            weight.copy_(base)


def exact_spec(case: Case, *, seed: int, codes: int, examples: int, learning_rate: float) -> RunSpec:
    """Return the spec of a run of exact contributions alone, with the case's model, family and objective."""
    document = case.spec.model_dump(mode="json")
    document["perturbation"] |= {"estimators": ["exact"], "exact": {"examples": examples, "codes": codes}}
    document["step"] = {"rule": "normalized", "learning_rate": learning_rate}
    document["round"]["count"] = 0
    return RunSpec.from_document({**document, "seed": seed}, source="the benchmark's run")
