"""Does the model load, is it the run's, can the engine perturb all of it, do the data fit, how fast would it be?"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peerturb.errors import DataError, ModelError, PeerturbError
from peerturb.ids import RoundNumber, Slot
from peerturb.manifest import Manifest
from peerturb.spec import RunSpec
from peerturb_node.doctor.machine import check_disk, check_memory, checkpoint_bytes, memory_needed, tensor_bytes
from peerturb_node.doctor.report import Check, fail, ok, skip
from peerturb_node.settings import NodeSettings

NAMES = ("model", "base weights", "engine", "data", "epsilon", "memory", "compiled loops", "disk", "speed")
"""Of the checks, in their order."""

_SPEED_PROBES = 16


@dataclass(slots=True, kw_only=True)
class Replica:
    """Runs the checks in order; each needs what those before it found."""

    settings: NodeSettings
    spec: RunSpec
    is_speed_measured: bool
    _is_slow: bool = False
    """Whether probes are measured one at a time, with a copy of what is trained."""

    def checks(self) -> Iterator[Check]:
        """Yield one check after the other."""
        try:
            import torch

            from peerturb.zo.base import load_base
            from peerturb.zo.model import TORCH_DTYPES
            from peerturb.zo.shadow import compute_dtype
            from peerturb_node.compute.prepared import choose_device
        except ImportError as error:
            yield fail("model", f"{error.name} is not installed", 'pip install "peerturb[node]"')
            return
        settings, spec = self.settings, self.spec
        if settings.threads:
            torch.set_num_threads(settings.threads)
        source = settings.model or spec.model.name
        try:
            device = choose_device(settings.device)
            started_s = time.perf_counter()
            model, tokenizer, digest = load_base(source, spec, device=device)
        except PeerturbError as error:
            yield fail("model", str(error), "check the name, or give the model's folder with --model")
            for name in NAMES[1:]:
                yield skip(name, "no model")
            return
        seconds = time.perf_counter() - started_s
        yield ok("model", f"{source} loaded on {device} in {seconds:.1f} s ({spec.model.dtype})")
        yield self._base_weights(digest, source)
        dtype = compute_dtype(settings.compute_dtype, spec.model.dtype, device)
        is_cast = dtype != TORCH_DTYPES[spec.model.dtype]
        manifest, evaluated, check = self._engine(model, dtype if is_cast else None)
        yield check
        engine = None
        if manifest is not None:
            engine, check = self._data(evaluated, tokenizer, manifest)
            yield check
            yield self._epsilon(evaluated, manifest)
        else:
            yield skip("data", "the model cannot be trained")
            yield skip("epsilon", "the model cannot be trained")
        embedding: Any = model.get_input_embeddings().weight
        vocabulary, width = embedding.shape
        if device.type == "cpu":
            held = tensor_bytes(model) if evaluated is None else tensor_bytes(model, evaluated)
            if self._is_slow:  # a perturbed copy of what is trained
                held += checkpoint_bytes(manifest or ())
            tokens = self.spec.perturbation.side_count * self.spec.objective.tokens_max
            yield check_memory(memory_needed(held, vocabulary, width, tokens=tokens), is_loaded=True)
        else:
            free, total = torch.cuda.mem_get_info(device)
            yield ok("memory", f"{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB free on {device}, the model loaded")
        yield _compiled_loops()
        yield from check_disk(settings, 0 if manifest is None else checkpoint_bytes(manifest))
        yield self._speed(engine)

    def _base_weights(self, found: str, source: str) -> Check:
        if found == self.spec.model.digest:
            return ok("base weights", f"digest {found[:16]} on both sides")
        return fail(
            "base weights",
            f"the run wants {self.spec.model.name!r} with digest {self.spec.model.digest}, {source!r} has {found}",
            "get the same model (and revision), or name its folder with --model",
        )

    def _epsilon(self, evaluated: Any, manifest: Manifest) -> Check:
        from peerturb.zo.resolution import epsilon_warning

        named = dict(evaluated.named_parameters(remove_duplicate=False))
        pairs = [(entry, named[entry.name]) for entry in manifest]
        epsilon, dtype = self.spec.perturbation.epsilon, pairs[0][1].dtype
        warning = epsilon_warning(pairs, epsilon, dtype)
        if warning is None:
            return ok("epsilon", f"{epsilon:g} shows in {str(dtype).removeprefix('torch.')}")
        remedy = "the run's operator may choose a larger perturbation.epsilon; here --compute-dtype float32 helps"
        return Check(name="epsilon", outcome="ok", found=f"warning: {warning}", remedy=remedy)

    def _engine(self, model: Any, cast: Any) -> tuple[Manifest | None, Any, Check]:
        from peerturb.zo.adapters import attach_adapter
        from peerturb.zo.coverage import text_slowness
        from peerturb.zo.model import build_manifest
        from peerturb.zo.shadow import Shadow

        rules = self.spec.perturbation
        try:
            attach_adapter(model, self.spec.model, seed=self.spec.seed)
            manifest = build_manifest(model, self.spec.model)
            evaluated = model if cast is None else Shadow(model, cast).model
            slowness = text_slowness(evaluated, manifest, rules.family, sides=rules.side_count)
        except ModelError as error:
            remedy = "the run's operator must exclude that parameter (model.exclude)"
            return None, None, fail("engine", str(error), remedy)
        total = sum(entry.elements for entry in manifest)
        found = f"all {len(manifest)} trainable tensors ({total:,} parameters) can be perturbed"
        if slowness is None:
            return manifest, evaluated, ok("engine", found)
        remedy = "the run's operator may exclude what cannot be followed (model.exclude)"
        return (
            manifest,
            evaluated,
            Check(name="engine", outcome="ok", found=f"{found}, but warning: {slowness}", remedy=remedy),
        )

    def _data(self, model: Any, tokenizer: Any, manifest: Manifest) -> tuple[Any, Check]:
        from peerturb.zo.batch import Runner
        from peerturb.zo.coverage import SlowWarning
        from peerturb.zo.objective import Objective
        from peerturb.zo.probe import ProbeEngine
        from peerturb_node.data import local_objective

        settings = self.settings
        if settings.data is None:
            return None, skip("data", "no --data given")
        try:
            objective = Objective.of(local_objective(self.spec.objective, settings), model, tokenizer)
            sequences = objective.load(settings.data.expanduser())
            runner = Runner(model, manifest, objective)
            with warnings.catch_warnings(action="ignore", category=SlowWarning):  # the check `engine` has told
                engine = ProbeEngine(runner, self.spec, sequences, rows_max=settings.rows or None)
            self._is_slow = engine.slowness is not None
        except DataError as error:
            return None, fail("data", str(error), "correct the file, or fit it with --fields or --template")
        except ModelError as error:
            return None, fail("data", str(error), "see the check `engine`")
        return engine, ok("data", f"{settings.data}: {len(sequences):,} sequences")

    def _speed(self, engine: Any) -> Check:
        if engine is None:
            return skip("speed", "needs a model and --data")
        if not self.is_speed_measured:
            return skip("speed", "--skip-speed")
        count = min(_SPEED_PROBES, self.spec.round.probes_max)
        engine.measure(RoundNumber(0), slot=Slot(0), count=count)
        started_s = time.perf_counter()
        engine.measure(RoundNumber(1), slot=Slot(0), count=count)
        rate = count / (time.perf_counter() - started_s)
        round_s = self.spec.round.probes_max / rate
        text = f"about {rate:.0f} probes/s; {self.spec.round.probes_max} probes take {round_s:.1f} s"
        longest_s = self.spec.round.deadline_ms_max / 1e3
        if round_s > longest_s and not self.spec.round.budget_ms:
            return fail(
                "speed",
                f"{text}, the run waits at most {longest_s:.0f} s",
                f"give --probes {max(1, int(rate * longest_s / 2))}, or use a faster computer",
            )
        return ok("speed", text)


def _compiled_loops() -> Check:
    """Numba is optional: its absence costs time, not bits."""
    from peerturb.zo import fast

    if fast.compiled() is None:
        return skip("compiled loops", 'not installed: updates take twice as long; pip install "peerturb[fast]"')
    return ok("compiled loops", "Numba is installed")
