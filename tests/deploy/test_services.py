"""What units, compose file and images start: the commands parse, and the files they name are those that are made."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml

from peerturb_coordinator.keys import CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE
from tests.conftest import REPOSITORY
from tests.unit.test_docs import check_command

DEPLOY = REPOSITORY / "deploy"


def image(name: str) -> dict[str, list[str]]:
    """Return ENTRYPOINT and CMD of the last stage."""
    text = (DEPLOY / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    return {key: json.loads(found) for key, found in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)}


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"])


@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_a_unit_starts_what_exists(name: str) -> None:
    unit = (DEPLOY / "systemd" / f"peerturb-{name}.service").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = shlex.split(line)
    assert program.endswith("/bin/peerturb")
    check_command(words, is_whole=True)
    given = set(re.findall(r"^LoadCredential=([^:]+):", unit, re.MULTILINE))
    assert given == ({CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE} if name == "coordinator" else {TOKEN_FILE})


@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_an_image_starts_what_exists(name: str) -> None:
    program, *words = image(name)["ENTRYPOINT"]
    assert program == "peerturb"
    check_command(words + image(name)["CMD"], is_whole=True)


@pytest.mark.parametrize("name", ["coordinator", "node-0", "node-1"])
def test_a_service_of_the_compose_file_starts_what_exists(name: str) -> None:
    service = services()[name]
    kind = service["build"]["dockerfile"].removeprefix("deploy/docker/").removesuffix(".Dockerfile")
    assert name.startswith(kind)
    check_command(image(kind)["ENTRYPOINT"][1:] + service["command"], is_whole=True)


def test_files_that_the_compose_file_mounts_are_there() -> None:
    for service in services().values():
        for volume in service.get("volumes", ()):
            source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


def test_prometheus_and_grafana_ask_the_services_that_there_are() -> None:
    names = set(services())
    config = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text(encoding="utf-8"))
    targets = [t for job in config["scrape_configs"] for group in job["static_configs"] for t in group["targets"]]
    assert {target.partition(":")[0] for target in targets} == {"coordinator", "node-0", "node-1"}
    source = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(source)["datasources"][0]["url"].removeprefix("http://").partition(":")[0] in names
