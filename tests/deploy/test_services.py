"""What units, images, Compose and Kubernetes start: commands parse, variables are settings, files exist."""

import re
from typing import Any

import pytest
import yaml

from peerturb_coordinator.keys import CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE
from peerturb_coordinator.settings import ENVIRONMENT_PREFIX, CoordinatorSettings
from peerturb_node.settings import ENV_PREFIX, NodeSettings
from tests.deploy.reading import DEPLOY, container, health_path, image, service, services, unit, unit_file
from tests.unit.test_docs import check_command

KINDS = ["coordinator", "node"]


@pytest.mark.parametrize("name", KINDS)
def test_a_unit_starts_what_exists(name: str) -> None:
    check_command(unit(name).words, is_whole=True)
    text = unit_file(name).read_text(encoding="utf-8")
    given = dict(re.findall(r"^LoadCredential=([^:]+):(.+)$", text, re.MULTILINE))
    assert set(given) == ({CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE} if name == "coordinator" else {TOKEN_FILE})
    asserted = set(re.findall(r"^AssertPathExists=(.+)$", text, re.MULTILINE))
    named = {word for word in unit(name).words if word.startswith("/etc/")} | set(given.values())
    assert asserted == named, "whoever forgot a file is told which"


@pytest.mark.parametrize("name", KINDS)
def test_an_image_starts_what_exists(name: str) -> None:
    check_command(image(name).words, is_whole=True)


@pytest.mark.parametrize("name", KINDS)
def test_an_image_asks_for_health_where_it_is_served(name: str) -> None:
    words = " ".join(image(name).words)
    (port,) = re.findall(r"--http \S+:(\d+)", words)
    assert health_path(name).partition("/")[0] == port


@pytest.mark.parametrize("name", ["coordinator", "node-0", "node-1"])
def test_a_service_of_the_compose_file_starts_what_exists(name: str) -> None:
    assert services()[name]["build"]["dockerfile"] == f"deploy/docker/{name.partition('-')[0]}.Dockerfile"
    check_command(service(name).words, is_whole=True)


@pytest.mark.parametrize(
    ("kind", "prefix", "settings"),
    [("coordinator", ENVIRONMENT_PREFIX, CoordinatorSettings), ("node", ENV_PREFIX, NodeSettings)],
)
def test_a_container_of_kubernetes_starts_what_exists(kind: str, prefix: str, settings: Any) -> None:
    started, manifest = container(kind)
    check_command(started.words, is_whole=True)
    ours = {name for name in started.environment if name.startswith("PEERTURB_")}
    assert ours
    assert {name.removeprefix(prefix).lower() for name in ours} <= set(settings.model_fields)
    ports = {port["name"]: port["containerPort"] for port in manifest["ports"]}
    for port in ports.values():
        assert re.search(rf":{port}\b", " ".join(started.words)), port
    for probe, path in [("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")]:
        assert manifest[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"}


def test_files_that_the_compose_file_mounts_are_there() -> None:
    for found in services().values():
        for volume in found.get("volumes", ()):
            source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


def test_the_gpu_file_changes_services_that_there_are() -> None:
    changed = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text(encoding="utf-8"))["services"]
    assert set(changed) == {name for name in services() if name.startswith("node-")}


def test_prometheus_and_grafana_ask_the_services_that_there_are() -> None:
    names = set(services())
    config = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text(encoding="utf-8"))
    targets = [t for job in config["scrape_configs"] for group in job["static_configs"] for t in group["targets"]]
    assert {target.partition(":")[0] for target in targets} == {"coordinator", "node-0", "node-1"}
    source = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(source)["datasources"][0]["url"].removeprefix("http://").partition(":")[0] in names
