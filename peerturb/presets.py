"""Where to start: epsilon, learning rate, probes and examples per probe for a model of some size.

A pure function from the number of trained parameters and the kind of objective to fields of a RunSpec. A preset is a
start, not an optimum: `peerturb tune` looks around it on the user's own data.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise

from peerturb.manifest import DType
from peerturb.noise import Estimator
from peerturb.spec import ModelSpec

ANCHORS = ((2.6e5, 1.5e-2), (9.3e5, 1.5e-2), (3.1e6, 3e-3), (5e8, 5e-4), (1.3e10, 2e-4))
"""(trained parameters, learning rate of the `normalized` rule). The first three were measured, on whole models
(docs/LOG.md); adapters take the rate of their size, which suited LoRA on two of three models measured and was ten times
too small on the third. The fourth is the rate that one paper (arXiv
2509.24372) used unchanged for models of 0.5 to 8 billion parameters, whose z-scored rewards make the same step as this
rule; the last lies between two published rates for 13 billion, 5e-5 and 5e-4."""

MEASURED_MIN, MEASURED_MAX = 260_000, 3_200_000
"""Sizes of whole models between which the rates rest on measurements of this project."""

LARGE = 100_000_000
"""Parameters from which on a round is bounded by time instead of by a number of probes."""


EXACT_FACTOR, HALF_CODES = 24.0, 8_192
"""Where exact contributions are allowed: the rate above holds for about 128 codes; so many times as much is the rate of
a round of very many codes, and half of that of one with HALF_CODES of them. From trials at 0.26 and 0.87 million
parameters: 1 024 codes learned best at rates of 0.02 to 0.04, 4 096 at 0.1 to 0.2."""

EXACT_EXAMPLES, EXACT_CODES = 32, 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Values of a RunSpec, and for each one why."""

    epsilon: float
    learning_rate: float
    probes_max: int
    budget_ms: int
    examples_per_probe: int
    rounds: int
    half_codes: int
    """0 where exact contributions are not allowed."""
    exact_examples: int
    exact_codes: int
    why: dict[str, str]
    """Field -> where its value comes from, one line each."""


def preset(
    parameters: int,
    kind: str = "text",
    *,
    dtype: DType = "float32",
    is_adapter: bool = False,
    estimators: tuple[Estimator, ...] = ("spsa",),
) -> Preset:
    """Return the values to start with.

    Args:
        parameters: how many are trained; at least 1.
        kind: of the objective: `text`, `completion`, `labels` or one of a user's own.
        dtype: of the weights, and of the activations.
        is_adapter: whether only adapters are trained (LoRA).
        estimators: that the run allows.
    """
    why: dict[str, str] = {}
    if is_adapter:
        epsilon = 1e-2
        why["epsilon"] = "published for adapters (MeZO with LoRA), not measured here"
    elif dtype == "bfloat16":
        epsilon = 3e-3
        why["epsilon"] = "bfloat16: gradients correlate with float32's at 0.994 or more; at 1e-3, on one model, 0.946"
    else:
        epsilon = 1e-3
        why["epsilon"] = "float32: 1e-4 learns as fast, 1e-2 on one of two models slower"
    rate = _interpolated(parameters)
    evidence = "as for a whole model of this size, not measured for adapters" if is_adapter else _evidence(parameters)
    has_exact = "exact" in estimators
    if has_exact:
        rate = two_digits(EXACT_FACTOR * rate)
        why["half_codes"] = "rounds of few codes make a small part of the step, of many nearly all of it"
        why["exact_examples"] = "sequences behind one gradient; more of them, not more codes, help noisy gradients"
        why["exact_codes"] = "one byte each; beyond a tenth of the parameters they add little"
    why["learning_rate"] = f"{evidence}; `peerturb tune` checks it"
    probes = 128 if parameters < LARGE else 64
    why["probes_max"] = "of each node; aim at 256 or more a round from all together"
    budget_ms = 0 if parameters < LARGE else 20_000
    why["budget_ms"] = "0: always probes_max" if not budget_ms else "slow machines send what they measure in this time"
    examples = 2 if kind in ("labels", "classes") else 1
    one = "many small probes did as well as few big ones, or better"
    why["examples_per_probe"] = "short prompts; as in the trials on SST-2" if examples > 1 else one
    why["rounds"] = "linear to a tenth of the rate: the end settles"
    return Preset(
        epsilon=epsilon,
        learning_rate=rate,
        probes_max=probes,
        budget_ms=budget_ms,
        examples_per_probe=examples,
        rounds=400,
        half_codes=HALF_CODES if has_exact else 0,
        exact_examples=EXACT_EXAMPLES,
        exact_codes=EXACT_CODES,
        why=why,
    )


def _interpolated(parameters: int) -> float:
    """Return the rate on the straight lines between the anchors, both axes logarithmic, to two digits."""
    size = math.log(min(max(parameters, ANCHORS[0][0]), ANCHORS[-1][0]))
    for (low, low_rate), (high, high_rate) in pairwise(ANCHORS):
        if size <= math.log(high):
            part = (size - math.log(low)) / (math.log(high) - math.log(low))
            return two_digits(math.exp(math.log(low_rate) + part * (math.log(high_rate) - math.log(low_rate))))
    return ANCHORS[-1][1]


