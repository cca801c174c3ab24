"""`peerturb init`: every answer gives a file that loads to what was asked, and every slip is named with a way out."""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerturb import cli
from peerturb.errors import DataError, ModelError, PeerturbError, SpecError
from peerturb.presets import KINDS, preset
from peerturb.spec import (
    AdapterSpec,
    ModelSpec,
    ObjectiveSpec,
    PerturbationSpec,
    PlateauSpec,
    RoundSpec,
    RunSpec,
    Section,
    StepSpec,
)
from peerturb.spec_toml import description, spec_toml, toml_value
from peerturb_node.starting.answers import Answers, run_spec, run_text
from peerturb_node.starting.asking import Silent
from peerturb_node.starting.base import Base, look_at_model, read_size
from peerturb_node.starting.columns import look_at_data, propose
from peerturb_node.starting.talk import Given, talk

DIGEST = "ab" * 32


def read(text: str) -> RunSpec:
    return RunSpec.from_document(tomllib.loads(text), source="RUN.toml")


def answers(kind: str, **more: Any) -> Answers:
    labels = {"labels": {"0": " bad", "good one": ' "great"\n'}} if kind == "labels" else {}
    classes = {"classes": ("0", "1", "x y")} if kind == "classes" else {}
    completion = {"completion": " {answer}"} if kind == "completion" else {}
    known: dict[str, Any] = {"name": "try", "model": 'a "model"', "digest": DIGEST, "parameters": 3_148_224}
    return Answers(**known | labels | classes | completion | {"kind": kind} | more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["rank1", "dense"])
@pytest.mark.parametrize("rounds", [0, 1, 400])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", [1, 869_504, 7_000_000_000])
def test_every_combination_loads_to_what_was_asked(
    kind: str, family: str, rounds: int, dtype: Any, parameters: int
) -> None:
    asked = answers(kind, family=family, rounds=rounds, dtype=dtype, parameters=parameters, positions_max=48)
    spec = read(run_text(asked))
    assert spec == run_spec(asked)
    chosen = preset(parameters, kind, dtype=dtype)
    assert (spec.perturbation.family, spec.round.count, spec.model.dtype) == (family, rounds, dtype)
    assert (spec.step.learning_rate, spec.perturbation.epsilon) == (chosen.learning_rate, chosen.epsilon)
    assert spec.step.schedule == ("linear" if rounds else "constant")
    assert spec.objective.kind == kind
    assert dict(spec.objective.labels) == asked.labels
    assert spec.objective.classes == asked.classes
    assert spec.objective.tokens_max == 48


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SIZES = st.floats(1e-9, 0.9)
RUNS = st.builds(
    RunSpec,
    name=TEXTS,
    seed=st.integers(0, 2**63 - 1),
    model=st.builds(
        ModelSpec,
        name=TEXTS,
        digest=st.just(DIGEST),
        exclude=st.lists(TEXTS, max_size=3).map(tuple),
        exponents=st.dictionaries(TEXTS, st.integers(-16, 16), max_size=3),
        adapter=st.none() | st.builds(AdapterSpec, alpha=SIZES, targets=st.lists(TEXTS, min_size=1).map(tuple)),
    ),
    perturbation=st.builds(PerturbationSpec, epsilon=SIZES, sides=st.sampled_from(["one", "two"])),
    step=st.builds(StepSpec, learning_rate=st.floats(1e-9, 1e3))
    | st.builds(StepSpec, schedule=st.just("plateau"), plateau=st.builds(PlateauSpec, factor=SIZES)),
    round=st.builds(RoundSpec, count=st.integers(0, 10**6)),
    objective=st.builds(
        ObjectiveSpec,
        kind=st.just("labels"),
        template=st.just('{text}\n"\\\x7f\t# is'),
        labels=st.dictionaries(TEXTS, TEXTS, min_size=2, max_size=2).filter(
            lambda labels: len({words.strip() for words in labels.values()} - {""}) == 2
        ),
    ),
)


@given(RUNS)
def test_any_runspec_survives_being_written(spec: RunSpec) -> None:
    assert read(spec_toml(spec)).digest == spec.digest


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.floats(allow_nan=False, allow_infinity=False)
       | st.integers(-(2**62), 2**62) | st.booleans())  # fmt: skip
def test_values_are_toml_of_the_same_value(value: object) -> None:
    found = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("kind", KINDS)
