"""`peerturb init` as people meet it: in a terminal, without torch, and the file that a run really starts from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peerturb.spec import RunSpec
from tests.conftest import REPOSITORY
from tests.integration.network import network
from tests.pty_process import PtyProcess

pytestmark = pytest.mark.integration

BASE = REPOSITORY / "node/peerturb_node/demo/assets/base"
DIGEST = "d507ac442f9a7711180aa3bb627c3904a2a5f897419e205995abc95551740c94"
TOPICS = "".join(json.dumps({"text": f"line {n}", "topic": ("tea", "coffee")[n % 2]}) + "\n" for n in range(12))

# Runs the command line in argv on an installation without torch and its company.
BARE = """
import importlib.machinery, sys

class Absent:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("torch", "transformers", "safetensors", "huggingface_hub", "psutil"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None

sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return real(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
from peerturb import cli
sys.exit(cli.run(sys.argv[1:]))
"""


def test_questions_in_a_terminal_are_asked_again_until_the_answer_is_usable(tmp_path: Path) -> None:
    (tmp_path / "topics.jsonl").write_text(TOPICS)
    with PtyProcess(["init", "--digest", DIGEST], folder=tmp_path) as terminal:
        terminal.wait_for(r"Base model.*: ")
        terminal.type(f"{BASE}\r")
        terminal.wait_for(r"Training data.*\[-\]: ")
        terminal.type("topic.jsonl\r")
        terminal.wait_for(r"did you mean 'topics.jsonl'")
        terminal.wait_for(r"Training data.*\[-\]: ")
        terminal.type("topics.jsonl\r")
        terminal.wait_for(r"Objective.*\[labels\]: ")
        terminal.type("\r")
        terminal.wait_for(r"Prompt template \(columns of text, topic in braces\) \[\{text\}\\nAnswer:\]: ")
        terminal.type("{text} is about\\n\r")
        terminal.wait_for(r"Column of the label \[topic\]: ")
        terminal.type("\r")
        terminal.wait_for(r"label 'coffee' \[ coffee\]: ")
        terminal.type("beans\r")
        terminal.wait_for(r"label 'tea' \[ tea\]: ")
        terminal.type("\r")
        terminal.wait_for(r"Perturbations.*\[rank1\]: ")
        terminal.type("dens\r")
        terminal.wait_for(r"did you mean 'dense'")
        terminal.type("dense\r")
        terminal.wait_for(r"Rounds.*\[400\]: ")
        terminal.type("12\r")
        terminal.wait_for(r"File to write \[RUN.toml\]: ")
        terminal.type("\r")
        assert terminal.end() == 0, terminal.shown
        assert f"--model {BASE} --data topics.jsonl" in terminal.shown.replace("\r\n", ""), "what can be typed next"
    spec = RunSpec.from_toml(tmp_path / "RUN.toml")
    assert spec.objective.template == "{text} is about\n"
    assert dict(spec.objective.labels) == {"coffee": " beans", "tea": " tea"}
    assert (spec.perturbation.family, spec.round.count, spec.model.digest) == ("dense", 12, DIGEST)


def test_ctrl_c_at_a_question_writes_nothing(tmp_path: Path) -> None:
    with PtyProcess(["init"], folder=tmp_path) as terminal:
        terminal.wait_for(r"Base model.*: ")
        terminal.interrupt()
        assert terminal.end() == 130, terminal.shown
        assert "Traceback" not in terminal.shown
        assert terminal.settings == terminal.before
    assert list(tmp_path.iterdir()) == []


def test_it_works_without_torch(tmp_path: Path) -> None:
    (tmp_path / "topics.jsonl").write_text(TOPICS)

    def init(*more: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-c", BARE, "init", "--model", str(BASE), "--data", "topics.jsonl", *more]
        return subprocess.run(line, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    refused = init()
    assert refused.returncode == 2
    assert "--digest must be given" in refused.stderr
    assert init("--digest", DIGEST).returncode == 0
    spec = RunSpec.from_toml(tmp_path / "RUN.toml")
    # The learning rate of 869,504 parameters: the size comes from the header of the weights.
    assert (spec.model.digest, spec.step.learning_rate, spec.objective.tokens_max) == (DIGEST, 0.015, 64)


@pytest.mark.slow
def test_a_run_starts_from_the_written_file_and_trains(tmp_path: Path, shared: Path) -> None:
    model, data = shared / "models" / "stories260k", shared / "datasets" / "sst2" / "train_1000.jsonl"
    with network(tmp_path, "") as net:
        net.run_file.unlink()
        made = net.run(
            "init", "--model", str(model), "--data", str(data), "--label", "0= terrible", "--label", "1= great",
            "--rounds", "1", "--out", str(net.run_file), "--json",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        coordinator = net.start_coordinator()
        node = net.start_node("one", "--model", str(model), "--data", str(data), "--probes", "8", compute="torch")
        assert node.wait(timeout_s=200) == 0, node.errors
        coordinator.stop()
    (trained,) = node.of("round")
    assert trained["codes"] == 8
    assert 0 < trained["loss"] < 3
    assert node.of("stop")[0]["digest"] == trained["digest"] != node.of("model")[0]["digest"][:8]
    assert json.loads(made.stdout)["run_digest"] == node.of("start")[0]["spec"]
