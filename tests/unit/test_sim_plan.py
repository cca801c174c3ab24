"""`peerturb sim plan`: sums that a person can do again give what it prints; what cannot be is refused with a remedy."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from peerturb import cli
from peerturb.errors import ModelError, PeerturbError, SpecError
from peerturb_sim.cards import known_cards, parse_cards, read_cards
from peerturb_sim.factors import GPU_EFFICIENCY, SEAL_S, STEP_HALF
from peerturb_sim.jobs import Job, job_of, read_size
from peerturb_sim.plan import Group, Line, Plan, plan
from peerturb_sim.planned import lines
from peerturb_sim.planning import line_of
from peerturb_sim.speeds import FORWARD_TOKENS, TableCard
from peerturb_sim.traffic import contribution_bytes, feed_bytes

FAST = Line(down_mbit=1e6, up_mbit=1e6, latency_ms=0)
SLOW = Line(down_mbit=8, up_mbit=8, latency_ms=0)
FLAGS: dict[str, Any] = dict.fromkeys(
    ("run", "model", "trained", "compute_dtype", "examples")
) | {"parameters": 1e9, "dtype": "bfloat16", "tokens": 100, "probes": 64, "rounds": 10}  # fmt: skip


def _job(**flags: Any) -> Job:
    return job_of(**{**FLAGS, **flags})


def _plan(cards: str, job: Job | None = None, *, line: Line = FAST, far: Line = FAST) -> Plan:
    named = parse_cards(cards, known_cards())
    groups = [Group(name=name, count=count, machine=TableCard(known_cards()[name])) for name, count in named.items()]
    return plan(job or _job(), groups, line=line, coordinator_line=far)


def test_a_round_is_the_sum_done_by_hand() -> None:
    found = _plan("2:rtx4090")
    [share] = found.shares
    operations = 64 * 2 * 100 * 2 * 1e9
    assert share.probing.seconds == pytest.approx(operations / (165.2e12 * GPU_EFFICIENCY.value) * STEP_HALF.value)
    product = 2 * 128 * 1e9 / (165.2e12 * GPU_EFFICIENCY.value)
    assert share.updating.seconds == pytest.approx(product + 3 * 2e9 / 1008e9)
    assert found.round_s == pytest.approx(share.seconds + 2 * SEAL_S.value)
    assert found.watt_hours == pytest.approx(2 * 450 * (share.probing.seconds + share.updating.seconds) / 3600)
    assert found.document()["total_s"] == pytest.approx(10 * found.round_s)
    assert found.bottleneck == "forward passes of rtx4090"


def test_few_tokens_cost_one_reading_of_the_weights() -> None:
    [share] = _plan("1:rtx4090", _job(probes=1, tokens=2)).shares
    assert share.probing.seconds == pytest.approx(2e9 / 1008e9 * STEP_HALF.value)
    assert "longer than computing" in share.probing.sum


def test_one_sided_probes_share_their_clean_loss(tmp_path: Path) -> None:
    run = tmp_path / "RUN.toml"
    run.write_text('name = "x"\n[model]\nname = "m"\ndigest = "' + "0" * 64 + '"\n[perturbation]\nsides = "one"\n')
    assert _job(run=run).passes(64) == 65
    assert _job().passes(64) == 128


def test_messages_are_those_of_the_byte_budget() -> None:
    """The README's sums, which `test_docs` holds to the messages."""
    assert [contribution_bytes(128), contribution_bytes(256), feed_bytes([128] * 4)] == [184, 312, 586]
    large = contribution_bytes(65_536)
    assert large == 65_536 + 16 + 1 + 40 + 9 * 4, "a longer length, and five DATA frames"


