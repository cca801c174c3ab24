"""Asks HTTP addresses: pages, metrics as numbers, and a real Prometheus that scrapes them."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

Figures = dict[str, float]
"""By name and labels, as they are written."""


def get(address: str, path: str) -> tuple[int, str]:
    """Return status and body."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(address: str) -> Figures:
    """Return all figures of /metrics."""
    status, text = get(address, "/metrics")
    assert status == 200
    figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            figures[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return figures


def await_figures(address: str, is_there: Callable[[Figures], bool]) -> Figures:
    """Scrape until the figures are as wanted; the test's own time limit ends it."""
    while not is_there(figures := scrape(address)):
        time.sleep(0.05)
    return figures


def until(is_so: Callable[[], bool]) -> None:
    """Wait; the test's own time limit ends it."""
    while not is_so():
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    address: str

    def rows(self, expression: str) -> list[dict[str, Any]]:
        """Return what an expression gives now: rows of `metric` and `value`.

        Raises:
            ValueError: Prometheus does not take the expression; its message.
        """
        try:
            _, text = get(self.address, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
            answer = json.loads(text)
        except (OSError, json.JSONDecodeError):  # it starts
            return []
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer['error']}")
        return list(answer["data"]["result"])

    def __call__(self, expression: str) -> dict[str, float]:
        """Return the values by job."""
        return {row["metric"].get("job", ""): float(row["value"][1]) for row in self.rows(expression)}

    def rules(self) -> list[dict[str, Any]]:
        """Return its alerts, with their health."""
        _, text = get(self.address, "/api/v1/rules")
        return [rule for group in json.loads(text)["data"]["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Run a Prometheus on a configuration, scraping five times a second.

    Args:
        folder: where configuration and data lie; files that the configuration names are relative to it.
        config: of Prometheus.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus; `make setup-prometheus` installs it on Debian, as root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    quick = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({**config, "global": quick}), encoding="utf-8")
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            yield Prometheus(address)
        finally:
            server.terminate()


def scraping(targets: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration that scrapes addresses by job."""
    jobs = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()]
    return {"scrape_configs": jobs}
