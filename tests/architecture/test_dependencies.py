"""Pins and ranges agree with each other and with the generated code."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "peerturb"]


def test_every_pin_is_one_plain_version() -> None:
    for name, pin in PINS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), name
        assert re.fullmatch(r"([0-9]+!)?[0-9][0-9A-Za-z.]*", pin), f"{name}: {pin} is not a public version"


def test_pins_lie_in_the_ranges() -> None:
    pins = {_normal(name): pin for name, pin in PINS.items()}
    # ray is no part of the test environment.
    checked = [requirement for requirement in _requirements() if requirement.name != "ray"]
    for requirement in checked:
        assert requirement.specifier.contains(pins[_normal(requirement.name)], prereleases=False), str(requirement)


def test_installed_torch_is_the_pinned_one() -> None:
    # The local part names the build (CPU, CUDA); the pin leaves it open.
    assert version("torch").partition("+")[0] == PINS["torch"]


def test_bare_install_needs_nothing_heavy() -> None:
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names & {"torch", "transformers", "safetensors", "tokenizers", "ray", "matplotlib"} == set()


def test_lower_bounds_satisfy_the_generated_code() -> None:
    bounds = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    generated = REPOSITORY / "peerturb" / "wire" / "v1"
    protobuf_versions = set()
    grpc_versions = set()
    for path in generated.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        protobuf_versions |= set(re.findall(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE))
        grpc_versions |= set(re.findall(r"^GRPC_GENERATED_VERSION = '(\S+)'$", text, re.MULTILINE))
    assert len(protobuf_versions) == len(grpc_versions) == 1
    assert f">={protobuf_versions.pop()}" in str(bounds["protobuf"])
    assert f">={grpc_versions.pop()}" in str(bounds["grpcio"])


def _third_party(folder: Path) -> set[str]:
    """Normal names of the distributions that the sources below `folder` import, wherever the import stands."""
    roots: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module)
    owners = packages_distributions()
    found = set()
    for root in {name.partition(".")[0] for name in roots}:
        if root == "google":
            found.add("protobuf")
        elif root == "triton":  # torch's CUDA packages bring it, others lack it
            found.add("torch")
        elif root == "pynvml":  # of the extra `idle`, which is no part of the test environment
            found.add("nvidia-ml-py")
        elif root not in sys.stdlib_module_names and not root.startswith("peerturb"):
            found |= {_normal(name) for name in owners[root]}
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("peerturb/protocol", []),
        ("peerturb/runlog", []),
        ("peerturb/wire", []),
        ("coordinator/peerturb_coordinator", []),
        ("peerturb", ["node", "fast", "adapters", "quantised"]),
        ("node/peerturb_node", ["node", "idle"]),
        ("sim/peerturb_sim", ["node", "sim"]),
        ("benchmarks/peerturb_bench", ["node", "bench"]),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: list[str]) -> None:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    declared = {_normal(Requirement(line).name) for line in lines}
    assert _third_party(REPOSITORY / folder) - declared == set()
