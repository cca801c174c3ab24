"""Probes of a real model by the production engine, for peers that share it: in this process or in a worker of Ray.

Every peer has a part of the data: the file of its slot, counted round the list of files. All parts are measured with
one model; a measurement depends on weights, slot, round and scale alone, not on what was measured before.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peerturb.floats import f32
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import RunSpec
from peerturb.zo.base import load_base
from peerturb.zo.digest import run_digest, short_digest
from peerturb.zo.evaluate import evaluate
from peerturb.zo.exact import ExactEngine
from peerturb.zo.objective import TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb_node.compute.prepared import Prepared
from peerturb_node.settings import NodeSettings
from peerturb_sim.compute import Evaluation, Measurement
from peerturb_sim.scenario import RealSpec
from peerturb_sim.states import States, Step


class RealModel:
    """A model at one of many states, and an engine for each part of the data.

    Raises:
        ModelError: the model cannot be loaded or perturbed.
        DataError: a file cannot be used, or has fewer examples than a probe needs.
        RefusedError: the weights are not the run's.
    """

    def __init__(self, section: RealSpec, spec: RunSpec) -> None:
        torch.set_num_threads(section.threads)
        first, *others = section.data
        settings = NodeSettings(
            coordinator="simulated:1", data=Path(first), eval=Path(section.eval) if section.eval else None,
            model=section.model, device="cpu", rows=section.rows, compute_dtype=section.compute_dtype,
            threads=section.threads,
        )  # fmt: skip
        self._prepared = Prepared(spec, settings)
        self.manifest: Manifest = self._prepared.manifest
        self.weights: list[Tensor] = list(self._prepared.named.values())
        self._states = States(self.weights, self.manifest, spec)
        self.runner = runner = self._prepared.runner
        objective = runner.objective
        parts: list[Sequence[TokenSequence]] = [self._prepared.items]
        parts += [objective.load(Path(name).expanduser()) for name in others]

        def engine(part: int, is_exact: bool = False) -> ProbeEngine[TokenSequence] | ExactEngine[TokenSequence]:
            make = ExactEngine if is_exact else ProbeEngine
            return make(runner, spec, parts[part], rows_max=section.rows or None)

        self._engine = cache(engine)
        """By part of the data and estimator, made when its first peer measures."""
        self._parts = len(parts)
        for number, part in enumerate(parts):
            for name in spec.perturbation.estimators:
                if number == 0 or (name == "spsa" and len(part) < spec.objective.examples_per_probe):
                    self._engine(number, name == "exact")  # says now what is wrong with model or data

    def add(self, step: Step) -> None:
        """Hear of a state."""
        self._states.add(step)

    def go(self, number: int) -> None:
        """Move the weights to a state."""
        if self._states.go(number):
            self._prepared.changed()

    def measure(
        self, number: int, *, slot: int, round: int, scale: float, count: int, is_exact: bool = False
    ) -> Measurement:
        """Measure the probes of a slot at a state, or project its gradient."""
        self.go(number)
        self._prepared.refresh()
        engine = self._engine(slot % self._parts, is_exact)
        result = engine.contribute(RoundNumber(round), slot=Slot(slot), scale=scale, count=count)
        return Measurement(codes=result.codes.tobytes(), loss=f32(result.loss))

    def digest(self, number: int) -> int:
        """Return the short digest of a state."""
        self.go(number)
        return short_digest(run_digest(self.manifest, self.weights))

    def evaluate(self, number: int) -> Evaluation:
        """Evaluate a state on the held-out file."""
        self.go(number)
        self._prepared.refresh()
        found = evaluate(self.runner, self._prepared.held_out)
        assert found is not None  # nothing stops it
        return Evaluation(loss=found.loss, accuracy=found.accuracy, examples=found.examples)


def real_spec(section: RealSpec, spec: RunSpec) -> RunSpec:
    """Return the RunSpec with the model's name and digest in it: a run of the same name and rules on this model.

    Raises:
        ModelError: the model cannot be loaded.
    """
    document = spec.model_dump(mode="json")
    document["objective"] = section.objective.model_dump(mode="json") | {"eval_every": spec.objective.eval_every}
    document["model"] = {
        "name": Path(section.model).name, "digest": "0" * 64, "dtype": section.dtype, "exponents": section.exponents,
    }  # fmt: skip
    wanted = RunSpec.from_document(document, source="the scenario")
    document["model"]["digest"] = load_base(section.model, wanted)[2]
    return RunSpec.from_document(document, source="the scenario")
