"""A network that trains an adapter: replicas stay equal through a kill and a late join, replay gives the same files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.network import assert_digests_agree, network
from tests.zo_models import byte_tokenizer, one_thread, small_model

__all__ = ["one_thread"]

pytest.importorskip("peft", reason="peft is not installed: peerturb[adapters]")

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS = 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_from_start_to_export(tmp_path: Path, dtype: str) -> None:
    base = tmp_path / "base"
    small_model("llama-tied").save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "abcdefgh" * 2 + str(n)}) + "\n" for n in range(40)))
    with network(tmp_path, "") as net:
        shown = net.run("model", str(base), "--dtype", dtype, "--adapter", "lora", "--rank", "4", "--json")
        assert shown.returncode == 0, shown.stderr
        net.run_file.write_text(
            f'name = "adapter"\nseed = 9\n{json.loads(shown.stdout)["toml"]}\n'
            f"[step]\nlearning_rate = 0.05\n[round]\ncount = {ROUNDS}\nprobes_max = 24\nmin_peers = 2\n"
            "deadline_ms_min = 30000\ndeadline_ms_max = 60000\nlease_ms = 1000\n"
            "[objective]\ntokens_max = 16\neval_every = 4\n"
        )
        coordinator = net.start_coordinator()
        common = ["--model", str(base), "--data", str(data), "--threads", "1"]
        exported = tmp_path / "exported"
        first = net.start_node("first", *common, "--eval", str(data), "--export", str(exported), compute="torch")
        second = net.start_node("second", *common, "--checkpoint-rounds", "2", compute="torch")
        second.wait_for(lambda event: event["event"] == "checkpoint", what="a checkpoint")
        second.kill()
        again = net.start_node("second", *common, compute="torch")
        late = net.start_node("late", *common, compute="torch")
        nodes = [first, again, late]
        assert [node.wait(timeout_s=300) for node in nodes] == [0] * 3, [node.errors for node in nodes]
        assert coordinator.stop() == 0
        assert_digests_agree(first, second, again, late)
        digests = {node.of("stop")[0]["digest"] for node in nodes}
        assert len(digests) == 1
        losses = [event["loss"] for event in first.of("eval")]
        assert losses[-1] < losses[0] - 0.1, losses

        log = net.export_log()
        for place in ("once", "twice"):
            out = tmp_path / place
            result = net.run("log", "export", str(log), "--model", str(base), "--out", str(out), "--device", "cpu")
            assert result.returncode == 0, result.stderr
            files = sorted(path.name for path in out.iterdir())
            assert files == ["adapter_config.json", "adapter_model.safetensors"]
            for name in files:
                assert (out / name).read_bytes() == (exported / name).read_bytes(), name
        merged = tmp_path / "merged"
        result = net.run(
            "log", "export", str(log), "--model", str(base), "--out", str(merged), "--merge", "--device", "cpu"
        )
        assert result.returncode == 0, result.stderr
    weights, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == before.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights[name].dtype == getattr(torch, dtype)
    assert not torch.equal(weights[name].float(), before[name].to(weights[name].dtype).float())


def test_merging_needs_an_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_model("llama-tied").save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "abcdefgh"}) + "\n")
    with network(tmp_path, "") as net:
        shown = net.run("model", str(base), "--json")
        section = json.loads(shown.stdout)["toml"]
        net.run_file.write_text(f'name = "plain"\n{section}\n[round]\ncount = 1\nprobes_max = 2\n')
        coordinator = net.start_coordinator()
        node = net.start_node("only", "--model", str(base), "--data", str(data), compute="torch")
        assert node.wait() == 0, node.errors
        assert coordinator.stop() == 0
        result = net.run("log", "export", str(net.export_log()), "--out", str(tmp_path / "out"), "--merge")
    assert result.returncode == 2
    assert "there is no adapter to merge" in result.stderr
