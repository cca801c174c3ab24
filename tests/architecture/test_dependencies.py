"""Pins and ranges agree with each other and with the generated code."""

import re
import tomllib
from importlib.metadata import version

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
        assert re.fullmatch(r"[0-9][0-9A-Za-z.]*", pin), f"{name}: {pin} is not a public version"


def test_pins_lie_in_the_ranges() -> None:
    pins = {_normal(name): pin for name, pin in PINS.items()}
    # ray is no part of the test environment: the simulator is not in this release.
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