def test_each_key_has_a_line_of_comment_from_the_spec(kind: str) -> None:
    lines = run_text(answers(kind)).splitlines()
    keys = [number for number, line in enumerate(lines) if line and line[0] not in "#["]
    assert len(keys) > 20
    for number in keys:
        assert lines[number - 1].startswith("# "), lines[number]
        assert len(lines[number - 1]) > 10
    assert f"# {description(type(read(run_text(answers(kind))).round), 'count')}" in lines


def sections(section: type[Section]) -> list[type[Section]]:
    below = [field.annotation for field in section.model_fields.values()]
    return [
        section,
        *(s for kind in below if isinstance(kind, type) and issubclass(kind, Section) for s in sections(kind)),
    ]


@pytest.mark.parametrize("section", [*sections(RunSpec), AdapterSpec])
def test_each_field_of_the_spec_is_described(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            assert description(section, name), f"{section.__name__}.{name} has no docstring"


def write(folder: Path, *rows: dict[str, Any], name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


REVIEWS = [{"id": number, "review": f"film number {number} was long", "stars": number % 3} for number in range(20)]
PAIRS = [{"instruction": f"add {n} and {n}", "output": str(2 * n), "tags": ["a"]} for n in range(30)]
WORDS = [{"body": f"line {n}", "topic": ("tea", "coffee")[n % 2]} for n in range(12)]


def test_columns_propose_their_objective(tmp_path: Path) -> None:
    reviews = propose(look_at_data(write(tmp_path, *REVIEWS)), suits="decoder")
    assert (reviews.kind, reviews.label_field, reviews.template) == ("labels", "stars", "{review}\nAnswer:")
    pairs = propose(look_at_data(write(tmp_path, *PAIRS)), suits="decoder")
    assert (pairs.kind, pairs.template, pairs.completion) == ("completion", "{instruction}", " {output}")
    texts = propose(look_at_data(write(tmp_path, {"story": "once"}, {"story": "twice"})), suits="decoder")
    assert (texts.kind, texts.template) == ("text", "{story}")
    head = propose(look_at_data(write(tmp_path, *WORDS)), suits="encoder")
    assert (head.kind, head.template, head.label_field) == ("classes", "{body}", "topic")


def weigh(base: Base, dtype: str, classes: int, seed: int) -> tuple[str, int, int | None]:
    return DIGEST, 1_000_000 + classes, 128


def silent(**flags: Any) -> Answers:
    return talk(Given(model="owner/model", **flags), Silent("nobody is asked"), weigh)[0]


def test_flags_and_suggestions_become_answers(tmp_path: Path) -> None:
    data = str(write(tmp_path, *WORDS))
    found = silent(data=data)
    assert found.labels == {"coffee": " coffee", "tea": " tea"}
    assert (found.kind, found.template, found.label_field) == ("labels", "{body}\nAnswer:", "topic")
    assert (found.digest, found.parameters, found.positions_max) == (DIGEST, 1_000_000, 128)
    found = silent(data=data, objective="classes", classes=["tea", "coffee"], family="dense", rounds="7", size="3M")
    assert (found.classes, found.family, found.rounds, found.parameters) == (("tea", "coffee"), "dense", 7, 3_000_000)
    numbers = silent(data=str(write(tmp_path, *REVIEWS)), objective="classes")
    assert numbers.classes == ("0", "1", "2")
    assert silent().kind == "text"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"objective": "labells"}, r"'labells' is none of .*did you mean 'labels'"),
        ({"family": "rank2"}, r"did you mean 'rank1'"),
        ({"dtype": "float23"}, r"did you mean 'float32'"),
        ({"template": "{bodi} is"}, r"no column 'bodi' .*did you mean 'body'"),
        ({"template": "nothing"}, r"names no column; .*'body', 'topic'"),
        ({"template": "{body"}, r"template '\{body' is wrong"),
        ({"label_field": "topics"}, r"did you mean 'topic'"),
        ({"label_field": "body", "labels": []}, None),
        ({"labels": ["cofee= x"]}, r"no such label; it has 'coffee', 'tea'"),
        ({"labels": ["coffee"]}, r"not of the form VALUE=WORDS"),
        ({"objective": "classes", "classes": ["tea"]}, r"lack 'coffee'"),
        ({"rounds": "-3"}, r"--rounds '-3' is no number"),
        ({"size": "3q"}, r"--size '3q' is no number of parameters; .*22.7M"),
        ({"digest": "abc"}, r"64 hexadecimal digits"),
        ({"objective": "completion", "completion": " {answr}"}, r"no column 'answr'"),
    ],
)
def test_a_slip_is_named_with_a_way_out(flags: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    data = str(write(tmp_path, *WORDS))
    if said is None:
        assert len(silent(data=data, **flags).labels) == 12
        return
    with pytest.raises(PeerturbError, match=said):
        silent(data=data, **flags)


def test_missing_files_suggest_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path, *WORDS, name="train.jsonl")
    (tmp_path / "stories3m").mkdir()
    with pytest.raises(DataError, match=r"no data file '.*trainn.jsonl'; did you mean '.*train.jsonl'"):
        look_at_data(tmp_path / "trainn.jsonl")
    with pytest.raises(ModelError, match=r"no model folder .*did you mean '.*stories3m'"):
        look_at_model(str(tmp_path / "storys3m"))
    with pytest.raises(ModelError, match=r"no config.json"):
        look_at_model(str(tmp_path / "stories3m"))
    (tmp_path / "stories3m" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"a JSON object is expected"):
        look_at_model(str(tmp_path / "stories3m"))
    (tmp_path / "stories3m" / "config.json").write_text("{}")
    (tmp_path / "stories3m" / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match=r"not a safetensors file"):
        look_at_model(str(tmp_path / "stories3m"))


