"""Presets: a usable RunSpec for every size and objective, with a reason for every value."""

import re
import tomllib
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb.manifest import DType
from peerturb.presets import ANCHORS, KINDS, MEASURED_MAX, number, preset, run_toml, two_digits
from peerturb.spec import AdapterSpec, ModelSpec, RunSpec

EXACT = ("half_codes", "exact_examples", "exact_codes")
"""Fields for runs that allow exact contributions."""

SIZES = [1, 1_000, 260_032, 869_504, 3_148_224, 22_700_000, 1_300_000_000, 70_000_000_000, 10**13]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", SIZES)
def test_the_printed_file_is_a_runspec_with_the_presets_values(parameters: int, dtype: DType, kind: str) -> None:
    model = ModelSpec(name='a "name" \U0001f600', digest="ab" * 32, dtype=dtype, exclude=("lm_head*", "*.bias"))
    text = run_toml(model, name="try", parameters=parameters, kind=kind, classes=3 if kind == "classes" else 0)
    spec = RunSpec.from_document(tomllib.loads(text), source="RUN.toml")
    chosen = preset(parameters, kind, dtype=dtype)
    assert spec.model == model
    assert spec.name == "try"
    assert spec.objective.kind == kind
    found = (
        spec.perturbation.epsilon,
        spec.step.learning_rate,
        spec.round.probes_max,
        spec.round.budget_ms,
        spec.objective.examples_per_probe,
        spec.round.count,
    )
    assert found == tuple(getattr(chosen, field.name) for field in fields(chosen) if field.name not in ("why", *EXACT))
    assert spec.perturbation.estimators == ("spsa",)
    # Every chosen value has its reason beside it.
    for key in ("epsilon", "learning_rate", "probes_max", "budget_ms", "examples_per_probe", "count"):
        assert re.search(rf"^{key} = \S+  # \S.*$", text, re.MULTILINE), key


def test_every_value_has_a_reason_that_tells_measured_from_published() -> None:
    names = {field.name for field in fields(preset(1)) if field.name != "why"}
    for parameters in SIZES:
        why = preset(parameters).why
        assert set(why) == names - set(EXACT)
        assert set(preset(parameters, estimators=("spsa", "exact")).why) == names
        assert ("not measured here" in why["learning_rate"]) == (parameters > MEASURED_MAX)
        assert "measured" in why["learning_rate"]


@pytest.mark.parametrize("estimators", [("exact",), ("spsa", "exact")])
@pytest.mark.parametrize("parameters", SIZES)
def test_a_file_for_exact_contributions_has_their_rules(parameters: int, estimators: tuple[Any, ...]) -> None:
    model = ModelSpec(name="base", digest="ab" * 32)
    text = run_toml(model, name="try", parameters=parameters, kind="text", estimators=estimators)
    spec = RunSpec.from_document(tomllib.loads(text), source="RUN.toml")
    chosen, plain = preset(parameters, estimators=estimators), preset(parameters)
    assert spec.perturbation.estimators == estimators
    rules = spec.perturbation.exact_rules
    assert (rules.examples, rules.codes, spec.step.half_codes) == tuple(
        getattr(chosen, name) for name in ("exact_examples", "exact_codes", "half_codes")
    )
    # A round of 128 codes moves the weights less than the rate for such rounds would, one of 4 096 a few times more.
    steps = {n: spec.step.learning_rate * n / (n + spec.step.half_codes) for n in (128, 4_096)}
    assert 0.2 * plain.learning_rate < steps[128] < plain.learning_rate < steps[4_096] < 10 * plain.learning_rate
    for key in ("examples", "codes", "half_codes", "learning_rate"):
        assert re.search(rf"^{key} = \S+  # \S.*$", text, re.MULTILINE), key


@pytest.mark.parametrize("parameters", SIZES)
def test_no_value_for_adapters_claims_a_measurement(parameters: int) -> None:
    why = preset(parameters, is_adapter=True).why
    assert "not measured for adapters" in why["learning_rate"]
    assert "not measured here" in why["epsilon"]
    assert "as measured" not in " ".join(why.values())


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_a_file_for_an_adapter_has_its_seed_and_epsilon(kind: str) -> None:
    adapter = AdapterSpec.model_validate({"kind": kind, "rank": 4, "targets": ("*.q_proj",)})
    model = ModelSpec(name="base", digest="ab" * 32, adapter=adapter, quantise="nf4")
    text = run_toml(model, name="try", parameters=10_000, kind="text")
    spec = RunSpec.from_document(tomllib.loads(text), source="RUN.toml")
    assert spec.model == model
    assert "seed" in spec.model_fields_set
    assert spec.perturbation.epsilon == 1e-2
    assert "not measured for adapters" in text


def test_the_anchors_are_met() -> None:
    assert [preset(int(size)).learning_rate for size, _ in ANCHORS] == [rate for _, rate in ANCHORS]


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_larger_models_never_get_larger_rates(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert preset(small).learning_rate >= preset(large).learning_rate > 0


def test_what_epsilon_depends_on() -> None:
    assert preset(10**6).epsilon == 1e-3
    # Below this the resolution of bfloat16 losses drowns the difference of two of them.
    assert preset(10**6, dtype="bfloat16").epsilon == 3e-3
    assert preset(10**6, is_adapter=True).epsilon == 1e-2


@given(st.floats(1e-12, 1e6))
def test_numbers_are_toml_floats_of_the_same_value(value: float) -> None:
    rounded = two_digits(value)
    text = number(rounded)
    assert tomllib.loads(f"x = {text}") == {"x": rounded}
    assert isinstance(tomllib.loads(f"x = {text}")["x"], float)
    assert len(text) <= 9


def test_sequences_fit_the_models_positions() -> None:
    model = ModelSpec(name="base", digest="ab" * 32)
    for positions, tokens in ((None, 256), (1_024, 256), (128, 128)):
        text = run_toml(model, name="try", parameters=10_000, kind="completion", positions_max=positions)
        assert RunSpec.from_document(tomllib.loads(text), source="RUN.toml").objective.tokens_max == tokens
