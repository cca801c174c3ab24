"""Rules about the sources themselves: size, docstrings, forbidden modules, paths of somebody's machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = ("peerturb", "node", "coordinator", "sim", "benchmarks", "tests", "scripts")
GENERATED = REPOSITORY / "peerturb" / "wire" / "v1"
LINES_MAX = 400


def _sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path for path in found if GENERATED not in path.parents]


SOURCES = _sources()
NAMES = [str(path.relative_to(REPOSITORY)) for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_module_says_what_it_is_for_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES_MAX, f"split it: at most {LINES_MAX} lines, one subject"
    assert ast.get_docstring(ast.parse(text)), "say in a module docstring what it is for"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_module_imports_nothing_that_runs_code_from_data(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def test_no_committed_text_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of committed files")
    place = re.compile(rb"(?<![\w.])/(?:home|root|Users)/\w+")
    guilty = []
    for name in listed.stdout.decode().split("\0"):
        path = REPOSITORY / name
        if name and path.is_file() and path != Path(__file__):
            content = path.read_bytes()
            if b"\0" not in content[:8192] and place.search(content):
                guilty.append(name)
    assert guilty == []
