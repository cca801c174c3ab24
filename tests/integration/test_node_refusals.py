"""Who is not let in, and what it is told. Both sides' values stand in the message."""

import json
import socket
from pathlib import Path

import pytest

from peerturb.spec import RunSpec
from tests.integration.network import Network, network, toy_run

pytestmark = pytest.mark.integration


def test_a_wrong_token_is_refused(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator("--token", "sesame-open-wide")
        stranger = net.start_node("stranger")
        assert stranger.wait() == 4
        assert "--token-file" in stranger.of("error")[0]["message"]
        liar = net.start_node("liar", "--token", "sesame-shut")
        assert liar.wait() == 4
        assert liar.of("refused")[0]["code"] == "bad_token"
        token_file = tmp_path / "token"
        token_file.write_text("sesame-open-wide\n")
        friend = net.start_node("friend", "--token-file", str(token_file))
        friend.wait_for_round(3)


def test_other_base_weights_are_refused_naming_both_sides(tmp_path: Path, shared: Path) -> None:
    run = toy_run().replace('name = "toy"\ndigest', 'name = "stories260k"\ndigest')
    data = tmp_path / "data.txt"
    data.write_text("Once upon a time there was a test. " * 50)
    with network(tmp_path, run) as net:
        net.start_coordinator()
        model = shared / "models" / "stories260k"
        node = net.start_node("node", "--model", str(model), "--data", str(data), compute="torch")
        assert node.wait() == 4
        message = node.of("error")[0]["message"]
        digest = json.loads(net.run("model", str(model), "--json").stdout)["digest"]
        assert digest in message
        assert "0" * 64 in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "{data}", "--model", "{folder}/nowhere"], "nowhere"),
        (["--data", "{data}", "--device", "cuda:99"], "cuda:99"),
        (["--data", "{data}", "--fields", "nothing=here"], "nothing"),
        ([], "--data"),
    ],
)
def test_what_a_node_cannot_use_ends_it_at_once(tmp_path: Path, shared: Path, extra: list[str], said: str) -> None:
    data = tmp_path / "data.txt"
    data.write_text("Once upon a time there was a test. " * 50)
    with network(tmp_path, _real_run(tmp_path, shared)) as net:
        net.start_coordinator()
        flags = [part.format(data=data, folder=tmp_path) for part in extra]
        node = net.start_node("node", *flags, compute="torch")
        assert node.wait() in (2, 4)
        assert said in node.of("error")[0]["message"]
        assert said in node.errors


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        net = Network(tmp_path, toy_run())
        net.port = taken.getsockname()[1]
        node = net.start_node("node", "--wait-s", "0")
        assert node.wait() == 5
        assert net.address in node.of("error")[0]["message"]


def test_tls_with_the_right_fingerprint_only(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        keys = json.loads(net.run("coordinator", "keys", "--out", str(tmp_path / "keys"), "--json").stdout)
        net.start_coordinator("--tls-dir", str(tmp_path / "keys"), "--token", keys["token_file"])
        friend = net.start_node("friend", "--fingerprint", keys["fingerprint"], "--token-file", keys["token_file"])
        friend.wait_for_round(3)
        wrong = "sha256:" + "ab" * 32
        fooled = net.start_node("fooled", "--fingerprint", wrong, "--wait-s", "0")
        assert fooled.wait() == 5
        message = fooled.of("error")[0]["message"]
        assert keys["fingerprint"] in message
        assert wrong in message
        plain = net.start_node("plain", "--wait-s", "0")
        assert plain.wait() == 5


def test_plaintext_beyond_loopback_is_not_tried(tmp_path: Path) -> None:
    """An address of this computer that is not loopback: without --insecure the node insists on TLS."""
    host = _own_address()
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator("--listen", "0.0.0.0:0", "--insecure")
        port = net.port
        arguments = ["--compute", "toy", "--json", "--wait-s", "0", "--coordinator", f"{host}:{port}"]
        refused = net.run("node", "run", "--state", str(tmp_path / "a"), *arguments)
        assert refused.returncode == 5
        assert "--insecure" in refused.stderr
        net.port = port
        allowed = net._start(["node", "run", "--state", str(tmp_path / "b"), "--insecure", *arguments], "allowed")
        allowed.wait_for_round(2)


def test_one_state_folder_serves_one_node(tmp_path: Path) -> None:
    with network(tmp_path, toy_run()) as net:
        net.start_coordinator()
        first = net.start_node("node")
        first.wait_for_round(2)
        second = net.start_node("node")
        assert second.wait() == 2
        assert "another node" in second.of("error")[0]["message"]


def test_the_settings_are_shown_merged(tmp_path: Path) -> None:
    net = Network(tmp_path, toy_run())
    config = tmp_path / "node.toml"
    config.write_text('coordinator = "example.org:7470"\nrows = 8\ntoken = "secret-secret"\n')
    shown = net.run("node", "run", "--config", str(config), "--threads", "3", "--show-config")
    assert shown.returncode == 0
    settings = json.loads(shown.stdout)
    assert (settings["coordinator"], settings["rows"], settings["threads"]) == ("example.org:7470", 8, 3)
    assert "secret-secret" not in shown.stdout


def test_doctor_finds_what_is_wrong(tmp_path: Path, shared: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "Once upon a time there was a test."}\n' * 20 + '{"words": "oops"}\n')
    with network(tmp_path, _real_run(tmp_path, shared)) as net:
        net.start_coordinator()
        base = ["doctor", "--coordinator", net.address, "--json", "--state", str(tmp_path / "state")]
        model = str(shared / "models" / "stories260k")
        sick = net.run(*base, "--model", str(shared / "models" / "gpt2-horoscope"), "--data", str(data))
        assert sick.returncode == 1
        found = {check["name"]: check for check in json.loads(sick.stdout)}
        assert found["network"]["outcome"] == found["protocol"]["outcome"] == "ok"
        assert found["base weights"]["outcome"] == "fail"
        assert found["base weights"]["remedy"]
        assert found["data"]["outcome"] == "fail"
        assert "data.jsonl:21" in found["data"]["found"]
        data.write_text('{"text": "Once upon a time there was a test."}\n' * 20)
        well = net.run(*base, "--model", model, "--data", str(data))
        assert well.returncode == 0, well.stdout
        assert {check["name"] for check in json.loads(well.stdout)} == set(found)
    gone = net.run("doctor", "--coordinator", "127.0.0.1:1", "--json")
    assert gone.returncode == 1
    assert json.loads(gone.stdout)[0]["outcome"] == "fail"


def _real_run(tmp_path: Path, shared: Path) -> str:
    net = Network(tmp_path, "")
    found = json.loads(net.run("model", str(shared / "models" / "stories260k"), "--json").stdout)
    section = found["toml"].replace('"stories260k', f'"{shared / "models" / "stories260k"}')
    run = f'name = "real"\n{section}\n'
    run += "[round]\nprobes_max = 8\n[objective]\ntokens_max = 16\n"
    (tmp_path / "check.toml").write_text(run)
    RunSpec.from_toml(tmp_path / "check.toml")
    return run


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this computer has no address beyond loopback")
        address: str = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this computer has no address beyond loopback")
    return address
