"""Train in one process what a network would train: several virtual slots, one model, no coordinator and no clock.

Probes, bytes, scale, step and update come from the production code (`ProbeEngine`, `codec`, `apply_update`); only what
happens between sealing and applying is left out, because there nothing happens to the numbers. `FloatExchange` is the
yardstick: the same probes, their projected gradients as f32 instead of bytes. Knows nothing of targets or statistics.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerturb import stepping
from peerturb.errors import DataError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import ModelSpec, ObjectiveSpec, RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.directions import Probes, left_signs, right_signs
from peerturb.zo.evaluate import evaluate
from peerturb.zo.model import base_digest, build_manifest, load_model, positions_max, trainable_weights
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.shadow import Shadow
from peerturb.zo.update import apply_update
from peerturb_node.demo import BASE_MODEL_FOLDER, RUN_FILE
from peerturb_node.demo.task import write_task

TOKENS_MAX = 64
"""Tokens in a piece of the text."""

HELDOUT_FRACTION = 0.1
"""Of the text, at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, what it is to learn, and each slot's private share of the data."""

    name: str
    """For people, for instance `stories260k on tinyshakespeare`."""
    model: Any
    spec: RunSpec
    objective: Objective
    parts: tuple[list[TokenSequence], ...]
    """One private part for each slot."""
    heldout: list[TokenSequence]

    def run_spec(self, *, seed: int, probes_max: int) -> RunSpec:
        """Return the spec of one run: the seed changes perturbations and draws and nothing else."""
        # Validated afresh, not copied: a copy would keep the cached digest of the original.
        document = self.spec.model_dump(mode="json")
        document["round"]["probes_max"] = probes_max
        return RunSpec.from_document({**document, "seed": seed}, source="the benchmark's run")


def forwards(spec: RunSpec) -> int:
    """Return the examples that go through the model in a slot's round: all sides of its probes, and a clean loss."""
    clean = 1 if spec.perturbation.sides == "one" else 0
    return (spec.perturbation.side_count * spec.round.probes_max + clean) * spec.objective.examples_per_probe


