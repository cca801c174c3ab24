"""From answers to a RunSpec and its text: the pure part of `peerturb init`. It asks nothing and reads no file."""

from dataclasses import dataclass, field
from typing import Any

from peerturb.manifest import DType
from peerturb.presets import TOKENS_MAX, preset
from peerturb.spec import RunSpec
from peerturb.spec_toml import spec_toml

FINAL_FRACTION = 0.1
"""Part of the learning rate at which a run with an end ends: so it settles."""

EVAL_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Everything RUN.toml is made from."""

    name: str
    model: str
    """The base model's name in the RunSpec: a hub name, or a label."""
    digest: str
    parameters: int
    """How many are trained: what the preset goes by."""
    positions_max: int | None = None
    """Longest sequence the model was made for; None: no limit is known."""
    dtype: DType = "float32"
    family: str = "rank1"
    rounds: int = 400
    """0: until stopped."""
    seed: int = 0
    kind: str = "text"
    template: str = "{text}"
    completion: str = ""
    label_field: str = "label"
    labels: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def run_spec(answers: Answers) -> RunSpec:
    """Return the RunSpec: the answers, and the preset of the model's size for the rest.

    Raises:
        SpecError: an answer that no RunSpec accepts; it names the key.
    """
    chosen = preset(answers.parameters, answers.kind, dtype=answers.dtype)
    objective: dict[str, Any] = {"kind": answers.kind, "template": answers.template, "label_field": answers.label_field}
    if answers.kind == "completion":
        objective["completion"] = answers.completion
    if answers.kind == "labels":
        objective["labels"] = answers.labels
    if answers.kind == "classes":
        objective["classes"] = answers.classes
    tokens_max = TOKENS_MAX.get(answers.kind, 64)
    step: dict[str, Any] = {"learning_rate": chosen.learning_rate}
    if answers.rounds:
        step |= {"schedule": "linear", "final_fraction": FINAL_FRACTION}
    document = {
        "name": answers.name,
        "seed": answers.seed,
        "model": {"name": answers.model, "digest": answers.digest, "dtype": answers.dtype},
        "perturbation": {"family": answers.family, "epsilon": chosen.epsilon},
        "step": step,
        "round": {"count": answers.rounds, "probes_max": chosen.probes_max, "budget_ms": chosen.budget_ms},
        "objective": {
            **objective,
            "tokens_max": min(tokens_max, answers.positions_max or tokens_max),
            "examples_per_probe": chosen.examples_per_probe,
            "eval_every": EVAL_EVERY,
        },
    }
    return RunSpec.from_document(document, source="what was answered")


def run_text(answers: Answers) -> str:
    """Return RUN.toml: every key with its description, chosen values with their reason.

    Raises:
        SpecError: an answer that no RunSpec accepts; it names the key.
    """
    why = preset(answers.parameters, answers.kind, dtype=answers.dtype).why
    reasons = {
        "perturbation.epsilon": why["epsilon"],
        "step.learning_rate": why["learning_rate"],
        "round.probes_max": why["probes_max"],
        "round.budget_ms": why["budget_ms"],
        "objective.examples_per_probe": why["examples_per_probe"],
    }
    if answers.rounds:
        reasons["step.schedule"] = why["rounds"]
    return spec_toml(run_spec(answers), why=reasons)