def _evidence(parameters: int) -> str:
    """Say what a rate rests on."""
    if parameters > MEASURED_MAX:
        return f"by size, for {_count(parameters)} parameters, from published rates, not measured here"
    if parameters < MEASURED_MIN:
        return f"as measured at {_count(MEASURED_MIN)} parameters, the smallest tried"
    return f"between rates measured at {_count(MEASURED_MIN)} and {_count(MEASURED_MAX)} parameters"


def two_digits(value: float) -> float:
    """Round to two significant digits: more would claim a precision that nobody measured."""
    return float(f"{value:.1e}")


def number(value: float) -> str:
    """Write a number as TOML, short: 1.5e-2 as people write it, plain where that is as short."""
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _count(parameters: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:,}"


_OBJECTIVES = {
    "text": ['kind = "text"', 'template = "{text}"'],
    "completion": [
        'kind = "completion"', 'template = "{prompt}"  # fields of your data stand in braces',
        'completion = " {answer}"',
    ],
    "labels": [
        'kind = "labels"', 'template = "{text} It was"  # the words of a label go on from here',
        'label_field = "label"', 'labels = { 0 = " terrible", 1 = " great" }',
    ],
    "classes": [
        'kind = "classes"', 'template = "{text}"', 'label_field = "label"',
    ],
}  # fmt: skip

TOKENS_MAX = {"text": 64, "completion": 256, "labels": 64, "classes": 64}
"""Longest sequence to begin with, where the model has positions for it."""

KINDS = tuple(_OBJECTIVES)
"""Objectives that `run_toml` can begin."""


def _toml(value: str | list[str]) -> str:
    """Write a text or list of texts as TOML, which knows no pairs of surrogates."""
    return json.dumps(value, ensure_ascii=False)


def model_toml(model: ModelSpec) -> str:
    """Return the `[model]` section of RUN.toml; with an adapter, RUN.toml must give a seed too."""
    lines = ["[model]", f"name = {_toml(model.name)}", f'digest = "{model.digest}"', f'dtype = "{model.dtype}"']
    if model.exclude:
        lines.append(f"exclude = {_toml(list(model.exclude))}")
    if model.quantise is not None:
        lines.append(f'quantise = "{model.quantise}"')
    if model.adapter is not None:
        adapter = model.adapter
        lines += ["", "[model.adapter]", f'kind = "{adapter.kind}"', f"rank = {adapter.rank}"]
        if adapter.kind == "lora":
            lines.append(f"alpha = {number(adapter.alpha)}")
        lines.append(f"targets = {_toml(list(adapter.targets))}")
    return "\n".join(lines)


def _class_lines(classes: int) -> list[str]:
    values = _toml([str(number) for number in range(classes)])
    return [f"classes = {values}  # the values of label_field in your data"] if classes else []


def run_toml(
    model: ModelSpec,
    *,
    name: str,
    parameters: int,
    kind: str,
    seed: int = 0,
    classes: int = 0,
    positions_max: int | None = None,
    estimators: tuple[Estimator, ...] = ("spsa",),
) -> str:
    """Return a whole RUN.toml to start from, each chosen value with its reason.

    Args:
        model: the section `[model]`.
        name: of the run.
        parameters: how many are trained.
        kind: of the objective, one of `KINDS`.
        seed: of the run; written out where first values follow from it.
        classes: outputs of the head (`classes` only).
        positions_max: the model's, None if it has no limit.
    """
    is_adapter = model.adapter is not None
    chosen = preset(parameters, kind, dtype=model.dtype, is_adapter=is_adapter, estimators=estimators)
    has_exact = "exact" in estimators

    def line(key: str, value: str, reason: str) -> str:
        return f"{key} = {value}  # {chosen.why[reason]}"

    lines = [
        "# What all peers of the run agree on.",
        f"name = {_toml(name)}",
        *([f"seed = {seed}"] if seed or classes or model.adapter is not None else []),
        "",
        model_toml(model),
        "",
        "[perturbation]",
        line("epsilon", number(chosen.epsilon), "epsilon"),
        *([f"estimators = {_toml(list(estimators))}", "", "[perturbation.exact]"] if has_exact else []),
        *([line("examples", str(chosen.exact_examples), "exact_examples")] if has_exact else []),
        *([line("codes", str(chosen.exact_codes), "exact_codes")] if has_exact else []),
        "",
        "[step]",
        line("learning_rate", number(chosen.learning_rate), "learning_rate"),
        *([line("half_codes", str(chosen.half_codes), "half_codes")] if has_exact else []),
        'schedule = "linear"',
        "final_fraction = 0.1",
        "",
        "[round]",
        line("count", str(chosen.rounds), "rounds"),
        line("probes_max", str(chosen.probes_max), "probes_max"),
        line("budget_ms", str(chosen.budget_ms), "budget_ms"),
        "",
        "[objective]",
        *_OBJECTIVES[kind],
        f"tokens_max = {min(TOKENS_MAX[kind], positions_max or TOKENS_MAX[kind])}",
        *_class_lines(classes),
        line("examples_per_probe", str(chosen.examples_per_probe), "examples_per_probe"),
        "eval_every = 20",
    ]
    return "\n".join(lines)
