"""Configuration and alerts: Prometheus's own tool takes them; alerts have tests, sections, figures that exist."""

import json
import re
import runpy
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "prometheus"


def rules() -> list[dict[str, object]]:
    document = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "config", "compose.yml"), ("test", "rules", "alerts_test.yml")],
    ids=["config", "compose", "alerts"],
)
def test_promtool_takes_it(arguments: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool; `make setup-prometheus` installs it on Debian, as root")
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_and_a_section_that_says_what_to_do() -> None:
    tests = (FOLDER / "alerts_test.yml").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / "operating.md").read_text(encoding="utf-8")
    titles = re.findall(r"^### (.+)$", page, re.MULTILINE)
    sections = {"docs/operating.md#" + title.lower().replace(" ", "-") for title in titles}
    for rule in rules():
        assert re.search(rf"alertname: {rule['alert']}\n\s+exp_alerts", tests), rule["alert"]
        annotations = rule["annotations"]
        assert isinstance(annotations, dict)
        assert annotations["runbook"] in sections, annotations["runbook"]
        assert f"`{rule['alert']}`" in page


async def test_alerts_and_dashboards_ask_for_figures_that_exist() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "metrics_page.py"))
    known = script["names"](script["_coordinator"]()) | script["names"](script["_node"]())
    asked = {name for rule in rules() for name in re.findall(r"\bpeerturb_\w+", str(rule["expr"]))}
    assert asked
    assert asked <= known, asked - known
    pages = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
    assert len(pages) == 5
    for page in pages:
        shown = _expressions(json.loads(page.read_text(encoding="utf-8")))
        asked = {name for text in shown for name in re.findall(r"\b(?:peerturb|process)_\w+", text)}
        plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
        assert plain, page.name
        assert plain <= known, (page.name, plain - known)


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [item["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    return panels + [query.removeprefix("label_values") for query in variables]
