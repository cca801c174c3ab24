"""Every question that dashboards and alerts ask is asked of a real Prometheus that scrapes a real run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.reading import DEPLOY
from tests.integration.network import Program, network, toy_run
from tests.integration.scraping import Prometheus, get, prometheus, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

GRAFANA = {
    "$coordinator": ".+",
    "$node": ".+",
    "$__rate_interval": "3s",
}
"""What Grafana puts in for the chosen coordinators and nodes, and for the range of a rate (five scrapes a second)."""

EMPTY = {
    "Refusals": "filtered by > 0, and a healthy run refuses nobody",
    "Held-out accuracy": "the toy objective has none; test_deployed.py sees it of a real one",
}
"""Panels without an answer here -> why."""


def panels() -> list[tuple[str, str, str]]:
    """Return (dashboard, panel, PromQL) of every question."""
    found = []
    for page in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        document: dict[str, Any] = json.loads(page.read_text(encoding="utf-8"))
        for panel in document["panels"]:
            found += [(page.stem, panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def asked(expression: str) -> str:
    """Return the expression as Grafana would send it."""
    for variable, value in GRAFANA.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def answers(ask: Prometheus) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return all answers that are numbers.

    Raises:
        ValueError: an expression is wrong.
    """
    return {
        question: [row for row in ask.rows(asked(question[2])) if row["value"][1] != "NaN"] for question in panels()
    }


def lacking(ask: Prometheus) -> list[tuple[str, str, str]]:
    """Return the questions that should have an answer and have none."""
    return [question for question, rows in answers(ask).items() if not rows and question[1] not in EMPTY]


def configuration(addresses: dict[str, str]) -> dict[str, Any]:
    """Return Prometheus's configuration for Compose, its services put in place; the alerts are in it."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text(encoding="utf-8"))
    for job in found["scrape_configs"]:
        for group in job["static_configs"]:
            group["targets"] = [addresses[target.partition(":")[0]] for target in group["targets"]]
    found["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in found["rule_files"]]
    return found


def test_every_panel_has_an_answer_and_no_alert_rings(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with network(tmp_path, toy_run(count=1_000_000, deadline_ms=400, deadline_ms_max=800)) as run:
        coordinator = run.start_coordinator("--http", "127.0.0.1:0")
        nodes = {name: run.start_node(name, "--http", "127.0.0.1:0") for name in ("node-0", "node-1")}
        addresses = {name: str(_first(node, "monitor")["address"]) for name, node in nodes.items()}
        addresses["coordinator"] = str(_first(coordinator, "serving")["http"])
        with prometheus(tmp_path / "p", configuration(addresses)) as ask:
            until(lambda: len(ask.rows("up == 1")) == 3)
            for node in nodes.values():
                node.wait_for_round(40)
            try:
                until(lambda: not lacking(ask))
            finally:  # the time limit ends a wait in vain
                print("without an answer:", lacking(ask))
            assert {question[1] for question, rows in answers(ask).items() if not rows} == set(EMPTY)
            _alerts_are_at_rest(ask)
            _variables_find_the_instances(ask, addresses)


def _first(program: Program, event: str) -> dict[str, Any]:
    return program.wait_for(lambda item: item["event"] == event, what=event)


def _alerts_are_at_rest(ask: Prometheus) -> None:
    """Prometheus has evaluated each of them without an error; a healthy run sets none off."""
    until(lambda: all(rule["lastEvaluation"] > "2000" for rule in ask.rules()))
    rules = ask.rules()
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alerts["groups"][0]["rules"]]
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert rule["alerts"] == [], rule["name"]


def _variables_find_the_instances(ask: Prometheus, addresses: dict[str, str]) -> None:
    """What a dashboard offers to choose from are the coordinator, and the nodes."""
    wanted = {"coordinator": {addresses["coordinator"]}, "node": {addresses["node-0"], addresses["node-1"]}}
    for page in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for variable in json.loads(page.read_text(encoding="utf-8"))["templating"]["list"]:
            if variable["type"] == "query":
                (metric,) = re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]).groups()  # type: ignore[union-attr]
                _, text = get(ask.address, f"/api/v1/label/instance/values?match[]={metric}")
                assert set(json.loads(text)["data"]) == wanted[variable["name"]]
