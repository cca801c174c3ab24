"""The card `this`: how long this machine takes, measured by the engine that a node runs, on random tokens."""

import time
from typing import Any

import numpy as np
import psutil
import torch

from peerturb.ids import RoundNumber, Slot
from peerturb.spec import ObjectiveSpec, RunSpec
from peerturb.zo.adapters import attach_adapter
from peerturb.zo.batch import Runner
from peerturb.zo.digest import run_digest
from peerturb.zo.heap import keep_large_blocks
from peerturb.zo.kinds import Task
from peerturb.zo.model import TORCH_DTYPES, build_manifest, load_model, trainable_weights
from peerturb.zo.objective import Objective, TokenSequence
from peerturb.zo.probe import ProbeEngine
from peerturb.zo.quantised import quantise_base
from peerturb.zo.shadow import Shadow, compute_dtype
from peerturb.zo.update import apply_update
from peerturb_node.compute.prepared import choose_device
from peerturb_sim import amounts
from peerturb_sim.factors import Factor
from peerturb_sim.jobs import Job
from peerturb_sim.speeds import Work

_PROBES = 16
"""As many as `peerturb doctor` measures."""
_CODES_MAX = 4_096
"""Codes of the update that is timed; more take in proportion: that many signs exist at a time (`peerturb.zo.plan`)."""


class ThisMachine:
    """The model of a job, loaded here from its folder; answers as `peerturb_sim.speeds.Machine` asks.

    Raises:
        ModelError: it cannot be loaded or perturbed.
    """

    def __init__(self, job: Job, *, watts: float | None, device: str = "auto", threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        keep_large_blocks()  # as a node does
        self._device = choose_device(device)
        self.watts = watts
        is_cuda = self._device.type == "cuda"
        self.memory_bytes = float(
            torch.cuda.get_device_properties(self._device).total_memory if is_cuda else psutil.virtual_memory().total
        )
        name = torch.cuda.get_device_name(self._device) if is_cuda else f"CPU, {torch.get_num_threads()} threads"
        self.title = f"this machine, {name}"
        self.factors: tuple[Factor, ...] = ()
        self.source = "measured just now"
        self._engine = self._load(job)
        self._probe_s: float | None = None
        self._updates: dict[int, float] = {}

    def probing(self, job: Job, probes: int) -> Work:
        """Measure a contribution of a few probes once, after one that warms up; more take in proportion."""
        if self._probe_s is None:
            count = min(_PROBES, job.spec.round.probes_max)
            self._engine.measure(RoundNumber(0), slot=Slot(0), count=count)
            began_s = time.perf_counter()
            self._engine.measure(RoundNumber(1), slot=Slot(0), count=count)
            self._probe_s = (time.perf_counter() - began_s) / count
        return Work(
            seconds=probes * self._probe_s, sum=f"{probes} probes x {amounts.seconds(self._probe_s)} (measured)"
        )

    def updating(self, job: Job, codes: int) -> Work:
        """Measure an update of as many codes, and the digest after it."""
        count = min(codes, _CODES_MAX)
        if count not in self._updates:
            self._update(count)  # warms up
            began_s = time.perf_counter()
            self._update(count)
            self._updates[count] = time.perf_counter() - began_s
        seconds = self._updates[count] * codes / count
        part = "" if count == codes else f" x {codes:,} / {count:,}"
        return Work(seconds=seconds, sum=f"{count:,} codes in {amounts.seconds(self._updates[count])} (measured){part}")

    def _load(self, job: Job) -> ProbeEngine[TokenSequence]:
        rules = job.spec.model
        assert job.model.folder is not None
        model: Any
        model, tokenizer = load_model(job.model.folder, rules.dtype, task=Task.of(job.spec), device=self._device)
        quantise_base(model, rules.quantise)
        attach_adapter(model, rules, seed=job.spec.seed)
        self._manifest = build_manifest(model, rules)
        self._weights = list(trainable_weights(model, self._manifest).values())
        wanted = compute_dtype(_compute(job), rules.dtype, self._device)
        if wanted != TORCH_DTYPES[rules.dtype]:
            model = Shadow(model, wanted).model
        given = job.spec.objective
        # Random tokens have no fields; a head's classes are asked as they are, everything else as text.
        kinds: dict[str, Any] = {"kind": "classes", "classes": given.classes} if given.classes else {"kind": "text"}
        objective = Objective.of(
            ObjectiveSpec(tokens_max=job.tokens, examples_per_probe=given.examples_per_probe, **kinds), model, tokenizer
        )
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        count = max(_PROBES, given.examples_per_probe)
        drawn = np.random.default_rng(0).integers(1, vocabulary, (count, job.tokens), dtype=np.int32)
        start = job.tokens if given.classes else 1
        items = [TokenSequence(tokens=row, start=start, answer=0) for row in drawn]
        return ProbeEngine(Runner(model, self._manifest, objective), _spec(job, objective), items)

    def _update(self, codes: int) -> None:
        drawn = np.random.default_rng(codes).integers(-127, 128, codes).astype(np.int8)
        apply_update(
            self._weights, self._manifest, family="rank1", run_key=1, round=0, slots=[0], counts=[codes], codes=drawn,
            alpha=2.0**-40,
        )  # fmt: skip
        run_digest(self._manifest, self._weights)  # reads its sums back, so a GPU has finished


def _compute(job: Job) -> Any:
    return "auto" if job.compute_dtype == job.spec.model.dtype else job.compute_dtype


def _spec(job: Job, objective: Objective) -> RunSpec:
    return job.spec.model_copy(update={"objective": objective.spec})
