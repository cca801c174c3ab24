"""What is to be computed: a model's size and a run's rules, from a RUN.toml, a model folder or plain numbers."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peerturb.errors import ModelError, SpecError
from peerturb.spec import ModelSpec, RunSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED_BYTES = {"nf4": 0.5625, "fp4": 0.5625, "int8": 1.0}
"""Of a parameter in a packed base; with four bits a scale of four bytes for every 64 of them."""
_JSON_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a plan needs to know of a model."""

    name: str
    parameters: int
    trained: int
    vocabulary: int = 0
    width: int = 0
    """0 for both where only a number of parameters is known: activations are then left out of the memory."""
    folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, as far as time, bytes and memory depend on it."""

    model: ModelSize
    spec: RunSpec
    """Its model's digest may be a stand-in: nothing is computed with it."""
    tokens: int
    """Of an example."""
    compute_dtype: str
    """Type of the losses."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, and of their copy where losses have another type; of a packed base as if all were."""
        dtype = self.spec.model.dtype
        if self.spec.model.quantise is not None:
            return round(self.model.parameters * PACKED_BYTES[self.spec.model.quantise])
        copy = BYTES[self.compute_dtype] if self.compute_dtype != dtype else 0
        return self.model.parameters * (BYTES[dtype] + copy)

    def passes(self, probes: int) -> int:
        """Return the examples that the model reads for a contribution: both sides, or one and a clean loss."""
        rules = self.spec.perturbation
        sides = probes * 2 if rules.side_count == 2 else probes + 1
        return sides * self.spec.objective.examples_per_probe


def job_of(
    run: Path | None, *, model: Path | None, parameters: float | None, trained: float | None, dtype: str | None,
    compute_dtype: str | None, tokens: int | None, examples: int | None, probes: int | None, rounds: int | None,
) -> Job:  # fmt: skip
    """Put a job together; what is given by a flag stands above what RUN.toml says.

    Raises:
        SpecError: RUN.toml is wrong, no model size is given, two are, or something is out of bounds.
        ModelError: the folder's weights cannot be read.
    """
    spec = _spec(run, dtype=dtype, examples=examples, probes=probes, rounds=rounds, tokens=tokens)
    if spec.perturbation.family != "rank1":
        raise SpecError('plans are for family "rank1": the steps of "dense" have not been measured (docs/LOG.md)')
    if model is not None and parameters is not None:
        raise SpecError("give the model's folder (--model) or its size (--parameters), not both")
    if model is None and parameters is None and run is not None and Path(spec.model.name).is_dir():
        model = Path(spec.model.name)
    if parameters is not None:
        size = ModelSize(name=_name(run, spec), parameters=_count(parameters, "--parameters"), trained=0)
    elif model is not None:
        size = read_size(model.expanduser(), exclude=spec.model.exclude)
    else:
        raise SpecError("how large is the model? Give its folder (--model DIR) or its size (--parameters 7e9)")
    if spec.model.adapter is not None and trained is None:
        raise SpecError("the run trains an adapter: how many parameters has it? `peerturb model` says; give --trained")
    count = _count(trained, "--trained") if trained is not None else size.trained or size.parameters
    if count > size.parameters and spec.model.adapter is None:
        raise SpecError(f"--trained {count:,} is more than the {size.parameters:,} parameters of the model")
    size = ModelSize(
        name=size.name, parameters=size.parameters, trained=count, vocabulary=size.vocabulary, width=size.width,
        folder=size.folder,
    )  # fmt: skip
    chosen = compute_dtype or spec.model.dtype
    if chosen not in BYTES:
        raise SpecError(f"--compute-dtype {chosen!r} is none of {', '.join(BYTES)}")
    return Job(model=size, spec=spec, tokens=spec.objective.tokens_max, compute_dtype=chosen)


def _spec(run: Path | None, **flags: Any) -> RunSpec:
    """Return RUN.toml (or defaults) with the flags' values put in."""
    if run is not None:
        document = RunSpec.from_toml(run).model_dump()
    else:
        document = RunSpec(name="plan", model=ModelSpec(name="plan", digest="0" * 64)).model_dump()
    places = {
        "dtype": ("model", "dtype"),
        "examples": ("objective", "examples_per_probe"),
        "tokens": ("objective", "tokens_max"),
        "probes": ("round", "probes_max"),
        "rounds": ("round", "count"),
    }
    for flag, value in flags.items():
        if value is not None:
            section, key = places[flag]
            document[section][key] = value
    return RunSpec.from_document(document, source="the command line" if run is None else f"{run} with these flags")


def _name(run: Path | None, spec: RunSpec) -> str:
    return "a model" if run is None else spec.model.name


def _count(value: float, flag: str) -> int:
    if not (math.isfinite(value) and 1 <= value <= 1e13):
        raise SpecError(f"{flag} {value:g} is no number of parameters; write for instance 7e9")
    return round(value)


def read_size(folder: Path, *, exclude: tuple[str, ...] = ()) -> ModelSize:
    """Count the parameters of a Hugging Face folder from the headers of its .safetensors files; no weight is read.

    Raises:
        ModelError: no such folder, no such files, or they are damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}; give --parameters if the model is not here")
    total = trained = 0
    for name, count in _tensors(folder):
        total += count
        trained += 0 if any(fnmatchcase(name, pattern) for pattern in exclude) else count
    if not trained:
        raise ModelError(f"model.exclude leaves nothing of {folder} to train")
    config = _json(folder / "config.json")
    config = config.get("text_config") or config
    vocabulary, width = (config.get(key) for key in ("vocab_size", "hidden_size"))
    return ModelSize(
        name=folder.resolve().name,
        parameters=total,
        trained=trained,
        vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
        width=width if isinstance(width, int) else config.get("n_embd", 0),
        folder=folder,
    )


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and elements of every tensor; files that an index does not list are other copies."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = sorted(set(_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    for name in files:
        path = folder / Path(str(name)).name
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    yield key, math.prod(file.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read the weights {path}: {error}; give --parameters instead of --model"
            ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise ModelError(f"{path} is too large for what it should be")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return found
