"""Real linters take what lies in deploy/: hadolint, the schema of Compose, systemd's own checks, Grafana's generator.

Kubernetes has a module of its own, Prometheus too.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.reading import DEPLOY, dockerfile, unit_file

SYSTEMD_MIN = 250
"""Its first version that judges a unit's hardening without a running systemd."""
EXPOSURE_MAX = {"coordinator": 1.5, "node": 2.5}
"""By `systemd-analyze security`, 0 best, 10 worst. A node needs devices, and memory that a compiler writes and runs."""


def accepted(*command: str, folder: Path | None = None) -> str:
    """Run a linter; return what it said."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def beside_python(name: str) -> str:
    """Return the path of a program that the development tools bring."""
    return str(Path(sys.executable).parent / name)


@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_hadolint_takes_the_image(name: str) -> None:
    assert accepted(beside_python("hadolint"), "--failure-threshold", "style", str(dockerfile(name))) == ""


def test_hadolint_would_find_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /x && apt-get install gcc\n")
    done = subprocess.run([beside_python("hadolint"), str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DL3006" in done.stdout


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_schema_of_compose_takes_it(name: str) -> None:
    accepted(beside_python("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name))


def test_the_schema_of_compose_would_find_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text((DEPLOY / "compose.yaml").read_text(encoding="utf-8").replace("read_only: true", "read_only: [1]"))
    command = [beside_python("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(bad)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def systemd_analyze() -> str:
    """Return the program; skip where there is none, or an old one."""
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("there is no systemd-analyze")
    (version,) = re.findall(r"^systemd (\d+)", accepted(found, "--version"))
    if int(version) < SYSTEMD_MIN:
        pytest.skip(f"systemd {version} is older than {SYSTEMD_MIN}")
    return found


@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    program = systemd_analyze()
    copy = tmp_path / unit_file(name).name
    # Its program must be there; nothing is started.
    text = unit_file(name).read_text(encoding="utf-8")
    copy.write_text(text.replace("/opt/peerturb/bin/peerturb", sys.executable), encoding="utf-8")
    said = accepted(program, "verify", "--man=no", str(copy))
    assert copy.name not in said
    most = f"--threshold={round(10 * EXPOSURE_MAX[name])}"
    accepted(program, "security", "--offline=yes", most, "--no-pager", str(copy))


def test_systemd_would_find_a_fault(tmp_path: Path) -> None:
    program = systemd_analyze()
    bad = tmp_path / "peerturb-bad.service"
    bad.write_text("[Service]\nExecStart=/nowhere/peerturb\nRestrt=always\n")
    done = subprocess.run([program, "verify", "--man=no", str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Restrt" in done.stderr


def test_dashboards_are_what_their_script_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the development tools lack grafana-foundation-sdk")
    assert accepted(sys.executable, str(DEPLOY / "grafana" / "dashboards.py"), "--check") == "up to date\n"