def test_what_everybody_receives_grows_with_the_peers() -> None:
    few, many = _plan("4:l4"), _plan("400:l4")
    assert few.up_bytes == many.up_bytes
    assert few.bytes_each_more == 64
    assert many.down_bytes > 70 * few.down_bytes
    slow = _plan("400:l4", line=FAST, far=SLOW)
    assert slow.bottleneck == "the way down to the peers"
    assert slow.shares[0].down.seconds == pytest.approx(400 * slow.down_bytes * 8e-6 / 8)
    assert any("grows with the peers" in advice for advice in slow.advice)
    rounds = 3600 / slow.round_s
    assert slow.per_hour(slow.shares[0]) == pytest.approx((slow.up_bytes["l4"] * rounds, slow.down_bytes * rounds))


def test_slow_cards_are_named_and_a_budget_helps(tmp_path: Path) -> None:
    found = _plan("3:rtx4090,2:laptop-cpu", _job(parameters=6e9))
    fast, slow = found.shares
    assert (slow.waiting_s, fast.waiting_s > 100) == (0, True)
    assert "forward passes of laptop-cpu" in found.bottleneck
    said = " ".join(found.advice)
    assert "everybody waits for laptop-cpu" in said
    assert "laptop-cpu needs" in said
    assert "deadline_ms_max" in said
    run = tmp_path / "RUN.toml"
    run.write_text('name = "x"\n[model]\nname = "m"\ndigest = "' + "0" * 64 + '"\n[round]\nbudget_ms = 20_000\n')
    fast, slow = _plan("3:rtx4090,2:laptop-cpu", _job(run=run, parameters=6e9)).shares
    assert fast.probes == 64
    assert 1 < slow.probes < 10
    assert slow.probing.seconds <= 20


def test_the_printed_sums_hold_the_figures() -> None:
    found = _plan("3:rtx4090,10:desktop-cpu")
    said = "\n".join(lines(found))
    for share in found.shares:
        assert f"{share.count} x {share.name}" in said
        assert share.probing.sum in said
        assert share.updating.sum in said
    assert f"{found.down_bytes:,} B down" in said
    for factor in found.factors:
        assert factor.source in said
    assert "docs/LOG.md" in said
    assert "energy" in said
    assert "half precision" in said
    assert "in float32, the largest" not in said, "only what was used"


def test_a_card_without_room_is_refused() -> None:
    with pytest.raises(SpecError, match=r"does not fit rtx4060 .*14 GB weights \+ .* it has 8.59 GB"):
        _plan("1:rtx4060", _job(parameters=7e9))
    with pytest.raises(SpecError, match="does not fit"):
        _plan("1:rtx4090", _job(parameters=1e10, compute_dtype="float32"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3:rtx4009", "did you mean 'rtx4090'"),
        ("3:abacus", "there are"),
        ("0:rtx4090", "at least 1"),
        ("-2:rtx4090", "at least 1"),
        ("rtx4090,2:rtx4090", "twice"),
        ("3 rtx4090", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_cards_are_read_strictly(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        parse_cards(text, known_cards())


def test_cards_by_name_and_number() -> None:
    assert parse_cards("3:rtx4090, laptop-cpu,2x t4,this", known_cards()) == {
        "rtx4090": 3, "laptop-cpu": 1, "t4": 2, "this": 1,
    }  # fmt: skip


def test_every_card_says_where_its_figures_are_from() -> None:
    for name, card in known_cards().items():
        assert re.search(r"https://\S+\.\w+/\S+.* \(?.*\d", card.source), name
    shown = "\n".join(lines(_plan("2:rtx4090,1:t4")))
    assert f"rtx4090  {known_cards()['rtx4090'].source}" in shown
    assert known_cards()["a100"].source not in shown


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "cards.toml"
    row = "title='x'\nkind='gpu'\ntflops_single=1\ntflops_half=2\nbandwidth=3\nmemory_gib=4\n"
    path.write_text(f"[cards.mine]\n{row}watts=5\n")
    assert read_cards(path)["mine"].watts == 5
    assert "rtx4090" in read_cards(path)
    path.write_text(f"[cards.mine]\n{row}")
    with pytest.raises(SpecError, match=r"cards\.mine\.watts"):
        read_cards(path)
    path.write_text(f"[cards.this]\n{row}watts=5\n")
    with pytest.raises(SpecError, match="this machine"):
        read_cards(path)


@pytest.mark.parametrize(("text", "down", "up"), [("home", 100, 20), ("50/10", 50, 10), ("8", 8, 8)])
def test_lines(text: str, down: float, up: float) -> None:
    line = line_of(text, None, flag="--line")
    assert (line.down_mbit, line.up_mbit, line.latency_ms) == (down, up, 20)
    assert line_of(text, 3, flag="--line").latency_ms == 3


@pytest.mark.parametrize("text", ["hoem", "0/10", "10/0", "a/b", "1/2/3", "-5", "1..2"])
def test_lines_that_are_none(text: str) -> None:
    with pytest.raises(SpecError, match="--line"):
        line_of(text, None, flag="--line")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"parameters": None}, "how large is the model"),
        ({"parameters": 0.5}, "no number of parameters"),
        ({"parameters": float("nan")}, "no number of parameters"),
        ({"trained": 2e9}, "more than the"),
        ({"model": Path("x")}, "not both"),
        ({"dtype": "float8"}, "model.dtype"),
        ({"compute_dtype": "float8"}, "--compute-dtype"),
        ({"probes": 0}, "round.probes_max"),
        ({"tokens": 1}, "objective.tokens_max"),
        ({"parameters": None, "model": Path("nowhere")}, "no model folder"),
    ],
)
def test_jobs_that_cannot_be(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(PeerturbError, match=re.escape(words)) as caught:
        _job(**flags)
    assert caught.value.exit_code == 2


def test_plans_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="without peers"):
        plan(_job(), [], line=FAST, coordinator_line=FAST)
    with pytest.raises(SpecError, match="1,024 that one coordinator admits"):
        _plan("1025:l4")
    with pytest.raises(SpecError, match="how many rounds"):
        _plan("1:l4", _job(rounds=None))


