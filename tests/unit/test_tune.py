"""`peerturb tune` and `peerturb model`: from a base model to RUN.toml to recommended lines; bad input is named."""

import itertools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerturb import cli, stepping
from peerturb.errors import ModelError, SpecError
from peerturb.ids import RoundNumber, Slot
from peerturb.protocol.outputs import Measure
from peerturb.protocol.records import RoundSealed
from peerturb.spec import RunSpec
from peerturb.zo.batch import Runner
from peerturb.zo.checkpoint import CheckpointInfo, save_checkpoint
from peerturb.zo.evaluate import evaluate
from peerturb.zo.model import build_manifest, load_model, trainable_weights
from peerturb_node import settings as settings_module
from peerturb_node import tuning
from peerturb_node.compute.torch_compute import TorchCompute
from peerturb_node.demo import BASE_MODEL_FOLDER
from peerturb_node.demo.task import TaskFiles, write_task
from peerturb_node.tuning import ROUNDS_MAX, ROUNDS_MIN, starting_point, tune
from tests.zo_models import one_thread

__all__ = ["one_thread"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    """The demo's data."""
    return write_task(tmp_path_factory.mktemp("data"), nodes=1, heldout_examples=20)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run_one(*words: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_one


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A small RunSpec for the demo's model."""
    return write_spec(tmp_path / "RUN.toml")


def write_spec(path: Path, step: str = "learning_rate = 1e-2", extra: str = "") -> Path:
    from peerturb_node.demo import RUN_FILE

    demo = RunSpec.from_toml(RUN_FILE)
    path.write_text(
        f'name = "try"\n[model]\nname = "base"\ndigest = "{demo.model.digest}"\n[step]\n{step}\n'
        f"[round]\nprobes_max = 4\n{extra}"
        '[objective]\nkind = "labels"\ntemplate = "{text}\\n# This is"\n'
        'labels = { code = " code", doc = " doc" }\ntokens_max = 24\n',
        encoding="utf-8",
    )
    return path


def settings_of(files: TaskFiles, **extra: Any) -> settings_module.NodeSettings:
    return settings_module.load(
        {
            "coordinator": "localhost:1",
            "data": files.train[0],
            "model": str(BASE_MODEL_FOLDER),
            "device": "cpu",
            **extra,
        }
    )


def test_a_model_becomes_a_run_file_becomes_recommended_lines(tmp_path: Path, run: Run, files: TaskFiles) -> None:
    path = tmp_path / "RUN.toml"
    code, out, _ = run("model", BASE_MODEL_FOLDER, "--objective", "labels", "--out", path)
    assert code == 0
    assert f"RunSpec written to {path}" in out
    text = path.read_text(encoding="utf-8")
    text = text.replace('0 = " terrible", 1 = " great"', 'code = " code", doc = " doc"')
    text = text.replace('"{text} It was"', r'"{text}\n# This is"')
    path.write_text(text, encoding="utf-8")
    spec = RunSpec.from_toml(path)
    lines = tmp_path / "lines.toml"
    code, out, err = run(
        "tune", path, "--data", files.train[0], "--eval", files.heldout, "--model", BASE_MODEL_FOLDER, "--budget", "1",
        "--probes", "16", "--device", "cpu", "--out", lines,
    )  # fmt: skip
    assert code == 0, err
    recommended = tomllib.loads(lines.read_text(encoding="utf-8"))
    assert set(recommended) == {"perturbation", "step"}
    merged = {**spec.model_dump(mode="json"), **recommended}
    assert RunSpec.from_document(merged, source="x").step.learning_rate > 0
    assert lines.read_text(encoding="utf-8").rstrip() in out
    assert "869,504 parameters" in out
    assert "recommended" in out
    assert all(word in out for word in ("training loss", "held-out loss", "clipped", "rms(c)"))


def test_json_has_every_setting(run: Run, run_file: Path, files: TaskFiles) -> None:
    code, out, _ = run(
        "tune", run_file, "--data", files.train[0], "--model", BASE_MODEL_FOLDER, "--budget", "3", "--json",
        "--device", "cpu",
    )  # fmt: skip
    document = json.loads(out)
    assert document["settings"]
    first = document["settings"][0]
    assert (first["epsilon"], first["learning_rate"]) == (1e-3, 1e-2)
    assert first["held_out_after"] is None
    assert ROUNDS_MIN <= document["rounds"] <= ROUNDS_MAX
    assert code == (0 if document["recommendation"] else 1)
    assert bool(document["toml"]) == (document["recommendation"] is not None)


def test_a_run_of_exact_contributions_is_tuned_with_them(tmp_path: Path, run: Run, files: TaskFiles) -> None:
    extra = '[perturbation]\nestimators = ["spsa", "exact"]\nexact = { examples = 8, codes = 300 }\n'
    run_file = write_spec(tmp_path / "RUN.toml", "learning_rate = 5e-2\nhalf_codes = 256", extra)
    asked = ["tune", run_file, "--data", files.train[0], "--model", BASE_MODEL_FOLDER, "--budget", "6", "--json"]
    document = json.loads(run(*asked, "--device", "cpu")[1])
    assert (document["estimator"], document["probes"] <= 300) == ("exact", True)
    assert len({one["epsilon"] for one in document["settings"]}) == 1  # it does not matter
    assert "epsilon" not in document["toml"]
    document = json.loads(run(*asked, "--device", "cpu", "--estimator", "spsa", "--probes", "4")[1])
    assert document["estimator"] == "spsa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_measures_what_a_node_with_these_settings_does(run_file: Path, files: TaskFiles, dtype: str) -> None:
    """The first setting is the RunSpec's own: a node that starts with its scale gets the same codes and loss."""
    spec = RunSpec.from_toml(run_file)
    settings = settings_of(files, eval=files.heldout, compute_dtype=dtype)
    seconds = itertools.count(step=100)
    found = tune(spec, settings, checkpoint=None, budget_s=1, probes=None, now_s=lambda: float(next(seconds)))
    (outcome,) = found.outcomes
    node = TorchCompute(spec, settings)
    assert found.compute_dtype == node.compute_dtype == dtype
    before = node.evaluate(lambda: False)
    scale, sent = found.scale, []
    for number in range(outcome.rounds):
        work = Measure(round=RoundNumber(number), scale=scale, count=spec.round.probes_max)
        measured = node.measure(work, Slot(0), lambda: False)
        codes = np.frombuffer(measured.codes, dtype=np.int8)
        alpha = stepping.step_size(spec.step, number, scale, codes, 0)
        node.apply(
            RoundSealed(
                round=work.round, alpha=alpha, loss=measured.loss, digest=0, slots=(Slot(0),), counts=(len(codes),),
                codes=measured.codes,
            )
        )  # fmt: skip
        scale = stepping.next_scale(scale, codes)
        sent.append(codes.astype(float))
    after = node.evaluate(lambda: False)
    assert before is not None
    assert after is not None
    assert (outcome.held_out_before, outcome.held_out_after) == (before.loss, after.loss)
    assert outcome.rms == pytest.approx(np.sqrt(np.mean(np.concatenate(sent) ** 2)))
    assert after.loss != before.loss


def test_it_warns_of_an_epsilon_as_a_node_does(tmp_path: Path, files: TaskFiles, run: Run) -> None:
    path = write_spec(tmp_path / "RUN.toml", extra="[perturbation]\nepsilon = 1e-6\n")
    words: list[str | Path] = ["tune", path, "--data", files.train[0], "--model", BASE_MODEL_FOLDER, "--budget", "1"]
    said = {}
    for dtype in ("float32", "bfloat16"):
        _, out, _ = run(*words, "--device", "cpu", "--json", "--compute-dtype", dtype)
        said[dtype] = json.loads(out)
        assert said[dtype]["compute_dtype"] == dtype
    assert said["float32"]["warning"] is None
    recommended = said["bfloat16"]["recommendation"]
    epsilon = 1e-6 if recommended is None else recommended["epsilon"]
    assert f"perturbation.epsilon = {epsilon:g} is below the resolution of bfloat16" in said["bfloat16"]["warning"]
    _, out, _ = run(*words, "--device", "cpu", "--compute-dtype", "bfloat16")
    assert "losses in bfloat16" in out
    assert "warning: perturbation.epsilon" in out


def test_held_out_examples_of_a_sorted_file_are_of_all_labels(
    run_file: Path, files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = sorted(files.heldout.read_text(encoding="utf-8").splitlines(), key=lambda line: json.loads(line)["label"])
    sorted_file = tmp_path / "sorted.jsonl"
    sorted_file.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(tuning, "HELD_OUT_MAX", 6)
    seen: list[Any] = []

    def look(runner: Runner, sequences: list[Any]) -> Any:
        seen.append([sequence.answer for sequence in sequences])
        return evaluate(runner, sequences)

    monkeypatch.setattr(tuning, "evaluate", look)
    seconds = itertools.count(step=100)
    settings = settings_of(files, eval=sorted_file)
    tune(RunSpec.from_toml(run_file), settings, checkpoint=None, budget_s=1, probes=2, now_s=lambda: next(seconds))
    assert seen[0] == [0, 0, 0, 1, 1, 1]
    assert all(answers == seen[0] for answers in seen)


def test_the_sweep_is_planned_from_the_time_of_a_round(run_file: Path, files: TaskFiles) -> None:
    """With a clock that moves a second at each look a round takes one: 48 of 120 s are eight rounds of six settings."""
    spec = RunSpec.from_toml(run_file)
    seconds = itertools.count()
    told: list[Any] = []
    found = tune(
        spec, settings_of(files), checkpoint=None, budget_s=120, probes=4, on_outcome=told.append,
        now_s=lambda: float(next(seconds)),
    )  # fmt: skip
    assert found.rounds == 8
    assert found.probes == 4
    assert sorted(told, key=repr) == sorted((*found.outcomes, *found.final), key=repr)
    assert len(found.final) in (0, 2)
    assert all(one.rounds >= 1.5 * found.rounds or one.has_diverged for one in found.final)
    assert len(told) > 1
    # The last look at the clock may come a round after the end.
    assert found.seconds <= 120 + 2
    assert found.outcomes[0].setting == found.start


def test_too_little_time_gives_one_setting_with_fewer_probes(run_file: Path, files: TaskFiles) -> None:
    spec = RunSpec.from_document(
        {**RunSpec.from_toml(run_file).model_dump(mode="json"), "round": {"probes_max": 64}}, source="x"
    )
    seconds = itertools.count(step=100)
    found = tune(spec, settings_of(files), checkpoint=None, budget_s=1, probes=None, now_s=lambda: float(next(seconds)))
    assert found.probes == 16
    assert found.rounds == ROUNDS_MIN
    assert len(found.outcomes) == 1
    assert found.is_cut


def test_it_starts_from_a_checkpoint_of_the_run(tmp_path: Path, run_file: Path, files: TaskFiles, run: Run) -> None:
    spec = RunSpec.from_toml(run_file)
    model, _ = load_model(BASE_MODEL_FOLDER, "float32")
    manifest = build_manifest(model, spec.model)
    weights = trainable_weights(model, manifest)
    for weight in weights.values():
        weight.mul_(0.5)
    path = tmp_path / "checkpoint.safetensors"

    def save(digest: str) -> None:
        info = CheckpointInfo(spec_digest=digest, base_digest=spec.model.digest, round=3, position=9, chain="00" * 32)
        save_checkpoint(path, manifest, weights, info)

    save(spec.digest.hex())
    clock = itertools.count(step=50)
    there = tune(spec, settings_of(files), checkpoint=path, budget_s=1, probes=2, now_s=lambda: float(next(clock)))
    base = tune(spec, settings_of(files), checkpoint=None, budget_s=1, probes=2, now_s=lambda: float(next(clock)))
    assert there.outcomes[0].before != base.outcomes[0].before
    save("ab" * 32)
    code, _, err = run("tune", run_file, "--data", files.train[0], "--model", BASE_MODEL_FOLDER, "--checkpoint", path)
    assert code == 3
    assert "belongs to run" in err


def test_what_run_toml_leaves_out_comes_from_the_preset(tmp_path: Path) -> None:
    given = starting_point(RunSpec.from_toml(write_spec(tmp_path / "a.toml")), 10**9)
    assert given.learning_rate == 1e-2
    left = starting_point(RunSpec.from_toml(write_spec(tmp_path / "b.toml", step="")), 10**9)
    assert left.learning_rate == 4.1e-4
    with pytest.raises(SpecError, match="sgd"):
        starting_point(RunSpec.from_toml(write_spec(tmp_path / "c.toml", step='rule = "sgd"')), 10**9)


def test_bad_input_is_named(tmp_path: Path, run: Run, run_file: Path, files: TaskFiles) -> None:
    code, _, err = run("tune", tmp_path / "none.toml", "--data", files.train[0])
    assert (code, "cannot read" in err) == (2, True)
    code, _, err = run("tune", run_file, "--data", files.train[0], "--out", run_file)
    assert (code, "exists" in err) == (2, True)
    code, _, err = run("tune", run_file, "--data", files.train[0], "--out", tmp_path / "none" / "x.toml")
    assert (code, "there is no folder" in err) == (2, True)
    code, _, err = run("tune", run_file, "--data", tmp_path / "none.jsonl", "--model", BASE_MODEL_FOLDER)
    assert (code, "none.jsonl" in err) == (2, True)
    text = run_file.read_text(encoding="utf-8").replace('digest = "d507', 'digest = "0000')
    run_file.write_text(text, encoding="utf-8")
    code, _, err = run("tune", run_file, "--data", files.train[0], "--model", BASE_MODEL_FOLDER)
    assert (code, "the base weights differ" in err) == (4, True)


def test_model_refuses_to_write_over_a_file_and_names_the_objectives(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "RUN.toml"
    path.write_text("mine", encoding="utf-8")
    code, _, err = run("model", BASE_MODEL_FOLDER, "--out", path)
    assert (code, "exists" in err) == (2, True)
    assert path.read_text(encoding="utf-8") == "mine"
    code, _, err = run("model", BASE_MODEL_FOLDER, "--objective", "rewards")
    assert (code, "text, completion, labels" in err) == (2, True)


@pytest.mark.parametrize(("word", "allowed"), [("exact", ("exact",)), ("both", ("spsa", "exact"))])
def test_a_run_file_can_allow_exact_contributions(run: Run, word: str, allowed: tuple[str, ...]) -> None:
    code, out, _ = run("model", BASE_MODEL_FOLDER, "--estimators", word, "--json")
    spec = RunSpec.from_document(tomllib.loads(json.loads(out)["run_toml"]), source="x")
    assert (code, spec.perturbation.estimators) == (0, allowed)
    assert spec.step.half_codes > 0
    code, _, err = run("model", BASE_MODEL_FOLDER, "--estimators", "none")
    assert code == 2
    assert "--estimators" in err


def test_model_prints_json_with_section_and_whole(run: Run) -> None:
    code, out, _ = run("model", BASE_MODEL_FOLDER, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["run_toml"].count(document["toml"]) == 1
    assert RunSpec.from_document(tomllib.loads(document["run_toml"]), source="x").step.learning_rate == 1.5e-2


def test_a_checkpoint_that_cannot_be_used_is_not_to_be_deleted(
    tmp_path: Path, run_file: Path, files: TaskFiles
) -> None:
    spec, path = RunSpec.from_toml(run_file), tmp_path / "checkpoint.safetensors"
    for content in (None, b"", b"not a checkpoint"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=r"checkpoint.*name another one, or leave out --checkpoint") as refused:
            tune(spec, settings_of(files), checkpoint=path, budget_s=1, probes=2)
        assert "delete" not in str(refused.value)
