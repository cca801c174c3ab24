"""Real models and data for training benchmarks, from the folder of test models.

A case is data and an objective; the learning rate and the probes that peerturb uses on it stand beside it.
"""

from dataclasses import dataclass
from pathlib import Path

from peerturb.errors import DataError
from peerturb.spec import ModelSpec, ObjectiveSpec, RunSpec, StepSpec
from peerturb.zo.model import base_digest, load_model, positions_max
from peerturb.zo.objective import Objective
from peerturb_bench.single import Case, shared_folder

HELDOUT = 256
"""Sequences whose loss is the figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learnt from what, and how."""

    name: str
    model: str
    objective: ObjectiveSpec
    train: str
    heldout: str
    """Empty: the last tenth of `train`."""
    learning_rate: float
    probes: int
    """Of peerturb."""
    mezo_rates: tuple[float, ...]
    """Learning rates that are tried for MeZO."""
    adamw_rate: float


SHAKESPEARE = Task(
    name="stories3m on tinyshakespeare",
    model="stories3m",
    objective=ObjectiveSpec(kind="text", tokens_max=64, eval_every=0),
    train="corpora/tinyshakespeare.txt",
    heldout="",
    learning_rate=1.5e-2,
    probes=128,
    mezo_rates=(1e-7, 1e-6, 3e-6, 1e-5, 3e-5),
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
    learning_rate=1e-3,
    probes=64,
    mezo_rates=(1e-7, 1e-6, 1e-5, 1e-4),
    adamw_rate=1e-4,
)


def load(task: Task) -> Case:
    """Load model and data.

    Raises:
        DataError: the folder of test models is missing or lacks a file.
    """
    folder = shared_folder()
    if folder is None:
        raise DataError("this benchmark needs the folder of test models: PEERTURB_SHARED names it")
    model, tokenizer = load_model(folder / "models" / task.model, "float32")
    bound = Objective(task.objective, tokenizer, positions_max=positions_max(model))
    train, held = _split(bound, folder, task)
    step = max(1, len(held) // HELDOUT)
    return Case(
        name=task.name,
        model=model,
        spec=RunSpec(
            name="target",
            model=ModelSpec(name=task.model, digest=base_digest(model, "float32")),
            step=StepSpec(learning_rate=task.learning_rate),
            objective=task.objective,
        ),
        objective=bound,
        parts=(train,),
        heldout=held[::step][:HELDOUT],
    )


def _split(bound: Objective, folder: Path, task: Task) -> tuple[list, list]:  # type: ignore[type-arg]
    sequences = bound.load(folder / task.train)
    if task.heldout:
        return sequences, bound.load(folder / task.heldout)
    whole = [item for item in sequences if len(item.tokens) == task.objective.tokens_max]
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]
