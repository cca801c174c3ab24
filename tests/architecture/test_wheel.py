"""The wheel carries every package and its data, and drops nothing with a common name into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = {
    "peerturb": "peerturb",
    "peerturb_node": "node/peerturb_node",
    "peerturb_coordinator": "coordinator/peerturb_coordinator",
    "peerturb_sim": "sim/peerturb_sim",
    "peerturb_bench": "benchmarks/peerturb_bench",
}
SKIPPED = ("__pycache__", ".pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("peerturb-*.whl")
    return built


def test_wheel_has_only_our_names_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_has_every_file_of_every_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for package, folder in PACKAGES.items():
        root = REPOSITORY / folder
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        wanted = {f"{package}/{name}" for name in files if not any(part in name for part in SKIPPED)}
        assert wanted, folder
        assert wanted <= packed
    assert "peerturb/py.typed" in packed


def test_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name
        }
    assert "peerturb = peerturb.cli:main" in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in texts["LICENSE"]


def test_unpacked_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import peerturb.cli, peerturb_node, peerturb_bench.cli; "
        "print(peerturb.__file__, peerturb_node.__file__); sys.exit(peerturb.cli.run(['bench', '--help']))"
    )
    command = [sys.executable, "-I", "-c", program, str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(str(tmp_path)) == 2, "it ran the checkout's sources instead of the wheel's"
