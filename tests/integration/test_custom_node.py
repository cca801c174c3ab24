"""A user's own program is a node: its module and loss train in a network, and replay gives its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peerturb.protocol.records import RoundSealed
from peerturb.runlog.reader import LogEnd, read_entries
from peerturb.spec import RunSpec
from peerturb.zo.custom import CustomEvaluator, base_spec
from peerturb.zo.replay import replay
from tests.integration.network import assert_digests_agree, network
from tests.zo_models import one_thread

__all__ = ["one_thread"]

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROGRAM = """
import sys
import torch
from peerturb_node import settings
from peerturb_node.compute.custom import CustomCompute
from peerturb_node.main import run_node
from peerturb.zo.custom import CustomEvaluator, base_spec

torch.set_num_threads(1)


def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def data():
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    return list(zip(inputs, inputs[:, :1] * 2))


def loss(outputs, batch):
    return (outputs - batch[1]).square().mean(1)


def make(spec):
    trained = module()
    digest = base_spec(trained, name="mlp").digest
    evaluator = CustomEvaluator(trained, spec.model, data(), loss=loss)
    return CustomCompute(
        spec, evaluator, data(), base_digest=digest, held_out=data(),
        export=lambda folder: torch.save(trained.state_dict(), folder),
    )


if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    raise SystemExit(run_node(settings.load(flags, config=None), is_json=True, make_compute=make))
"""


@pytest.mark.parametrize("activation", ["Tanh", "PReLU"], ids=["fast", "slow"])
def test_programs_train_their_own_module(tmp_path: Path, activation: str) -> None:
    program = tmp_path / "program.py"
    text = PROGRAM.replace("Tanh", activation)
    program.write_text(text)
    names: dict[str, Any] = {"__name__": "program"}
    exec(text, names)
    build, rows, loss = names["module"], names["data"], names["loss"]
    model = base_spec(build(), name="mlp")
    with network(tmp_path, "") as net:
        net.run_file.write_text(
            f'name = "own"\n[model]\nname = "mlp"\ndigest = "{model.digest}"\n[step]\nlearning_rate = 0.03\n'
            "[round]\ncount = 30\nprobes_max = 16\nmin_peers = 2\ndeadline_ms_min = 20000\ndeadline_ms_max = 30000\n"
            "lease_ms = 500\n[objective]\nexamples_per_probe = 4\neval_every = 10\n"
        )
        coordinator = net.start_coordinator()

        def start(name: str, *extra: str) -> Any:
            flags = ["coordinator", net.address, "state", str(tmp_path / name), "name", name, *extra]
            return net._start(flags, name, (str(program),))

        first = start("first", "export", str(tmp_path / "trained.pt"))
        second = start("second")
        assert [node.wait() for node in (first, second)] == [0, 0], (first.errors, second.errors)
        assert coordinator.stop() == 0
        assert_digests_agree(first, second)
        slow = [event["text"] for event in first.of("notice") if event["code"] == "slow"]
        assert len(slow) == (activation == "PReLU"), "a module that is measured slowly is a node's event"
        assert all("one forward for each probe and side" in text for text in slow)
        assert "Warning" not in first.errors, "and no warning of Python's"
        losses = [event["loss"] for event in first.of("eval")]
        assert losses[-1] < losses[0] * 0.7
        log = net.export_log()
    spec = RunSpec.from_toml(tmp_path / "RUN.toml")
    fresh = build()
    evaluator = CustomEvaluator(fresh, spec.model, rows(), loss=loss)
    rounds = [record for _, record in read_entries(log, LogEnd()) if isinstance(record, RoundSealed)]
    weights = [tensor.data for _, tensor in evaluator.parameters]
    replay(rounds, weights, evaluator.manifest, spec)
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert all(torch.equal(trained[name], tensor) for name, tensor in fresh.state_dict().items())
