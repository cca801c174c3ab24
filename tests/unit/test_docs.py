"""The pages keep their word: commands, flags, targets, links, paths and sums that they name exist and agree.

Nothing is run: a command line is parsed by the command it names.
"""

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from peerturb import cli
from peerturb.wire.v1 import coordinator_pb2, record_pb2
from peerturb_coordinator.settings import CoordinatorSettings
from peerturb_node.settings import NodeSettings
from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "deploy" / "README.md"])
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
SEPARATORS = {"|", "||", "&&", ";", "&", ">", ">>", "2>&1"}

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
"""A fenced block; in a list it stands as far to the right as the item's text."""


def _fences(text: str, *languages: str) -> list[str]:
    """Bodies of the fenced blocks in one of the languages."""
    return [textwrap.dedent(body) for _, language, body in _FENCE.findall(text) if language in languages]


def _inline(text: str) -> list[str]:
    """Contents of `...` outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, continued ones joined, and of indented blocks."""
    for body in _fences(text, "sh"):
        yield from body.replace("\\\n", " ").splitlines()
    yield from (line.strip() for line in _FENCE.sub("", text).splitlines() if line.startswith("    "))


def _commands(words: list[str]) -> Iterator[list[str]]:
    """Cut a split line at pipes and the like; yield what `peerturb` is given each time."""
    part: list[str] = []
    for word in [*words, ";"]:
        if word not in SEPARATORS:
            part.append(word)
            continue
        if part and Path(part[0]).name == "peerturb":
            yield part[1:]
        part = []


