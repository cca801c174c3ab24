"""A RunSpec whose objective could teach nothing is refused, with the key, the fault and the remedy."""

import json
from typing import Any

import pytest

from peerturb.errors import SpecError
from peerturb.spec import RunSpec

LABELS = {"0": " bad", "1": " good"}


def read(**objective: Any) -> RunSpec:
    document = {"name": "unit", "model": {"name": "toy", "digest": "0" * 64}, "objective": objective}
    return RunSpec.from_document(document, source="RUN.toml")


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"template": "{{{text}}}"},
        {"kind": "labels", "template": "{text} It was", "labels": LABELS},
        {"kind": "labels", "labels": {"0": "\nno", "1": " yes", "2": " no way"}},
        {"kind": "completion", "template": "{q}", "completion": " {a}"},
        # What an objective does not use is not looked at.
        {"labels": {"0": "", "1": ""}, "completion": "{"},
    ],
)
def test_an_objective_that_can_teach_something(objective: dict[str, Any]) -> None:
    spec = read(**objective)
    assert RunSpec.from_canonical(spec.canonical) == spec


@pytest.mark.parametrize("kind", ["text", "labels", "completion"])
@pytest.mark.parametrize("template", ["It was", "{{text}}", " "])
def test_a_template_without_a_field_is_refused(kind: str, template: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(kind=kind, template=template, labels=LABELS, completion=" {a}")
    message = str(caught.value)
    assert message.startswith("RUN.toml")
    assert "objective: `template`" in message
    assert repr(template) in message
    assert "names no field" in message
    assert "{text}" in message


def test_a_completion_without_a_field_is_refused() -> None:
    with pytest.raises(SpecError, match="`completion` ' yes' names no field"):
        read(kind="completion", template="{q}", completion=" yes")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text", "write {{ and }} for braces"),
        ("text}", "write {{ and }} for braces"),
        ("{}", "plain names"),
        ("{0.a}", "plain names"),
        ("{text!r}", "plain names"),
        ("{text:>5}", "plain names"),
        ("{a[b]}", "plain names"),
    ],
)
def test_a_template_that_no_node_could_fill_is_refused(template: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(template=template)
    assert f"objective: `template` {template!r} is wrong" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("words", ["", " ", "\n\t"])
def test_a_label_without_words_is_refused(words: str) -> None:
    with pytest.raises(SpecError, match="objective: the words of label '1' are empty; write"):
        read(kind="labels", labels={"0": " bad", "1": words})


@pytest.mark.parametrize("words", [" bad", "bad", " bad\n"])
def test_labels_with_the_same_words_are_refused(words: str) -> None:
    with pytest.raises(SpecError, match="objective: labels '0' and '1' have the same words 'bad'"):
        read(kind="labels", labels={"0": " bad", "1": words})


def test_a_logged_objective_is_checked_as_well() -> None:
    canonical = read(kind="labels", labels=LABELS).canonical
    assert b'" good"' in canonical
    with pytest.raises(SpecError, match="the same words"):
        RunSpec.from_canonical(canonical.replace(b'" good"', b'" bad"'))


def test_two_sided_runs_keep_the_digest_they_had_before_there_was_another_kind() -> None:
    spec = read()
    assert b"sides" not in spec.canonical
    assert spec.digest.hex() == "0cadd84d7ea5c7fc8956186545b3ec1d7860f1f72c3a83be3427db1d89d59050"
    document = json.loads(spec.canonical)
    document["perturbation"]["sides"] = "two"
    assert RunSpec.from_document(document, source="RUN.toml") == spec
    with pytest.raises(SpecError, match="canonical"):
        RunSpec.from_canonical(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_one_sided_runs_are_other_runs() -> None:
    document = {**json.loads(read().canonical), "perturbation": {"sides": "one"}}
    spec = RunSpec.from_document(document, source="RUN.toml")
    assert b'"sides":"one"' in spec.canonical
    assert spec.digest != read().digest
    assert RunSpec.from_canonical(spec.canonical) == spec
    assert (spec.perturbation.side_count, read().perturbation.side_count) == (1, 2)
    document["perturbation"] = {"sides": "three"}
    with pytest.raises(SpecError, match=r"perturbation\.sides"):
        RunSpec.from_document(document, source="RUN.toml")
