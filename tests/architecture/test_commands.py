"""Every command explains itself at once and on an installation without torch."""

import json
import subprocess
import sys

import pytest

from peerturb.cli import COMMANDS

HEAVY = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "matplotlib", "numba", "ray")
HEAVY_FOR_HELP = (*HEAVY, "grpc", "numpy", "pydantic", "typer", "rich")

# Runs `NAME --help` and the help of each of its subcommands; reports exit codes, texts and loaded modules as JSON.
# What argv names is made impossible to import first, as on the bare install.
PROBE = """
import contextlib, importlib.abc, io, json, sys

name, *blocked = sys.argv[1:]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None

sys.meta_path.insert(0, Absent())

from peerturb import cli

def help_of(*words):
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = cli.run([*words, "--help"])
    return {"code": code, "stdout": printed.getvalue(), "stderr": complaint.getvalue()}

report = {name: help_of(*([name] if name else []))}
if name and report[name]["code"] == 0:
    for sub in getattr(cli._load(cli.COMMANDS[name]), "commands", {}):
        report[f"{name} {sub}"] = help_of(name, sub)
print(json.dumps({"help": report, "modules": sorted({m.partition(".")[0] for m in sys.modules})}))
"""


def _probe(name: str, *blocked: str) -> tuple[dict[str, dict[str, str | int]], set[str]]:
    command = [sys.executable, "-c", PROBE, name, *blocked]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    return report["help"], set(report["modules"])


def test_the_overview_lists_every_command_and_loads_nothing() -> None:
    reports, modules = _probe("")
    text = str(reports[""]["stdout"])
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text
    assert modules & set(HEAVY_FOR_HELP) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_works_without_torch(name: str) -> None:
    reports, modules = _probe(name, *HEAVY)
    for words, report in reports.items():
        assert report["code"] == 0, f"{words}: {report['stderr']}"
        assert f"peerturb {words}" in str(report["stdout"])
    assert modules & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("name", "subcommands"),
    [
        ("coordinator", {"serve", "keys"}),
        ("node", {"run"}),
        ("log", {"show", "verify", "replay", "export"}),
        ("sim", {"run"}),
    ],
)
def test_commands_offer_their_subcommands(name: str, subcommands: set[str]) -> None:
    reports, _ = _probe(name, *HEAVY)
    assert {f"{name} {sub}" for sub in subcommands} <= set(reports)
