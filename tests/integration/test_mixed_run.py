"""Nodes with and without memory for gradients train in one run, better together than either half; replicas equal."""

import json
import math
from pathlib import Path

import pytest

from peerturb.protocol.records import RoundOpened, RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.runlog.verify import verify
from tests.integration.network import Network, Program, assert_digests_agree, network
from tests.integration.test_training import SHAKESPEARE, _check_replay, _split

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1_200)]

ROUNDS, EXACT_CODES, PROBES = 12, 128, 96
RULES = f"""
[perturbation]
estimators = ["spsa", "exact"]
[perturbation.exact]
examples = 8
codes = {EXACT_CODES}
[step]
learning_rate = 0.2
half_codes = 1024
[round]
count = {ROUNDS}
probes_max = {PROBES}
min_peers = {{nodes}}
deadline_ms_min = 60000
deadline_ms_max = 300000
[objective]
kind = "text"
tokens_max = 64
eval_every = 6
"""


def train(net: Network, model: Path, parts: list[Path], held_out: Path, kinds: list[str]) -> list[Program]:
    """Run to the end: one node for each of `kinds`, its estimator, on as many parts of the data."""
    shown = net.run("model", str(model), "--json")
    assert shown.returncode == 0, shown.stderr
    section = json.loads(shown.stdout)["toml"]
    net.run_file.write_text(f'name = "mixed"\n{section}\n{RULES.format(nodes=len(kinds))}', encoding="utf-8")
    net.start_coordinator()
    common = ["--model", str(model), "--threads", "1"]
    first = ["--eval", str(held_out), "--export", str(net.folder / "exported")]
    nodes = [
        net.start_node(
            f"node{number}", "--data", str(part), "--estimator", kind, *common, *(first if number == 0 else []),
            compute="torch",
        )
        for number, (part, kind) in enumerate(zip(parts, kinds, strict=True))
    ]  # fmt: skip
    assert [node.wait(timeout_s=500) for node in nodes] == [0] * len(nodes), [node.errors for node in nodes]
    assert net.coordinator is not None
    assert net.coordinator.stop() == 0
    return nodes


def losses(node: Program) -> list[float]:
    return [event["loss"] for event in node.of("eval")]


def test_two_exact_and_two_spsa_nodes_learn_more_together(tmp_path: Path, shared: Path) -> None:
    model = shared / "models" / "stories260k"
    parts, held_out = _split(tmp_path, shared, SHAKESPEARE)
    found: dict[str, list[float]] = {}
    for name, chosen in (("exact", [0, 1]), ("spsa", [2, 3]), ("mixed", [0, 1, 2, 3])):
        kinds = ["exact" if number < 2 else "spsa" for number in chosen]
        folder = tmp_path / name
        folder.mkdir()
        with network(folder, "") as net:
            nodes = train(net, model, [parts[number] for number in chosen], held_out, kinds)
            found[name] = losses(nodes[0])
            if name == "mixed":
                _check_the_log(net, model, nodes)
    assert [len(values) for values in found.values()] == [3, 3, 3]
    for half in ("exact", "spsa"):
        assert found[half][-1] < found[half][0]
        for together, alone in zip(found["mixed"][1:], found[half][1:], strict=True):
            assert together < alone, found


def _check_the_log(net: Network, model: Path, nodes: list[Program]) -> None:
    assert_digests_agree(*nodes)
    assert len({node.of("stop")[0]["digest"] for node in nodes}) == 1
    choices = [event["text"] for event in nodes[0].of("notice") if event["code"] == "estimator"]
    assert len(choices) == 1
    assert choices[0].startswith("exact projected gradients: 8 examples and 128 codes a round")
    log = net.export_log()
    assert verify(log).ledger.sealed_rounds == ROUNDS
    records = list(read_records(log))
    exact = {event["slot"] for node in nodes[:2] for event in node.of("joined")}
    for record in records:
        if isinstance(record, RoundSealed):
            assert set(record.exact) == exact
            assert record.counts == tuple(EXACT_CODES if slot in exact else PROBES for slot in record.slots)
    opened = [record for record in records if isinstance(record, RoundOpened)]
    assert opened[-1].exact_scale < opened[-1].scale  # one example a probe is noisier than eight
    assert all(math.isfinite(record.scale) for record in opened)
    _check_replay(net, log, model, net.folder / "exported", nodes[0].of("stop")[0]["digest"])
