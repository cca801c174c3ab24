"""Real models learn in a network of real processes: losses fall, replicas stay equal, replay gives the model."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from peerturb.runlog.verify import verify
from tests.integration.network import Network, Program, assert_digests_agree, network

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

NODES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, a data set and how to train."""

    model: str
    objective: str
    train: str
    held_out: str
    rounds: int
    probes: int
    learning_rate: float
    examples: int
    """Sequences per probe."""
    fall: float
    """By how much the held-out loss must fall."""


SHAKESPEARE = Task(
    model="stories260k",
    objective='kind = "text"\ntokens_max = 64\n',
    train="corpora/tinyshakespeare.txt",
    held_out="",
    rounds=20,
    probes=32,
    learning_rate=1.5e-2,
    examples=1,
    fall=0.25,
)
SST2 = (
    'kind = "labels"\ntemplate = "{{text}} It was"\nlabels = {{ 0 = " {bad}", 1 = " {good}" }}\ntokens_max = {tokens}\n'
)
STORIES3M = Task(
    model="stories3m",
    objective=SST2.format(bad="terrible", good="great", tokens=48),
    train="datasets/sst2/train_1000.jsonl",
    held_out="datasets/sst2/dev_500.jsonl",
    rounds=10,
    probes=16,
    learning_rate=3e-3,
    examples=2,
    fall=0.03,
)
HOROSCOPE = Task(
    model="gpt2-horoscope",
    objective=SST2.format(bad="bad", good="great", tokens=48),
    train="datasets/sst2/train_1000.jsonl",
    held_out="datasets/sst2/dev_500.jsonl",
    rounds=20,
    probes=24,
    learning_rate=1e-2,
    examples=4,
    fall=0.03,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", [SHAKESPEARE, STORIES3M, HOROSCOPE], ids=lambda task: task.model)
def test_four_nodes_lower_the_held_out_loss(tmp_path: Path, shared: Path, task: Task, dtype: str) -> None:
    folder = shared / "models" / task.model
    with network(tmp_path, "") as net:
        net.run_file.write_text(_run_file(net, folder, task, dtype))
        parts, held_out = _split(tmp_path, shared, task)
        coordinator = net.start_coordinator()
        common = ["--model", str(folder), "--threads", "1"]
        exported = tmp_path / "exported"
        nodes = [
            net.start_node(f"node{index}", "--data", str(part), *common, *extra, compute="torch")
            for index, (part, extra) in enumerate(
                zip(parts, [["--eval", str(held_out), "--export", str(exported)], [], [], []], strict=True)
            )
        ]
        assert [node.wait(timeout_s=600) for node in nodes] == [0] * NODES, [node.errors for node in nodes]
        assert coordinator.stop() == 0
        losses = [(event["round"], event["loss"]) for event in nodes[0].of("eval")]
        assert losses[0][0] == 0
        assert losses[-1][0] == task.rounds
        assert losses[-1][1] < losses[0][1] - task.fall, losses
        _check_digests(nodes, task.rounds)
        log = net.export_log()
        assert verify(log).ledger.sealed_rounds == task.rounds
        if dtype == "float32" or task is SHAKESPEARE:
            _check_replay(net, log, folder, exported, nodes[0].of("stop")[0]["digest"])


def _check_digests(nodes: list[Program], rounds: int) -> None:
    """All nodes reported one digest in every round they saw live; the last round is among them."""
    compared = assert_digests_agree(*nodes)
    assert compared >= rounds // 2
    assert len({node.of("stop")[0]["digest"] for node in nodes}) == 1
    assert all(rounds in node.digests() for node in nodes)


def _check_replay(net: Network, log: Path, base: Path, exported: Path, digest: str) -> None:
    """Base model + log gives the files that the live node wrote, byte for byte."""
    out = net.folder / "replayed"
    result = net.run("log", "replay", str(log), "--model", str(base), "--out", str(out), "--device", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    # A node shows the beginning of what a replay shows whole.
    assert len(digest) == 8
    assert json.loads(result.stdout)["digest"].startswith(digest)
    files = sorted(path.name for path in exported.iterdir())
    assert "model.safetensors" in files
    assert files == sorted(path.name for path in out.iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (out / name).read_bytes(), name


def _run_file(net: Network, model: Path, task: Task, dtype: str) -> str:
    shown = net.run("model", str(model), "--dtype", dtype, "--json")
    assert shown.returncode == 0, shown.stderr
    section = json.loads(shown.stdout)["toml"]
    return (
        f'name = "training"\n{section}\n'
        f"[step]\nlearning_rate = {task.learning_rate}\n"
        f"[round]\ncount = {task.rounds}\nprobes_max = {task.probes}\nmin_peers = {NODES}\n"
        "deadline_ms_min = 60000\ndeadline_ms_max = 300000\n"
        f"[objective]\n{task.objective}eval_every = {task.rounds}\nexamples_per_probe = {task.examples}\n"
    )


def _split(folder: Path, shared: Path, task: Task) -> tuple[list[Path], Path]:
    """Give each node its own private part, and set held-out data apart."""
    source = shared / task.train
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = folder / f"held-out{source.suffix}"
    if task.held_out:
        rows = (shared / task.held_out).read_text(encoding="utf-8").splitlines(keepends=True)
        held_out.write_text("".join(rows[:200]), encoding="utf-8")
    else:
        lines, rest = lines[:-300], lines[-300:]
        held_out.write_text("".join(rest), encoding="utf-8")
    parts = []
    size = len(lines) // NODES
    for index in range(NODES):
        part = folder / f"part{index}{source.suffix}"
        part.write_text("".join(lines[index * size : (index + 1) * size]), encoding="utf-8")
        parts.append(part)
    return parts, held_out