def shared_folder() -> Path | None:
    """Return the folder with test models and data (`PEERTURB_SHARED`, or the checkout's neighbour), if there is one."""
    given = Path(os.environ.get("PEERTURB_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
    return next((folder for folder in (given / "data", given) if (folder / "models").is_dir()), None)


def load_case(*, slots: int, heldout: int) -> Case:
    """Load stories260k and tinyshakespeare, or the demo's model and task where the shared folder is missing.

    Args:
        slots: private parts of the training data.
        heldout: most sequences to hold out.
    """
    folder = shared_folder()
    return (
        demo_case(slots=slots, heldout=heldout) if folder is None else text_case(folder, slots=slots, heldout=heldout)
    )


def text_case(folder: Path, *, slots: int, heldout: int) -> Case:
    """Cut tinyshakespeare into whole pieces: the end held out, the rest dealt in one stretch for each slot."""
    objective = ObjectiveSpec(kind="text", tokens_max=TOKENS_MAX, eval_every=0)
    model, tokenizer = load_model(folder / "models" / "stories260k", "float32")
    bound = Objective(objective, tokenizer, positions_max=positions_max(model))
    pieces = [s for s in bound.load(folder / "corpora" / "tinyshakespeare.txt") if len(s.tokens) == TOKENS_MAX]
    cut = len(pieces) - int(len(pieces) * HELDOUT_FRACTION)
    if cut < slots or cut == len(pieces):
        raise DataError(f"{folder / 'corpora' / 'tinyshakespeare.txt'} has only {len(pieces)} pieces of text")
    edges = np.linspace(0, cut, slots + 1).astype(int)
    spaced = np.linspace(cut, len(pieces) - 1, min(heldout, len(pieces) - cut)).astype(int)
    return Case(
        name="stories260k on tinyshakespeare",
        model=model,
        spec=RunSpec(
            name="single",
            model=ModelSpec(name="stories260k", digest=base_digest(model, "float32")),
            objective=objective,
        ),
        objective=bound,
        parts=tuple(pieces[begin:end] for begin, end in pairwise(edges)),
        heldout=[pieces[index] for index in spaced],
    )


def demo_case(*, slots: int, heldout: int) -> Case:
    """Take the demo's model, task and settings; a constant learning rate, as many probes as asked in any time."""
    demo = RunSpec.from_toml(RUN_FILE)
    model, tokenizer = load_model(BASE_MODEL_FOLDER, demo.model.dtype)
    bound = Objective(demo.objective, tokenizer, positions_max=positions_max(model))
    with tempfile.TemporaryDirectory() as folder:
        files = write_task(Path(folder), nodes=slots, heldout_examples=heldout)
        parts = tuple(bound.load(path) for path in files.train)
        held = bound.load(files.heldout)
    document = demo.model_dump(mode="json")
    document["step"].update(schedule="constant", warmup_rounds=0)
    document["round"].update(count=0, budget_ms=0)
    spec = RunSpec.from_document(document, source=str(RUN_FILE))
    return Case(name="the demo's model and task", model=model, spec=spec, objective=bound, parts=parts, heldout=held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What an exchange needs to know of a round."""

    number: RoundNumber
    spec: RunSpec
    manifest: Manifest
    engines: Sequence[ProbeEngine[TokenSequence]]
    """One for each slot, slots 0.. in order."""
    weights: Sequence[Tensor]
    """The manifest's tensors, in its order; the exchange updates them in place."""


class Exchange(Protocol):
    """How the measurements of a round become an update of the weights."""

    def step(self, round: Round) -> None:
        """Measure a round on every slot and apply it."""
        ...


class ByteExchange:
    """The product: int8 codes in units of a shared scale that follows the sealed codes.

    Args:
        is_settled: start from the scale that suits round 0 instead of the RunSpec's, to tell what finding it costs.
    """

    def __init__(self, spec: RunSpec, *, is_settled: bool = False) -> None:
        self.scale = float(np.float32(spec.perturbation.initial_scale))
        self._is_settled = is_settled

    def step(self, round: Round) -> None:
        """See `Exchange`."""
        if self._is_settled and round.number == 0:
            gradients = np.concatenate(_measured(round))
            self.scale = float(np.float32(np.sqrt(np.nanmean(gradients**2)) / stepping.TARGET_RMS))
        codes = [
            engine.contribute(round.number, slot=Slot(slot), scale=self.scale).codes
            for slot, engine in enumerate(round.engines)
        ]
        sealed = np.concatenate(codes)
        spec = round.spec
        alpha = stepping.step_size(spec.step, round.number, self.scale, sealed, spec.round.count)
        apply_update(
            round.weights, round.manifest, family=spec.perturbation.family, run_key=spec.run_key, round=round.number,
            slots=range(len(codes)), counts=[len(part) for part in codes], codes=sealed, alpha=float(alpha),
        )  # fmt: skip
        self.scale = stepping.next_scale(self.scale, sealed)


class FloatExchange:
    """The yardstick: projected gradients g as f32 scalars, W <- W - lr / (n rms(g)) * sum of g z.

    Args:
        noise: relative size of a Gaussian error put on every g. Not zero, but far below a byte's rounding, it shows how
            far two runs drift apart for no reason at all.
        noise_seed: of the generator of that error.
    """

    def __init__(self, *, noise: float = 0.0, noise_seed: int = 0) -> None:
        self._noise = noise
        self._generator = np.random.default_rng(noise_seed)

    def step(self, round: Round) -> None:
        """See `Exchange`."""
        measured = _measured(round)
        gradients = np.concatenate(measured)
        if self._noise:
            gradients *= 1 + self._noise * self._generator.standard_normal(len(gradients))
        apply_floats(round, [len(part) for part in measured], gradients.astype(np.float32))


def _measured(round: Round) -> list[NDArray[np.float64]]:
    """Return every slot's projected gradients."""
    return [
        engine.projected_gradients(engine.measure(round.number, slot=Slot(slot)))
        for slot, engine in enumerate(round.engines)
    ]


def apply_floats(round: Round, counts: Sequence[int], gradients: NDArray[np.float32]) -> None:
    """Apply a round of f32 scalars by the `normalized` rule, in place, for `rank1`; scalars not finite are void.

    Where every g is a whole multiple of one power of two this does the same to every bit as `apply_update`.

    Args:
        counts: scalars of slots 0.. in order.
        gradients: their samples 0.., slot after slot.
    """
    assert round.spec.perturbation.family == "rank1"
    assert round.spec.step.rule == "normalized"
    is_valid = np.isfinite(gradients)
    wide = gradients[is_valid].astype(np.float64)
    squares = float(np.dot(wide, wide))
    if squares == 0.0:
        return
    rate = stepping.learning_rate(round.spec.step, round.number, round.spec.round.count)
    alpha = float(np.float32(rate / (len(wide) * np.sqrt(squares / len(wide)))))
    slots = np.repeat(np.arange(len(counts)), counts)
    samples = np.concatenate([np.arange(count) for count in counts])
    probes = Probes.of(run_key=round.spec.run_key, round=round.number, slots=slots[is_valid], samples=samples[is_valid])
    column = torch.from_numpy(gradients[is_valid])[:, None]
    for parameter, weight in zip(round.manifest, round.weights, strict=True):
        if parameter.kind == "stack":
            raise NotImplementedError(
                f"{parameter.name} is a stack of matrices; the yardstick knows vectors and matrices"
            )
        scaled = left_signs(parameter, probes).to(torch.float32) * column
        if parameter.kind == "vector":
            total = scaled.sum(0)
        else:
            total = scaled.t() @ right_signs(parameter, probes).to(torch.float32)
        weight.sub_(total.view(weight.shape).mul_(alpha * 2.0**parameter.exponent))


class Trainer:
    """One run: the case's model from its base weights, every slot in turn, round after round.

    The model's own tensors are trained; `close` puts the base weights back, so that the next run can have them.

    Args:
        exchange: how measurements become updates.
        spec: of this run; `Case.run_spec` makes it.
        compute: type in which the probes' losses are computed, as a node's `--compute-dtype`; None: the weights'.
    """

    def __init__(self, case: Case, exchange: Exchange, spec: RunSpec, *, compute: torch.dtype | None = None) -> None:
        self.case = case
        self.spec = spec
        self.round_number = 0
        self._exchange = exchange
        manifest = build_manifest(case.model, spec.model)
        weights = list(trainable_weights(case.model, manifest).values())
        self._base = [weight.clone() for weight in weights]
        self._runner = Runner(case.model, manifest, case.objective)
        is_cast = compute is not None and compute != self._runner.dtype
        self._shadow = Shadow(case.model, compute) if compute is not None and is_cast else None
        probed = self._runner
        if self._shadow is not None:
            probed = Runner(self._shadow.model, manifest, case.objective)
        engines = [ProbeEngine(probed, spec, part) for part in case.parts]
        self._manifest, self._weights, self._engines = manifest, weights, engines

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        """Do one round on all slots."""
        if self._shadow is not None:
            self._shadow.refresh()
        self._exchange.step(
            Round(
                number=RoundNumber(self.round_number),
                spec=self.spec,
                manifest=self._manifest,
                engines=self._engines,
                weights=self._weights,
            )
        )
        self.round_number += 1
        if self._shadow is not None:
            self._shadow.expire()

    def heldout_loss(self) -> float:
        """Return the mean loss of the held-out sequences, in nats a token (or an answer)."""
        evaluation = evaluate(self._runner, self.case.heldout)
        assert evaluation is not None  # nothing stops it
        return evaluation.loss

    def close(self) -> None:
        """Put the base weights back."""
        for weight, base in zip(self._weights, self._base, strict=True):
            weight.copy_(base)
