"""Metrics: names and units as Prometheus wants them, the page that lists them, and what a node's events move."""

import math
import re
import runpy
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from peerturb_node.events import KINDS, Event, Events
from peerturb_node.metrics import Metrics
from peerturb_node.progress import coming
from tests.conftest import REPOSITORY

SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "metrics_page.py"))


def registries() -> dict[str, CollectorRegistry]:
    return {"coordinator": SCRIPT["_coordinator"](), "node": SCRIPT["_node"]()}


async def test_the_page_is_the_codes() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == SCRIPT["page"](), "run python scripts/metrics_page.py"


async def test_names_and_units_are_as_prometheus_wants_them() -> None:
    for program, registry in registries().items():
        for metric in registry.collect():
            if metric.name.startswith("process_"):
                continue
            where = f"{program}: {metric.name}"
            assert re.fullmatch(r"peerturb_[a-z]+(_[a-z]+)*", metric.name), where
            assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_info")), where
            assert not re.search(r"_(ms|milliseconds|kb|mb|minutes|percent)(_|$)", metric.name), "base units only"
            assert metric.documentation.endswith("."), where
            if metric.type == "histogram":
                assert metric.name.endswith("_seconds"), where
            labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
            assert labels <= {
                "direction",
                "kind",
                "reason",
                "state",
                "metric",
                "code",
                "own",
                "version",
                "estimator",
            }, where
            assert len(metric.samples) <= 40, "labels are bounded"


async def test_the_names_of_the_design_are_there() -> None:
    found = {name for registry in registries().values() for name in SCRIPT["names"](registry)}
    assert found >= {
        "peerturb_round", "peerturb_round_duration_seconds", "peerturb_seal_total", "peerturb_peers",
        "peerturb_probes_total", "peerturb_codes_void_total", "peerturb_bytes_total", "peerturb_loss", "peerturb_eval",
        "peerturb_apply_seconds", "peerturb_probe_seconds", "peerturb_digest_mismatch_total", "peerturb_rejects_total",
        "peerturb_tokens_total",
    }  # fmt: skip


def test_rounds_to_come_are_estimated_from_the_records() -> None:
    assert [coming(records) for records in (0, 3, 8, 134)] == [0, 0, 0, 67]


class Node:
    """Metrics and the events they hear."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)

    def emit(self, kind: str, **fields: Any) -> None:
        assert set(fields) <= set(KINDS[kind].split())
        self.metrics.emit({"event": kind, "time": 0.0, **fields})

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def applied(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "round": number, "loss": 1.5, "digest": None, "codes": 32, "peers": 2, "own": True, "ms": 20.0, "alpha": 0.1,
        "probes_per_s": 5.0, "tokens_per_s": 100.0, "bytes_up": 100 * number, "bytes_down": 300 * number, **fields,
    }  # fmt: skip


def test_readiness_follows_a_nodes_life() -> None:
    node = Node()
    assert node.metrics.why_not == "the node starts"
    node.emit("joined", slot=1, position=0, head=9)
    node.emit("behind", rounds=4)
    assert "catches up" in node.metrics.why_not
    assert (node.value("peerturb_connected"), node.value("peerturb_training")) == (1, 0)
    node.emit("training", round=4, seconds=1.0)
    assert (node.metrics.why_not, node.value("peerturb_training")) == ("", 1)
    node.emit("rebuild", why="a bit differs")
    assert "anew from the log" in node.metrics.why_not
    node.emit("measured", round=5, codes=16, void=1, loss=2.0, ms=500.0, tokens=640)
    assert node.metrics.why_not == ""
    node.emit("disconnected", why="connection reset", retry_ms=100, again=False)
    assert node.metrics.why_not == "not connected: connection reset"
    assert (node.value("peerturb_connected"), node.value("peerturb_disconnects_total")) == (0, 1)
    node.emit("measured", round=5, codes=16, void=0, loss=2.0, ms=500.0, tokens=640)
    assert node.metrics.why_not, "what it still measures reaches nobody"


def test_each_event_moves_its_figures() -> None:
    node = Node()
    assert math.isnan(node.value("peerturb_loss") or 0.0)
    node.emit("measured", round=0, codes=16, void=2, loss=2.0, ms=500.0, tokens=640)
    for number in (1, 2):
        node.emit("round", **applied(number, own=number == 1))
    node.emit("eval", round=2, loss=1.25, accuracy=None, examples=8, ms=3.0)
    node.emit("refused", code="digest_mismatch", why="other weights")
    node.emit("checkpoint", round=2, file="x")
    assert node.value("peerturb_probes_total") == 16
    assert node.value("peerturb_codes_void_total") == 2
    assert node.value("peerturb_tokens_total") == 640
    assert node.value("peerturb_probe_seconds_sum") == 0.5
    assert node.value("peerturb_round") == 2
    assert node.value("peerturb_apply_seconds_count") == 2
    assert node.value("peerturb_rounds_applied_total", own="yes") == 1
    assert node.value("peerturb_bytes_total", direction="up", kind="session") == 200
    assert node.value("peerturb_bytes_total", direction="down", kind="session") == 600
    assert node.value("peerturb_eval", metric="loss") == 1.25
    assert math.isnan(node.value("peerturb_eval", metric="accuracy") or 0.0)
    assert node.value("peerturb_rejects_total", code="digest_mismatch") == 1
    assert node.value("peerturb_digest_mismatch_total") == 1
    assert node.value("peerturb_checkpoints_total") == 1


def test_metrics_that_fail_are_not_ready_and_stop_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    node, heard = Node(), list[Event]()

    class Sound:
        def emit(self, event: Event) -> None:
            heard.append(event)

        def close(self) -> None:
            pass

    events = Events(node.metrics, Sound())
    events.emit("training", round=0, seconds=0.1)
    assert node.metrics.why_not == ""
    events.emit("round", **applied(1) | {"ms": "not a number"})
    events.emit("training", round=2, seconds=0.1)
    assert "metrics failed and stand still" in node.metrics.why_not, "they say so for good"
    assert len(heard) == 3
    assert capsys.readouterr().err.count("switched off") == 1


@pytest.mark.parametrize("address", ["7471", "host:", "host:99999", ":7471"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    from pydantic import ValidationError

    from peerturb_node.settings import NodeSettings

    with pytest.raises(ValidationError, match="HOST:PORT"):
        NodeSettings(coordinator="127.0.0.1:7470", http=address)