def _resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that the first words name, and its arguments."""
    assert words[0] in cli.COMMANDS, f"there is no command `peerturb {words[0]}`"
    command, rest = cli._load(cli.COMMANDS[words[0]]), words[1:]
    while rest and getattr(command, "commands", None):
        assert rest[0] in command.commands, f"there is no command `peerturb {' '.join(words)}`"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def _options(command: Any) -> set[str]:
    return {"--help"} | {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check_command(words: list[str], *, is_whole: bool) -> None:
    """Fail unless the command and each of its flags exist and, for a whole line, its arguments parse."""
    if not words or words[0] in ("--help", "--version"):
        return
    command, arguments = _resolve(words)
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    assert flags <= _options(command), f"`peerturb {' '.join(words)}`: no flag {flags - _options(command)}"
    if is_whole and "--help" not in flags:
        command.make_context(words[0], list(arguments))


@each_page
def test_command_lines_parse(page: Path) -> None:
    for line in shell_lines(page.read_text(encoding="utf-8")):
        if "peerturb " in line:
            for words in _commands(shlex.split(line, comments=True)):
                check_command(words, is_whole=True)


@each_page
def test_commands_named_in_passing_exist(page: Path) -> None:
    for code in _inline(page.read_text(encoding="utf-8")):
        if code.startswith("peerturb ") and code != "peerturb COMMAND --help":
            check_command([word for word in shlex.split(code)[1:] if word != "..."], is_whole=False)


@pytest.mark.parametrize("name", ["README.md", "docs/start.md"])
def test_the_start_pages_show_the_whole_way(name: str) -> None:
    shown = set()
    for line in shell_lines((REPOSITORY / name).read_text(encoding="utf-8")):
        for words in _commands(shlex.split(line, comments=True)):
            has_subcommands = words[0] in ("coordinator", "node", "log")
            shown.add(" ".join(words[: 2 if has_subcommands else 1]))
    assert {"model", "coordinator keys", "coordinator serve", "doctor", "node run", "status", "log export"} <= shown


def test_a_wrong_flag_would_be_found() -> None:
    with pytest.raises(AssertionError, match="--listne"):
        check_command(["coordinator", "serve", "RUN.toml", "--listne", "0.0.0.0:1"], is_whole=True)
    with pytest.raises(AssertionError, match="log exprot"):
        check_command(["log", "exprot"], is_whole=False)
    with pytest.raises(Exception, match=r"[Mm]issing"):
        check_command(["coordinator", "serve"], is_whole=True)


def test_the_table_lists_every_command() -> None:
    rows = set(re.findall(r"^\| `peerturb ([a-z ]+)` \|", README, re.MULTILINE))
    every = set()
    for name in cli.COMMANDS:
        subcommands = getattr(cli._load(cli.COMMANDS[name]), "commands", None)
        every |= {f"{name} {sub}" for sub in subcommands} if subcommands else {name}
    assert rows == every


@each_page
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rules = re.findall(r"^([a-z%-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [*shell_lines(text), *_inline(text)]
    for target in re.findall(r"^(?:[A-Z]+=\S+ )*make ([a-z-]+)", "\n".join(lines), re.MULTILINE):
        known = [rule for rule in rules if re.fullmatch(rule.replace("%", "(node|dev)"), target)]
        assert known, f"make {target} is no target"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name) if name else page
        assert found.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: no such heading"


@each_page
def test_paths_exist(page: Path) -> None:
    for code in _inline(page.read_text(encoding="utf-8")):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", code) and not code.startswith(("demo-out", "bench-out")):
            assert (REPOSITORY / code).exists(), f"{code} does not exist"


def test_the_file_map_has_every_folder() -> None:
    section = README.partition("## File map")[2]
    listed = re.findall(r"^\| `([^`]+)/` \|", section, re.MULTILINE)
    assert all((REPOSITORY / folder).is_dir() for folder in listed)
    packages = {path.parent for path in REPOSITORY.glob("*/*/__init__.py")} | {
        path.parent for path in REPOSITORY.glob("*/__init__.py")
    }
    tops = {REPOSITORY / name for name in ("protos", "tests", "examples", "scripts", "docs")}
    wanted = {path.relative_to(REPOSITORY).as_posix() for path in packages | tops}
    assert wanted <= set(listed)


@each_page
def test_examples_of_code_compile(page: Path) -> None:
    for body in _fences(page.read_text(encoding="utf-8"), "python"):
        ast.parse(body)


def _framing() -> int:
    data_header, grpc_prefix, window_update = 9, 5, 13
    return data_header + grpc_prefix + 2 * window_update


def test_the_byte_budget_is_that_of_the_messages() -> None:
    def up(codes: int) -> int:
        # Rounds from 128 on take two bytes.
        message = coordinator_pb2.FromPeer(round=300, codes=bytes(codes), loss=1.5, digest=0x12345678)
        return len(message.SerializeToString()) + _framing()

    sealed = record_pb2.Record(alpha=1e-3, loss=2.5, digest=0x12345678, slot_bits=b"\x0f", codes=bytes(512))
    opened = record_pb2.Record(scale=0.5, deadline_ms=1_000)
    records = [record.SerializeToString() for record in (sealed, opened)]
    down = len(coordinator_pb2.ToPeer(records=records).SerializeToString()) + _framing()

    rows = re.findall(r"^\| (?:up|down) \| [^|]+ \| ([^|]+) \| (\d+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert [int(total) for _, total, _ in rows] == [up(128), up(256), down]
    for (sum_, total, per_code), codes in zip(rows, (128, 256, 512), strict=True):
        terms = re.findall(r"(?:^|\+ )(\d+)", sum_)
        assert sum(map(int, terms)) == int(total), sum_
        assert abs(int(total) / codes - float(per_code)) <= 0.0005


@pytest.mark.parametrize(
    ("words", "settings"),
    [(["node", "run"], NodeSettings), (["coordinator", "serve"], CoordinatorSettings)],
    ids=["node", "coordinator"],
)
def test_help_shows_the_settings_defaults(words: list[str], settings: type[BaseModel]) -> None:
    command, _ = _resolve(words)
    shown = {
        parameter.name: parameter.show_default
        for parameter in command.params
        if isinstance(getattr(parameter, "show_default", None), str) and parameter.name != "name"
    }
    assert shown
    for name, text in shown.items():
        default = settings.model_fields[name].default
        expected = f"{default:g}" if isinstance(default, float) else str(default)
        assert text == expected, f"--{name} shows {text}, the default is {expected}"
