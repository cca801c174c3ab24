"""The Kubernetes manifests fit the schemas of Kubernetes, build with kustomize, and keep promises of their comments.

The operator's own kinds (ServiceMonitor, PrometheusRule) have no schema in a package: their fields are compared with a
list of those used, taken from the operator's API reference.
"""

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from peerturb_coordinator.keys import make_keys
from tests.conftest import REPOSITORY
from tests.deploy.reading import DEPLOY, KUBERNETES, manifests, services

VERSIONS = ["1.28", "1.32", kubernetes_validate.latest_version()]
"""The oldest that components/own-data needs, one between, the newest with schemas."""
OPERATOR = "monitoring.coreos.com/v1"
OPERATOR_FIELDS = {
    "ServiceMonitor": {"spec": {"selector": {"matchLabels": None}, "endpoints": [
        {"port": str, "path": str, "interval": str, "relabelings": [{"sourceLabels": [str], "targetLabel": str}]}
    ]}},
    "PrometheusRule": {"spec": {"groups": [
        {"name": str, "rules": [{"alert": str, "expr": str, "for": str, "labels": None, "annotations": None}]}
    ]}},
}  # fmt: skip
COMPONENTS = ["cpu", "hub", "monitoring", "own-data", "volunteers"]
COMBINED = [[], *([one] for one in COMPONENTS), ["cpu", "own-data"], ["own-data", "cpu"], COMPONENTS]
WHOLE = [
    path
    for path in sorted([*KUBERNETES.rglob("*.yaml"), DEPLOY / "grafana" / "kustomization.yaml"])
    if path.name not in ("kustomization.yaml", "inputs.yaml")  # inputs.yaml is a patch
]


def check(document: dict[str, Any]) -> None:
    """Fail unless Kubernetes knows every field, in each version."""
    if document["apiVersion"] == OPERATOR:
        body = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
        check_fields(body, OPERATOR_FIELDS[document["kind"]], document["kind"])
        return
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def check_fields(value: Any, known: Any, where: str) -> None:
    """Compare a tree with the fields and types it may have; None allows a table of texts."""
    if known is None:
        assert all(isinstance(text, str) for pair in value.items() for text in pair), where
    elif isinstance(known, dict):
        assert set(value) <= set(known), f"{where}: {set(value) - set(known)}"
        for key, item in value.items():
            check_fields(item, known[key], f"{where}.{key}")
    elif isinstance(known, list):
        assert value, where
        for item in value:
            check_fields(item, known[0], where)
    else:
        assert isinstance(value, known), where


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_every_manifest_fits_its_schema(path: Path) -> None:
    for document in manifests(path):
        check(document)


def test_a_wrong_field_would_be_found() -> None:
    (document,) = manifests(KUBERNETES / "namespace.yaml")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(document | {"speck": {}})
    (document, *_) = manifests(KUBERNETES / "components" / "monitoring" / "monitors.yaml")
    document["spec"]["endpoints"][0]["prot"] = "http"
    with pytest.raises(AssertionError, match="prot"):
        check(document)


def test_components_are_all_tested() -> None:
    assert sorted(path.name for path in (KUBERNETES / "components").iterdir()) == COMPONENTS


