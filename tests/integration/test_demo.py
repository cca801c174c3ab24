"""The whole demo as a user starts it: real processes, two kills, a late joiner, and results that hold what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from peerturb_node.demo.checks import are_same_models

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]

PROMISED = (
    "accuracy_before", "accuracy_after", "loss_before", "loss_after", "rounds", "probes", "seconds",
    "bytes_up_per_code", "bytes_down_per_code", "digests_equal", "killed", "joined", "coordinator_restarts",
    "model_dir", "log_file",
)  # fmt: skip


def peerturb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, without a hub to reach."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peerturb.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo with all its blows."""
    folder = tmp_path_factory.mktemp("demo") / "demo-out"
    done = peerturb("demo", "--out", str(folder), "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (folder / "stdout.jsonl").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return document


def test_it_learned(summary: dict[str, Any]) -> None:
    assert set(PROMISED) <= set(summary)
    assert 0.4 <= summary["accuracy_before"] <= 0.65
    assert summary["accuracy_after"] >= 0.9
    assert summary["loss_after"] < 0.5 * summary["loss_before"]


def test_it_survived_everything_with_equal_replicas(summary: dict[str, Any]) -> None:
    assert (summary["killed"], summary["joined"], summary["coordinator_restarts"]) == (1, 1, 1)
    assert summary["digests_equal"] is True
    assert summary["replay_equal"] is True
    assert summary["rounds_lost"] == 0
    assert summary["digest_rounds_compared"] >= summary["rounds"] - 1


def test_a_gradient_costs_bytes_not_megabytes(summary: dict[str, Any]) -> None:
    """The budget of a message: the code, and what a message of 128 codes at 1.45 bytes leaves for framing."""
    assert 1 < summary["bytes_up_per_code_steady"] <= 1 + 57.6 / summary["codes_per_contribution"]
    assert 1 < summary["bytes_down_per_code_steady"] <= 1 + 76.8 * summary["rounds"] / summary["probes"]
    assert summary["bytes_up_per_code"] < 3
    assert summary["bytes_down_per_code"] < 2
    assert summary["full_gradient_bytes"] > 1_000 * (summary["bytes_up"] + summary["bytes_down"])


def test_the_log_holds_the_rounds_and_gives_the_model(out: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    log = str(out / "demo.runlog")
    verified = peerturb("log", "verify", log, "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    found = json.loads(verified.stdout)
    assert (found["rounds"], found["probes"]) == (summary["rounds"], summary["probes"])
    exported = peerturb("log", "export", log, "--model", str(out / "base"), "--out", str(tmp_path / "again"))
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert are_same_models(out / "model", tmp_path / "again")
    assert not are_same_models(out / "model", out / "base")


def test_the_model_loads_as_any_hugging_face_model(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "model", local_files_only=True)
    tokens = tokenizer("def f(x): return", return_tensors="pt")
    assert model(**tokens).logits.shape[-1] == model.config.vocab_size


def test_what_is_left_is_results_only(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        ".peerturb-demo", "RUN.toml", "base", "data", "demo.runlog", "logs", "model", "report.html", "stdout.jsonl",
        "summary.json",
    }  # fmt: skip
    assert (out / "report.html").stat().st_size > 20_000


def test_the_json_lines_tell_rounds_and_end_with_the_summary(out: Path, summary: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (out / "stdout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["round"] for row in rows if row["event"] == "round"] == list(range(1, summary["rounds"] + 1))
    assert rows[-1]["event"] == "summary"
    assert {key: rows[-1][key] for key in PROMISED} == {key: summary[key] for key in PROMISED}


def test_no_process_is_left(out: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        assert not any(str(out) in word for word in process.info["cmdline"] or ())