def test_a_folder_is_counted_from_its_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 11, "hidden_size": 4}')
    save_file({"a.weight": np.zeros((11, 4), np.float32)}, tmp_path / "one.safetensors")
    save_file({"b.bias": np.zeros(3, np.float32)}, tmp_path / "two.safetensors")
    save_file({"copy": np.zeros(99, np.float32)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.bias": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    size = read_size(tmp_path)
    assert (size.parameters, size.trained, size.vocabulary, size.width) == (47, 47, 11, 4)
    assert read_size(tmp_path, exclude=("*.bias",)).trained == 44
    with pytest.raises(ModelError, match="leaves nothing"):
        read_size(tmp_path, exclude=("*",))
    (tmp_path / "two.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match=r"two\.safetensors"):
        read_size(tmp_path)


def test_forwards_are_as_long_as_the_engines() -> None:
    from peerturb.zo import probe

    assert {"cpu": probe.FORWARD_TOKENS["cpu"], "gpu": probe.FORWARD_TOKENS["cuda"]} == FORWARD_TOKENS


def test_this_machine_is_measured_by_the_engine(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(shared / "models" / "stories260k"), "--cards", "2:this", "--probes", "4", "--tokens", "16",
             "--rounds", "3", "--device", "cpu"]  # fmt: skip
    assert cli.run(["sim", "plan", *words]) == 0
    said = capsys.readouterr().out
    assert "4 probes x" in said
    assert "(measured)" in said
    assert "give --watts" in said
    assert cli.run(["sim", "plan", *words, "--watts", "50", "--json", "--compute-dtype", "bfloat16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["energy_wh"] > 0
    assert document["cards"][0]["probing_s"] > 0
    assert "measured" in document["cards"][0]["sums"]["probing"]
    assert document["cards"][0]["update_s"] > 0


def test_this_machine_needs_the_model_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sim", "plan", "--parameters", "1e6", "--cards", "this", "--rounds", "1"]) == 2
    assert "give its folder with --model" in capsys.readouterr().err
    assert cli.run(["sim", "plan", "--parameters", "1e6", "--rounds", "1"]) == 2
    assert "give --cards" in capsys.readouterr().err
