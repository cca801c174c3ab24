"""A run of real processes, made again in one process: the same log bytes; with other data the first other record.

Two nodes send exact projections, two estimates by probes. In mid-run one node leaves, another joins late, one is killed
and comes back, the coordinator is killed and restarted.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peerturb.protocol.ledger import Ledger
from peerturb.protocol.records import Evaluated, PeerLeft, Record, RoundSealed
from peerturb.runlog.reader import read_records
from peerturb.zo.model import prepare
from tests.integration.network import Network, network
from tests.zo_models import byte_tokenizer, small_model

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

NODES = ("ann", "bob", "cid", "dora")
EXACT = ("bob", "dora")
HARDWARE = ("--threads", "1", "--rows", "8")
"""What decides the last bits of losses, for nodes and reproduction alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run left behind."""

    net: Network
    folder: Path
    log: Path
    trace: Path

    @property
    def records(self) -> list[Record]:
        return list(read_records(self.log))

    @property
    def sealed(self) -> int:
        """Number of sealed rounds."""
        return sum(isinstance(record, RoundSealed) for record in self.records)

    @property
    def names(self) -> list[str]:
        """By slot."""
        return [member.name for member in Ledger.fold(self.records).members]

    def again(self, *flags: str, log: Path | None = None, out: str = "again") -> tuple[int, dict[str, Any], str]:
        """Reproduce it; return exit code, report and standard error."""
        arguments = [str(log or self.log), "--trace", str(self.trace), "--model", str(self.folder / "model")]
        arguments += ["--eval", str(self.folder / "held-out.jsonl"), "--out", str(self.folder / out), *HARDWARE]
        ended = self.net.run("sim", "reproduce", *arguments, "--json", *flags, timeout_s=600)
        return ended.returncode, json.loads(ended.stdout) if ended.stdout else {}, ended.stderr

    def data(self, **other: str) -> list[str]:
        """Flags that give each node its file, but for `other`."""
        files = {name: f"{name}.jsonl" for name in NODES} | other
        return [word for name, file in files.items() for word in ("--data", f"{name}={self.folder / file}")]


def write_inputs(folder: Path) -> None:
    """Write a small random model, one file for each node, one that none of them has, and a held-out one."""
    prepare(small_model("llama-tied"), "float32").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for number, name in enumerate([*NODES, "other", "held-out"]):
        texts = [f"{'abcdef'[number]} word {'xyz' * (line % 5)} {line}" for line in range(24)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def start(net: Network, name: str) -> Any:
    flags = ["--model", str(net.folder / "model"), "--data", str(net.folder / f"{name}.jsonl"), "--device", "cpu"]
    if name in ("ann", "dora"):
        flags += ["--eval", str(net.folder / "held-out.jsonl")]
    flags += ["--estimator", "exact" if name in EXACT else "spsa"]
    return net.start_node(name, *flags, *HARDWARE, compute="torch")


def live(net: Network, trace: Path) -> None:
    """Let everything happen. Fewer than three contributions seal no round: so the run waits for us, not we for it."""
    net.start_coordinator("--trace", str(trace))
    nodes = {name: start(net, name) for name in NODES[:3]}
    nodes["bob"].wait_for_round(4, timeout_s=300)
    assert nodes["bob"].stop(timeout_s=120) == 0
    nodes["dora"] = start(net, "dora")
    nodes["dora"].wait_for_round(nodes["ann"].of("round")[-1]["round"] + 3, timeout_s=300)
    assert net.coordinator is not None
    net.coordinator.kill()
    net.start_coordinator("--trace", str(trace))
    at = nodes["ann"].of("round")[-1]["round"]
    nodes["ann"].wait_for_round(at + 3, timeout_s=300)
    nodes["cid"].kill()
    nodes["cid"] = start(net, "cid")
    at = nodes["ann"].of("round")[-1]["round"]
    nodes["ann"].wait_for_round(at + 6, timeout_s=300)
    for name in ("ann", "cid", "dora"):
        nodes[name].stop(timeout_s=120)
    assert net.coordinator.stop(timeout_s=120) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("reality")
    write_inputs(folder)
    with network(folder, "") as net:
        shown = net.run("model", str(folder / "model"), "--json")
        assert shown.returncode == 0, shown.stderr
        net.run_file.write_text(
            f'name = "reality"\n{json.loads(shown.stdout)["toml"]}\n[step]\nlearning_rate = 1e-2\nhalf_codes = 32\n'
            '[perturbation]\nestimators = ["spsa", "exact"]\nexact = { examples = 6, codes = 80 }\n'
            "[round]\nprobes_max = 48\nmin_peers = 3\ndeadline_ms_min = 60000\ndeadline_ms_max = 300000\n"
            '[objective]\nkind = "text"\ntemplate = "{text}"\ntokens_max = 24\neval_every = 3\n'
        )
        live(net, folder / "run.trace")
        yield Run(net=net, folder=folder, log=net.export_log(), trace=folder / "run.trace")


def test_the_run_had_everything_in_it(run: Run) -> None:
    kinds = {type(record) for record in run.records}
    assert {Evaluated, PeerLeft, RoundSealed} <= kinds
    assert set(run.names) == set(NODES)
    lines = [json.loads(line) for line in run.trace.read_text().splitlines()[1:]]
    assert sum(line["do"] == "start" for line in lines) == 2
    assert {len(record.slots) for record in run.records if isinstance(record, RoundSealed)} == {3}
    assert len({record.slots for record in run.records if isinstance(record, RoundSealed)}) >= 2


def test_it_is_reproduced_byte_for_byte(run: Run) -> None:
    code, report, errors = run.again(*run.data())
    assert (code, report["outcome"]) == (0, "equal"), (report, errors)
    assert (run.folder / "again" / "run.log").read_bytes() == run.log.read_bytes()
    assert report["equal_records"] == len(run.records)
    assert report["equal_rounds"] == run.sealed


def test_a_nodes_own_log_and_files_in_the_order_of_slots_do_as_well(run: Run) -> None:
    log = run.net.local_log("ann")
    files = [word for name in run.names for word in ("--data", str(run.folder / f"{name}.jsonl"))]
    code, report, errors = run.again(*files, log=log, out="of-a-node")
    assert (code, report["outcome"]) == (0, "equal"), (report, errors)
    assert (run.folder / "of-a-node" / "run.log").read_bytes() == log.read_bytes()


def test_the_commands_of_the_page_do_it(run: Run, repository: Path) -> None:
    """As written there, in the folder of the run."""
    page = (repository / "docs" / "simulator.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Same as reality.*?```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    commands = [words[1:] for words in lines if words[1:2] in (["log"], ["sim"])]
    assert [words[:2] for words in commands] == [["log", "export"], ["sim", "reproduce"]]
    for words in commands:
        ended = run.net.run(*words, timeout_s=600, folder=run.folder)
        assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"equal: {len(run.records)} records, {run.sealed} sealed rounds\n"
    assert (run.folder / "again" / "run.log").read_bytes() == (run.folder / "run.runlog").read_bytes()


def test_other_data_of_one_peer_are_found_at_its_first_round(run: Run) -> None:
    slot = run.names.index("dora")
    first = next(
        at for at, record in enumerate(run.records) if isinstance(record, RoundSealed) and slot in record.slots
    )
    code, report, _ = run.again(*run.data(dora="other.jsonl"), out="other")
    assert (code, report["outcome"], report["equal_records"]) == (1, "different", first)
    found = report["difference"]
    assert (found["field"], found["slot"]) == ("codes", slot)
    assert found["first"] != found["second"]
    # All before is in the new log, and nothing after the difference: it could not be equal.
    assert len(list(read_records(run.folder / "other" / "run.log"))) == first + 1


def test_other_held_out_data_are_found_at_the_first_evaluation(run: Run) -> None:
    first = next(at for at, record in enumerate(run.records) if isinstance(record, Evaluated))
    code, report, _ = run.again(*run.data(), "--eval", str(run.folder / "other.jsonl"), out="judged")
    assert (code, report["equal_records"], report["difference"]["field"]) == (1, first, "loss")


def test_a_trace_that_ends_before_the_log_is_named_with_its_last_line(run: Run) -> None:
    lines = run.trace.read_bytes().splitlines(keepends=True)
    short = run.folder / "short.trace"
    short.write_bytes(b"".join(lines[:30]) + lines[30][:10])
    code, report, errors = run.again(*run.data(), "--trace", str(short), out="short")
    assert (code, report) == (2, {})
    assert f"{short}: the last 10 bytes are a line that was not written whole" in errors
    assert f"error: {short}:30: the trace ends after record " in errors
    assert len(list(read_records(run.folder / "short" / "run.log"))) < len(run.records)
