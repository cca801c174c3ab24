"""The guides' commands are run against a run that goes on, as a reader would type them; their figures hold."""

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest

from peerturb.wire.v1 import coordinator_pb2 as pb
from peerturb_node.demo.task import write_task
from tests.conftest import REPOSITORY
from tests.integration.newcomer import Machine, fill_in, free_port, join_line, two_machines, wait_for
from tests.unit.test_docs import shell_lines

DOCS = REPOSITORY / "docs"
MODEL = "node/peerturb_node/demo/assets/base"


def commands(page: str) -> list[str]:
    """Return the command lines of a page's shell blocks that peerturb has to carry out, in their order."""
    lines = shell_lines((DOCS / page).read_text(encoding="utf-8"))
    return [line for line in lines if line.startswith("peerturb ")]


def own(line: str) -> str:
    """Put a reader's names in place of the pages' capital letters, and rounds that a short run has."""
    line = re.sub(r"--model (MODEL|FOLDER)\b", f"--model {MODEL}", line)
    line = re.sub(r"--rounds \d+:\d+", "--rounds 1:2", line)
    return re.sub(r"--until \d+", "--until 2", line)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_volunteering_and_an_incident(tmp_path: Path) -> None:
    port = free_port()
    with two_machines(tmp_path) as machines:
        a, b = machines["A"], machines["B"]
        text = (REPOSITORY / "examples" / "quickstart.toml").read_text(encoding="utf-8")
        one_is_enough = text.replace("min_peers = 2", "min_peers = 1")
        (a.clone / "RUN.toml").write_text(one_is_enough, encoding="utf-8")
        serve = "peerturb coordinator serve RUN.toml --listen 0.0.0.0:7470 --advertise 192.0.2.2"
        a.type(fill_in(f"{serve} --keys peerturb-keys", port=port, join=None))
        join = wait_for(partial(join_line, a), a)
        shutil.copy(a.clone / "peerturb-keys" / "join-token", b.clone / "join-token")
        texts = (DOCS / "protocol.md").read_text(encoding="utf-8").splitlines()
        rows = [json.dumps({"text": line}) for line in texts if len(line) > 100]
        (b.clone / "my-texts.jsonl").write_text("\n".join(rows), encoding="utf-8")

        volunteer = commands("volunteering.md")
        assert [shlex.split(line)[1] for line in volunteer] == ["status", "log", "doctor", "node"]
        for line in volunteer:
            filled = fill_in(own(line), port=port, join=join)
            if " node run " in line:
                b.type(filled)
                continue
            done = b.run(filled)
            assert done.returncode == 0, f"{filled}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
            if " log show " in line:
                assert json.loads(done.stdout)["spec"]["objective"]["kind"] == "text"
            if " doctor " in line:
                assert "everything is in order" in done.stdout
        wait_for(partial(shows, b, r"^round +[2-9] "), b)

        # The coordinator's machine: everything while the run goes on.
        runbook = commands("incidents.md")
        assert {" ".join(shlex.split(line)[1:3]) for line in runbook} >= {"log export", "log verify", "log show"}
        for line in runbook:
            filled = fill_in(own(line), port=port, join=join)
            done = a.run(filled)
            assert done.returncode == 0, f"{filled}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
        assert 'name = "before-the-fault"' in (a.clone / "NEXT.toml").read_text(encoding="utf-8")


def shows(machine: Machine, pattern: str) -> bool | None:
    """Return True once a machine's terminals show something."""
    return True if re.search(pattern, machine.said(), re.MULTILINE) else None


@pytest.mark.slow
def test_tuning_recommends_or_says_what_it_lacks(tmp_path: Path) -> None:
    with two_machines(tmp_path) as machines:
        a = machines["A"]
        shutil.copy(REPOSITORY / "examples" / "code-or-doc.toml", a.clone / "RUN.toml")
        written = write_task(tmp_path / "data", nodes=1)
        shutil.copy(written.train[0], a.clone / "train.jsonl")
        shutil.copy(written.heldout, a.clone / "heldout.jsonl")
        tunes = [line for line in commands("tuning.md") if " tune " in line]
        assert len(tunes) == 1
        done = a.run(re.sub(r"--budget \d+", "--budget 30", own(tunes[0])))
        assert "held-out loss" in done.stdout, done.stdout + done.stderr
        if done.returncode == 0:
            assert re.search(r"\[step\]\nlearning_rate = [\d.e-]+", done.stdout)
        else:  # a machine so busy that the budget was too small
            assert done.returncode == 1
            assert "raise --budget" in done.stdout


def test_the_volunteer_s_table_is_the_protocol() -> None:
    text = (DOCS / "volunteering.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?(\w+)`? \| [^|]+ \| ([^|]+) \| (\d+)[^|]*\|$", text, re.MULTILINE)
    told = {name: (set(re.findall(r"`(\w+)`", fields)), int(size)) for name, fields, size in rows}
    kinds = pb.FromPeer.DESCRIPTOR.oneofs_by_name["kind"].fields
    sent = {kind.name: {field.name for field in kind.message_type.fields} for kind in kinds if kind.message_type}
    plain = {field.name for field in pb.FromPeer.DESCRIPTOR.fields} - set(sent)
    assert told["contribution"][0] == plain
    assert {name.lower() for name in told} == {*sent, "contribution"}, "every message that a node can send is there"
    for name, fields in sent.items():
        assert told[name.capitalize()][0] == fields, name
    digest = bytes(32)
    messages = {
        "Hello": pb.FromPeer(
            hello=pb.Hello(
                protocol=1, key=digest, name="attic", token="t" * 32, spec_digest=digest, base_digest=digest,
                manifest_digest=digest, position=100, chain=digest,
            )
        ),
        "Proof": pb.FromPeer(proof=pb.Proof(signature=bytes(64))),
        "contribution": pb.FromPeer(round=300, codes=bytes(128), loss=1.5, digest=1),
        "Evaluation": pb.FromPeer(evaluation=pb.Evaluation(round=300, loss=1.5, accuracy=0.5, examples=300)),
        "Leave": pb.FromPeer(leave=pb.Leave()),
    }  # fmt: skip
    assert {name: size for name, (_, size) in told.items()} == {name: m.ByteSize() for name, m in messages.items()}


def test_the_sizing_table_is_what_the_plan_says(tmp_path: Path) -> None:
    text = (DOCS / "sizing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]*)\| `([\w-]+)` \| ([\d.]+) GB \| ([\d.]+) s[^|]*\|", text, re.MULTILINE)
    assert len(rows) >= 6
    sizes = {"22 million": "22e6", "1.1 billion": "1.1e9", "7 billion": "7e9"}
    model = ""
    with two_machines(tmp_path) as machines:
        for first, card, memory, seconds in rows:
            model = first.strip() or model
            amount, _, dtype = model.partition(", ")
            command = f"peerturb sim plan --parameters {sizes[amount]} --dtype {dtype} --cards 16:{card}"
            done = machines["A"].run(f"{command} --probes 64 --rounds 400 --line home --json")
            assert done.returncode == 0, done.stderr
            plan = json.loads(done.stdout)
            assert plan["cards"][0]["memory_bytes"] / 1e9 == pytest.approx(float(memory), rel=0.03)
            assert plan["round_s"] == pytest.approx(float(seconds), rel=0.03)
