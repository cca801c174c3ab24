"""Write docs/metrics.md from the code: every metric of coordinator and node, its kind, labels and meaning.

python scripts/metrics_page.py          # writes the page
python scripts/metrics_page.py --check  # says whether it is up to date
"""

import asyncio
import io
import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric

from peerturb.spec import RunSpec
from peerturb.wire.metrics import new_registry
from peerturb_coordinator.events import Events
from peerturb_coordinator.live.history import History
from peerturb_coordinator.metrics import Metrics as CoordinatorMetrics
from peerturb_coordinator.recovery import recover
from peerturb_coordinator.runner import Runner
from peerturb_coordinator.store import MemoryLogStore
from peerturb_coordinator.trace import Trace
from peerturb_coordinator.watching import Watchers
from peerturb_node.metrics import Metrics as NodeMetrics

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_HEAD = """# Metrics

This page is written by `python scripts/metrics_page.py` from the code; a test compares them.

`peerturb coordinator serve ... --http HOST:PORT` and `peerturb node run ... --http HOST:PORT` answer there:

| path | answer |
| --- | --- |
| `/metrics` | the figures below, as Prometheus or OpenMetrics text |
| `/healthz` | 200 while the process answers: restart it if not |
| `/readyz` | 200 while it does its work, otherwise 503 and the reason as a sentence |

A coordinator that cannot write its log is not ready, nor is a node that is in no session or still catches up. The
coordinator serves its [live page](operating.md) there too. All of it is read-only and plaintext; whoever reaches the
address sees it. A monitor that fails is switched off and says so; training goes on.

Counters begin at 0 with the process, as `rate()` expects. What follows from the log goes on after a restart, of a
coordinator: `peerturb_round`, `peerturb_probes_total`, `peerturb_codes_total`, `peerturb_codes_void_total`,
`peerturb_log_records`. No label names a peer: a run of a thousand peers has as many series as one of two. A value that
is not known is NaN.
"""


def page() -> str:
    """Return the page."""
    parts = [_HEAD]
    for title, registry in (("Coordinator", _coordinator()), ("Node", _node())):
        parts.append(f"\n## {title}\n\n| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n")
        parts += [_line(metric) for metric in sorted(registry.collect(), key=lambda metric: metric.name)]
    return "".join(parts)


def names(registry: CollectorRegistry) -> set[str]:
    """Return the names of a registry's metrics as the page has them."""
    return {_name(metric) for metric in registry.collect()}


def _name(metric: Metric) -> str:
    return metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")


def _line(metric: Metric) -> str:
    values: dict[str, set[str]] = {}
    for sample in metric.samples:
        for label, value in sample.labels.items():
            if label != "le":
                values.setdefault(label, set()).add(value)
    labels = "; ".join(f"`{label}`: {_some(found)}" for label, found in values.items())
    text = metric.documentation.replace("|", "\\|")
    return f"| `{_name(metric)}` | {metric.type} | {labels} | {text} |\n"


def _some(values: Iterable[str]) -> str:
    found = sorted(values)
    return ", ".join(found) if len(found) <= 7 else f"{', '.join(found[:4])} and {len(found) - 4} others"


def _coordinator() -> CollectorRegistry:
    """Return the registry of a coordinator that has met nobody yet."""
    spec = RunSpec.from_document({"name": "page", "model": {"name": "m", "digest": "0" * 64}}, source="the page")
    events, store, registry = Events(io.StringIO(), as_json=True), MemoryLogStore(), new_registry()
    trace = Trace(None, spec, events, records=0)
    runner = Runner(
        recover(spec, store), store, events, trace=trace, watchers=Watchers(events), retry_s=1.0, now_s=lambda: 0.0
    )
    CoordinatorMetrics(registry, runner, History(), Path())
    return registry


def _node() -> CollectorRegistry:
    registry = new_registry()
    NodeMetrics(registry)
    return registry


async def _main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        is_same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("up to date" if is_same else "out of date: run python scripts/metrics_page.py")
        return 0 if is_same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
