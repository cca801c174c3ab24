"""What `peerturb bench learning` trains on, and every learner's rate on it: tried beforehand, one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peerturb.errors import DataError
from peerturb.manifest import DType
from peerturb.spec import ModelSpec, ObjectiveSpec, RunSpec
from peerturb.zo.base import load_base
from peerturb.zo.data import evenly
from peerturb.zo.objective import Objective
from peerturb_bench.cases import HELDOUT, SHAKESPEARE, Task, load
from peerturb_bench.single import Case
from peerturb_node.demo import BASE_MODEL_FOLDER

TREC_EXAMPLES = 1_000
"""The first of the training file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTask:
    """A case, and how each learner learns it."""

    name: str
    case: Callable[[], Case]
    spsa_rate: float
    probes: int
    exact_rates: Mapping[int, float]
    """Codes of a round -> learning rate of the `normalized` rule."""
    examples: int
    """Behind each gradient."""
    carried: tuple[int, float, float]
    """Codes, learning rate and `carry` of a run that carries gradients over."""
    mezo_rate: float
    adamw_rate: float
    compute: DType = "float32"
    """Type in which peerturb computes losses and gradients."""


def trec_case() -> Case:
    """Return stories3m on TREC: six classes of questions, told by the word that follows."""
    words = (" letter", " how", " thing", " person", " place", " number")
    case = load(
        Task(
            name="stories3m on TREC", model="stories3m",
            objective=ObjectiveSpec(
                kind="labels", template="{text} It is about a", tokens_max=48, examples_per_probe=2, eval_every=0,
                labels={str(number): word for number, word in enumerate(words)},
            ),
            train="datasets/trec/train.jsonl", heldout="datasets/trec/test.jsonl",
            learning_rate=3e-3, probes=96, mezo_rates=(), adamw_rate=3e-4,
        )
    )  # fmt: skip
    return Case(
        name=case.name, model=case.model, spec=case.spec, objective=case.objective,
        parts=(case.parts[0][:TREC_EXAMPLES],), heldout=case.heldout,
    )  # fmt: skip


def docs_case() -> Case:
    """Return the demo's code model on this project's pages: new knowledge, a language it has hardly seen.

    Raises:
        DataError: the pages are not there: this is no checkout.
    """
    folder = Path(__file__).resolve().parents[2] / "docs"
    pages = sorted(folder.glob("*.md"))
    if not pages:
        raise DataError(f"this benchmark reads the project's pages, and {folder} has none: run it in a checkout")
    objective = ObjectiveSpec(kind="text", tokens_max=64, eval_every=0)

    def spec(digest: str) -> RunSpec:
        return RunSpec(name="learning", model=ModelSpec(name="base", digest=digest), objective=objective)

    model, tokenizer, digest = load_base(BASE_MODEL_FOLDER, spec("0" * 64))
    bound = Objective.of(objective, model, tokenizer)
    pieces = [item for page in pages for item in bound.load(page) if len(item.tokens) == objective.tokens_max]
    held = pieces[::10]
    return Case(
        name="code model on English pages", model=model, spec=spec(digest), objective=bound,
        parts=([piece for number, piece in enumerate(pieces) if number % 10],), heldout=evenly(held, HELDOUT),
    )  # fmt: skip


def shakespeare_case() -> Case:
    """Return stories3m on tinyshakespeare."""
    return load(SHAKESPEARE)


TASKS = (
    LearningTask(
        name="code model on English pages", case=docs_case, spsa_rate=5e-3, probes=64, examples=32,
        exact_rates={1_024: 0.05, 4_096: 0.2, 16_384: 0.4}, carried=(4_096, 0.2, 0.9), mezo_rate=1e-5, adamw_rate=1e-3,
    ),
    LearningTask(
        name="stories3m on tinyshakespeare", case=shakespeare_case, spsa_rate=1.5e-3, probes=96, examples=32,
        exact_rates={1_024: 0.006, 4_096: 0.012, 16_384: 0.03}, carried=(4_096, 0.012, 0.9),
        mezo_rate=1e-6, adamw_rate=3e-4,
    ),
    LearningTask(
        name="stories3m on TREC", case=trec_case, spsa_rate=3e-3, probes=96, examples=32,
        exact_rates={1_024: 0.006, 4_096: 0.015, 16_384: 0.04}, carried=(4_096, 0.015, 0.9),
        mezo_rate=1e-6, adamw_rate=3e-4,
    ),
)  # fmt: skip
"""The rates are those of the first draft and of short trials; whoever publishes figures tunes them first."""
