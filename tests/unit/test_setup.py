"""Setting up `.venv`: it notices what happened to the environment, and does nothing when nothing did."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

FINDER = REPOSITORY / "scripts" / "find_python.sh"


@pytest.fixture
def installed() -> list[str]:
    """Collects the extras that would have been installed."""
    return []


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]) -> ModuleType:
    """The set-up script with a checkout of its own, environments without pip, and nothing to download."""
    found = importlib.util.spec_from_file_location("setup_under_test", REPOSITORY / "scripts" / "setup.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for name in module.INPUTS:
        (tmp_path / name).write_text("torch==2.13.0\nhatchling==1.0\n")

    def create(environment: Path, with_pip: bool) -> None:
        assert with_pip
        assert (environment / ".installing").exists(), "an interruption here would go unnoticed"
        (environment / "bin").mkdir()
        for name in ("python", "pip"):
            (environment / "bin" / name).symlink_to(sys.executable)
        (environment / "pyvenv.cfg").write_text(f"version = 3.11.0\ncommand = python3 -m venv {environment}\n")

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.venv, "create", create)
    monkeypatch.setattr(module, "install", lambda extra, environment: installed.append(extra))
    return module


def test_a_second_run_does_nothing(setup: ModuleType, tmp_path: Path, installed: list[str]) -> None:
    for _ in range(2):
        setup.ensure("dev", tmp_path / ".venv")
    assert installed == ["dev"]


def test_dev_serves_the_demo_too_but_not_the_other_way_round(
    setup: ModuleType, tmp_path: Path, installed: list[str]
) -> None:
    for extra in ("node", "node", "dev", "node", "dev"):
        setup.ensure(extra, tmp_path / ".venv")
    assert installed == ["node", "dev"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(name: str, setup: ModuleType, tmp_path: Path, installed: list[str]) -> None:
    environment = tmp_path / ".venv"
    setup.ensure("dev", environment)
    (environment / "kept").touch()
    (tmp_path / name).write_text("torch==2.14.0\n")
    setup.ensure("dev", environment)
    assert installed == ["dev", "dev"]
    assert (environment / "kept").exists(), "pip can go on from here; no need to start over"


@pytest.mark.parametrize("where", ["cut off while installing", "cut off while made", "moved", "interpreter gone"])
def test_a_damaged_environment_is_made_anew(
    where: str, setup: ModuleType, tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / ".venv"
    setup.ensure("dev", environment)
    (environment / "left over").touch()
    if where == "cut off while installing":
        (environment / ".installing").touch()
    elif where == "cut off while made":
        (environment / ".installing").touch()
        (environment / "pyvenv.cfg").unlink()
    elif where == "moved":
        moved = tmp_path / "else where"
        moved.mkdir()
        shutil.move(environment, moved / ".venv")
        for name in setup.INPUTS:
            shutil.copy(tmp_path / name, moved)
        monkeypatch.setattr(setup, "ROOT", moved)
        environment = moved / ".venv"
    else:
        (environment / "bin" / "python").unlink()
        (environment / "bin" / "python").symlink_to(tmp_path / "no such python")
    assert not setup.is_sound(environment)
    setup.ensure("dev", environment)
    assert installed == ["dev", "dev"]
    assert not (environment / "left over").exists()
    assert setup.is_sound(environment)


@pytest.mark.parametrize(("code", "stays"), [(1, True), (-9, False)])
def test_an_environment_survives_pips_no_but_not_its_death(
    code: int, stays: bool, setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(extra: str, environment: Path) -> None:
        raise subprocess.CalledProcessError(code, ["python", "-m", "pip"])

    monkeypatch.setattr(setup, "install", fail)
    with pytest.raises(subprocess.CalledProcessError):
        setup.ensure("dev", tmp_path / ".venv")
    assert setup.is_sound(tmp_path / ".venv") is stays
    assert not (tmp_path / ".venv" / ".ready-dev").exists()


def _find(folder: Path, **pythons: str) -> subprocess.CompletedProcess[str]:
    """Run the finder with nothing on PATH but shell scripts of these names and bodies."""
    folder.mkdir()
    for name, body in pythons.items():
        script = folder / name.replace("_", ".")
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    environment = {"PATH": str(folder)}
    return subprocess.run(["/bin/sh", FINDER], env=environment, capture_output=True, text=True, check=False)


REAL = f'exec "{os.path.realpath(sys.executable)}" "$@"'


def test_the_finder_passes_over_pythons_that_do_not_serve(tmp_path: Path) -> None:
    ended = _find(tmp_path / "bin", python3_11="exit 127", python3_12="exit 3", python3_13="exit 4", python3=REAL)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == os.path.realpath(sys.executable)


@pytest.mark.parametrize(
    ("body", "advice"), [("exit 3", "python3 is older"), ("exit 4", "no ensurepip"), ("exit 127", "no Python found")]
)
def test_the_finder_says_what_is_missing(body: str, advice: str, tmp_path: Path) -> None:
    ended = _find(tmp_path / "bin", python3=body)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert advice in ended.stderr
    assert "make PYTHON=" in ended.stderr


def test_the_finder_knows_the_minimum(tmp_path: Path) -> None:
    """The check itself, run by a real Python that believes to be 3.10."""
    pretend = f'program=$2; shift 2; exec "{sys.executable}" -c "import sys; sys.version_info = (3, 10, 9); $program"'
    ended = _find(tmp_path / "bin", python3=pretend)
    assert ended.returncode == 1
    assert "Python 3.11 or newer is needed; python3 is older" in ended.stderr