def test_rules_are_the_alerts_of_prometheus() -> None:
    (made,) = manifests(KUBERNETES / "components" / "monitoring" / "rules.yaml")
    assert made["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    script = runpy.run_path(str(REPOSITORY / "scripts" / "prometheus_rule.py"))
    assert script["main"](["--check"]) == 0


def test_every_dashboard_is_in_the_config_map() -> None:
    (document,) = manifests(DEPLOY / "grafana" / "kustomization.yaml")
    (generator,) = document["configMapGenerator"]
    found = {path.relative_to(DEPLOY / "grafana").as_posix() for path in (DEPLOY / "grafana").glob("dashboards/*.json")}
    assert set(generator["files"]) == found


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a folder; skip where neither kubectl nor kustomize is."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            return subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False, timeout=60)
    pytest.skip("there is neither kubectl nor kustomize; the files themselves were checked")


def built(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (kind, name) -> object of a folder that builds; each is checked."""
    done = kustomize(folder)
    assert done.returncode == 0, done.stderr
    objects = [document for document in yaml.safe_load_all(done.stdout) if document]
    for document in objects:
        check(document)
    return {(document["kind"], document["metadata"]["name"]): document for document in objects}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return deploy/kubernetes of a copy, with RUN.toml and keys in its example."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    folder = tmp_path / "deploy" / "kubernetes"
    shutil.rmtree(folder / "example" / "keys", ignore_errors=True)
    make_keys(folder / "example" / "keys", ["peerturb-coordinator"])
    shutil.copyfile(REPOSITORY / "examples" / "code-or-doc.toml", folder / "example" / "RUN.toml")
    return folder


def pod(objects: dict[tuple[str, str], dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """Return a workload's pod."""
    return dict(objects[kind, name]["spec"]["template"]["spec"])


@pytest.mark.parametrize("components", COMBINED, ids="+".join)
def test_the_base_builds_with_components(copy: Path, components: list[str]) -> None:
    overlay = copy / "tried"
    overlay.mkdir()
    lines = {
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": [f"../components/{c}" for c in components],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    objects = built(overlay)
    node = pod(objects, "StatefulSet" if "own-data" in components else "Deployment", "peerturb-node")
    (container,) = node["containers"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("cpu" not in components)
    assert container["image"] == f"peerturb-node:{'cpu' if 'cpu' in components else 'cuda'}"
    assert len([found for found in container["env"] if found["name"] == "PEERTURB_NODE_DATA"]) == 1
    assert (("ServiceMonitor", "peerturb-node") in objects) == ("monitoring" in components)


def test_the_example_builds_and_hangs_together(copy: Path) -> None:
    objects = built(copy / "example")
    made = {name for kind, name in objects if kind in ("ConfigMap", "Secret")}
    for name in ("peerturb-coordinator", "peerturb-node"):
        found = pod(objects, "StatefulSet", name)
        assert found["enableServiceLinks"] is found["automountServiceAccountToken"] is False
        assert found["securityContext"]["runAsNonRoot"] is True
        assert found["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        for container in found["containers"] + found.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        asked = {source["secret"]["name"] for volume in found["volumes"] if "projected" in volume
                 for source in volume["projected"]["sources"]}  # fmt: skip
        asked |= {volume["configMap"]["name"] for volume in found["volumes"] if "configMap" in volume}
        assert asked
        assert asked <= made, "a name without the suffix of its content"
    node = pod(objects, "StatefulSet", "peerturb-node")
    (inputs,) = [volume for volume in node["volumes"] if volume["name"] == "inputs"]
    assert inputs == {"name": "inputs", "emptyDir": {}}
    assert "coordinator.key" not in yaml.safe_dump(node), "the key stays with the coordinator"
    (namespace,) = manifests(KUBERNETES / "namespace.yaml")
    assert {found["metadata"]["namespace"] for found in objects.values()} == {namespace["metadata"]["name"]}
    assert "Namespace" not in {kind for kind, _ in objects}, "deleting the example would delete the log"


def test_without_keys_or_run_nothing_is_built(copy: Path) -> None:
    (copy / "example" / "keys" / "join-token").unlink()
    done = kustomize(copy / "example")
    assert done.returncode != 0
    assert "join-token" in done.stderr


def test_nothing_talks_that_need_not(copy: Path) -> None:
    objects = built(copy / "example")
    policies = {name: found["spec"] for (kind, name), found in objects.items() if kind == "NetworkPolicy"}
    assert policies.pop("peerturb-default-deny") == {
        "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "peerturb"}},
        "policyTypes": ["Ingress", "Egress"],
    }
    assert set(policies) == {"peerturb-coordinator", "peerturb-node"}
    assert policies["peerturb-coordinator"]["policyTypes"] == ["Ingress"]
    assert policies["peerturb-node"]["policyTypes"] == ["Egress"]
    for name in ("peerturb-coordinator", "peerturb-node"):
        labels = objects["StatefulSet", name]["spec"]["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "peerturb"
        assert policies[name]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_example_makes_the_same_inputs_as_compose() -> None:
    (patch,) = manifests(KUBERNETES / "example" / "inputs.yaml")
    (init,) = patch["spec"]["template"]["spec"]["initContainers"]
    assert "nodes=2" in init["command"][2]
    assert "nodes=2" in services()["data"]["entrypoint"][2]