def test_without_torch_the_digest_and_an_unknown_size_must_be_given() -> None:
    with pytest.raises(SpecError, match=r"--digest must be given .*`peerturb model` prints it"):
        talk(Given(model="owner/model"), Silent("nobody is asked"), None)
    with pytest.raises(SpecError, match=r"--size must be given"):
        talk(Given(model="owner/model", digest=DIGEST), Silent("nobody is asked"), None)
    found, _, _ = talk(Given(model="owner/model", digest=DIGEST, size="1.1B"), Silent("nobody is asked"), None)
    assert (found.parameters, found.model, found.name) == (1_100_000_000, "owner/model", "model")


def test_a_plain_text_serves_text_only(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("call me something")
    assert silent(data=str(file)).kind == "text"
    with pytest.raises(DataError, match="plain text serves --objective text only"):
        silent(data=str(file), objective="labels")


def test_a_folder_says_its_size_and_positions_without_torch(repository: Path) -> None:
    base = look_at_model(str(repository / "node/peerturb_node/demo/assets/base"))
    assert (base.parameters, base.positions_max, base.suits, base.name) == (869_504, 256, "decoder", "base")


@pytest.mark.parametrize(
    ("text", "count"), [("869504", 869_504), ("22.7M", 22_700_000), (" 7b", 7 * 10**9), ("1_000", 1_000)]
)
def test_sizes(text: str, count: int) -> None:
    assert read_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "1,5B", "1e6", "9999999T"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(SpecError, match="no number of parameters"):
        read_size(text)


def test_the_command_never_writes_over_a_file_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path, *WORDS)
    line = ["init", "--model", "owner/model", "--digest", DIGEST, "--size", "3M", "--data", str(data)]
    assert cli.run(line) == 0
    first = Path("RUN.toml").read_bytes()
    assert "peerturb coordinator serve RUN.toml" in capsys.readouterr().out
    assert cli.run([*line, "--family", "dense"]) == 2
    assert "--force writes over it" in capsys.readouterr().err
    assert Path("RUN.toml").read_bytes() == first
    assert cli.run([*line, "--family", "dense", "--force", "--json"]) == 0
    spec = RunSpec.from_toml(Path("RUN.toml"))
    assert json.loads(capsys.readouterr().out)["run_digest"] == spec.digest.hex()
    assert spec.perturbation.family == "dense"
    assert sorted(os.listdir(tmp_path)) == ["RUN.toml", "data.jsonl"]  # no draft is left behind


def test_data_that_the_objective_cannot_use_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, *WORDS, {"body": "", "topic": "tea"})
    out = tmp_path / "RUN.toml"
    line = [
        "init",
        "--model",
        "owner/model",
        "--digest",
        DIGEST,
        "--size",
        "3M",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    assert cli.run([*line, "--objective", "text", "--template", "{body}"]) == 2
    assert "data.jsonl:13: the text is empty" in capsys.readouterr().err
    assert not out.exists()
