"""Reads what the files of deploy/ start: command lines and environments of units, images, Compose and Kubernetes."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


@dataclass(frozen=True, slots=True)
class Started:
    """One process, as a file of deploy/ starts it."""

    words: list[str]
    """What `peerturb` is given."""
    environment: dict[str, str] = field(default_factory=dict)


def unit(name: str) -> Started:
    """Return what the unit `peerturb-NAME` starts."""
    text = unit_file(name).read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, *words = shlex.split(line)
    assert program == "/opt/peerturb/bin/peerturb"
    pairs = [pair for found in re.findall(r"^Environment=(.*)$", text, re.MULTILINE) for pair in shlex.split(found)]
    return Started(words, dict(pair.split("=", 1) for pair in pairs))


def unit_file(name: str) -> Path:
    """Return the unit `peerturb-NAME`."""
    return DEPLOY / "systemd" / f"peerturb-{name}.service"


def dockerfile(name: str) -> Path:
    """Return the image's source."""
    return DEPLOY / "docker" / f"{name}.Dockerfile"


def image(name: str, command: list[str] | None = None) -> Started:
    """Return what an image starts, with its own CMD or another."""
    text = dockerfile(name).read_text(encoding="utf-8").replace("\\\n", "")
    found = {key: json.loads(line) for key, line in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)}
    entry: list[str] = found["ENTRYPOINT"]
    if entry[0] == "tini":
        assert entry[1] == "--"
        entry = entry[2:]
    assert entry[0] == "peerturb"
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    environment = dict(pair.split("=", 1) for pair in shlex.split(line))
    del environment["PATH"]
    return Started(entry[1:] + (found["CMD"] if command is None else command), environment)


def health_path(name: str) -> str:
    """Return what the image's health check asks for: PORT/PATH."""
    (found,) = re.findall(r"http://127\.0\.0\.1:(\d+/\w+)", dockerfile(name).read_text(encoding="utf-8"))
    return str(found)


def services() -> dict[str, Any]:
    """Return the services of the Compose file."""
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"])


def service(name: str) -> Started:
    """Return what a service of ours in the Compose file starts."""
    found = services()[name]
    kind = Path(found["build"]["dockerfile"]).name.removesuffix(".Dockerfile")
    return image(kind, found["command"])


def manifests(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def container(kind: str) -> tuple[Started, dict[str, Any]]:
    """Return what the base's container of a coordinator or node starts, and its manifest."""
    (found,) = [
        document["spec"]["template"]["spec"]["containers"][0]
        for document in manifests(KUBERNETES / "base" / f"{kind}.yaml")
        if document["kind"] in ("StatefulSet", "Deployment")
    ]
    assert "command" not in found, "it would replace the image's ENTRYPOINT"
    started = image(kind, found.get("args", [] if kind == "node" else None))
    field_of = {"metadata.name": f"peerturb-{kind}-0"}
    for variable in found["env"]:
        value = variable.get("value") or field_of[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        started.environment[variable["name"]] = value
    return started, found
