"""Write deploy/grafana/dashboards: what they show as a table, then Grafana's form of it.

In the expressions `@c` stands for the labels of the chosen coordinators, `@n` for those of the chosen nodes, `@r`
for Grafana's range of a rate. Needs the package grafana-foundation-sdk.

python deploy/grafana/dashboards.py          # writes them
python deploy/grafana/dashboards.py --check  # says whether they are up to date
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
MEANING = {"@c": 'instance=~"$coordinator"', "@n": 'instance=~"$node"', "@r": "$__rate_interval"}
KNOWN_BY = {"coordinator": "peerturb_sessions", "node": "peerturb_training"}
"""A figure that only it has."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: a curve over time, or a figure of now."""

    title: str
    ask: Mapping[str, str]
    """Legend -> PromQL."""
    unit: str = "short"
    """Grafana's name of it."""
    about: str = ""
    width: int = 8
    """Of 24."""
    is_now: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One dashboard."""

    uid: str
    title: str
    variables: Sequence[str]
    """`coordinator`, `node`."""
    rows: Mapping[str, Sequence[Panel]]


def now(title: str, expression: str, unit: str = "short", about: str = "") -> Panel:
    """Return a figure of now, a sixth of the page wide."""
    return Panel(title, {"": expression}, unit, about, width=4, is_now=True)


def times(metric: str, labels: str) -> dict[str, str]:
    """Return mean and tail of a histogram of seconds."""
    rate = f"rate({metric}_bucket{{{labels}}}[@r])"
    return {
        "mean": f"rate({metric}_sum{{{labels}}}[@r]) / rate({metric}_count{{{labels}}}[@r])",
        "90%": f"histogram_quantile(0.9, sum by (le) ({rate}))",
        "99%": f"histogram_quantile(0.99, sum by (le) ({rate}))",
    }


EACH = "{{instance}}"

RUN = Page(
    uid="peerturb-run",
    title="peerturb: run",
    variables=["coordinator"],
    rows={
        "Now": [
            now("Round", "peerturb_round{@c}"),
            now("Training loss", "peerturb_loss{@c}"),
            now("Held-out loss", 'peerturb_eval{@c,metric="loss"}'),
            now("Connected peers", 'peerturb_peers{@c,state="connected"}'),
            now(
                "Time left",
                "(peerturb_rounds_wanted{@c} - peerturb_round{@c}) / "
                "rate(peerturb_round_duration_seconds_count{@c}[10m]) and peerturb_rounds_wanted{@c} > 0",
                "s",
                "By the pace of the last ten minutes; empty where the run has no end.",
            ),
            now("Diverging", "peerturb_diverging{@c}", "bool"),
        ],
        "Learning": [
            Panel("Training loss", {EACH: "peerturb_loss{@c}"}),
            Panel("Held-out loss", {EACH: 'peerturb_eval{@c,metric="loss"}'}),
            Panel("Held-out accuracy", {EACH: 'peerturb_eval{@c,metric="accuracy"}'}, "percentunit"),
            Panel(
                "Step size and scale",
                {"step size": "abs(peerturb_step_size{@c})", "scale of a code": "peerturb_scale{@c}"},
                "sci",
            ),
            Panel("Codes a second", {"{{estimator}}": "sum by (estimator) (rate(peerturb_codes_total{@c}[@r]))"}),
            Panel(
                "Void codes",
                {"share": "rate(peerturb_codes_void_total{@c}[@r]) / rate(peerturb_probes_total{@c}[@r])"},
                "percentunit",
                "Losses that were not finite.",
            ),
        ],
        "Rounds": [
            Panel("Duration of a round", times("peerturb_round_duration_seconds", "@c"), "s"),
            Panel(
                "Rounds by reason of the seal",
                {"{{reason}}": "sum by (reason) (rate(peerturb_seal_total{@c}[@r]))"},
                "ops",
            ),
            Panel(
                "The open round",
                {"open for": "peerturb_round_open_seconds{@c}", "deadline": "peerturb_round_deadline_seconds{@c}"},
                "s",
            ),
        ],
    },
)

PEERS = Page(
    uid="peerturb-peers",
    title="peerturb: peers",
    variables=["coordinator", "node"],
    rows={
        "All peers, as the coordinator sees them": [
            Panel("Peers by state", {"{{state}}": "sum by (state) (peerturb_peers{@c})"}, width=12),
            Panel(
                "Refusals",
                {"{{code}}": "sum by (code) (increase(peerturb_rejects_total{@c}[@r])) > 0"},
                about="Stale rounds are harmless: a contribution came after the deadline.",
                width=12,
            ),
            Panel(
                "Contributions left out: other weights",
                {EACH: "increase(peerturb_digest_mismatch_total{@c}[@r])"},
                width=12,
            ),
            Panel("Records the slowest session lacks", {EACH: "peerturb_feed_lag_records{@c}"}, width=12),
        ],
        "Nodes that are scraped": [
            Panel("Training", {EACH: "peerturb_training{@n}"}, "bool"),
            Panel("Tokens a second while measuring", {EACH: "peerturb_tokens_per_second{@n}"}),
            Panel(
                "Share of rounds with its codes",
                {
                    EACH: 'sum by (instance) (rate(peerturb_rounds_applied_total{@n,own="yes"}[@r])) / '
                    "sum by (instance) (rate(peerturb_rounds_applied_total{@n}[@r]))"
                },
                "percentunit",
            ),
            Panel("Sessions that ended", {EACH: "increase(peerturb_disconnects_total{@n}[@r])"}),
            Panel("Rounds behind at the session's start", {EACH: "peerturb_rounds_behind{@n}"}),
            Panel("Weights made anew", {EACH: "increase(peerturb_rebuilds_total{@n}[@r])"}),
        ],
    },
)

NODE = Page(
    uid="peerturb-node",
    title="peerturb: one node",
    variables=["node"],
    rows={
        "Now": [
            now("Connected", "peerturb_connected{@n}", "bool"),
            now("Training", "peerturb_training{@n}", "bool"),
            now("Round", "peerturb_round{@n}"),
            now("Loss", "peerturb_loss{@n}"),
            now("Peers in the newest round", "peerturb_round_peers{@n}"),
            now("Probes", "peerturb_probes_total{@n}"),
        ],
        "Work": [
            Panel("Measuring a contribution", times("peerturb_probe_seconds", "@n"), "s"),
            Panel("Applying a round", times("peerturb_apply_seconds", "@n"), "s"),
            Panel(
                "Tokens a second",
                {
                    "while measuring": "peerturb_tokens_per_second{@n}",
                    "over all of the time": "rate(peerturb_tokens_total{@n}[@r])",
                },
            ),
            Panel(
                "Rounds a second",
                {
                    "with its codes": 'rate(peerturb_rounds_applied_total{@n,own="yes"}[@r])',
                    "without": 'rate(peerturb_rounds_applied_total{@n,own="no"}[@r])',
                },
            ),
            Panel(
                "Bytes a second", {"{{direction}}": "sum by (direction) (rate(peerturb_bytes_total{@n}[@r]))"}, "Bps"
            ),
            Panel("Memory", {"resident": "process_resident_memory_bytes{@n}"}, "bytes"),
        ],
        "Trouble": [
            Panel("Sessions that ended", {"sessions": "increase(peerturb_disconnects_total{@n}[@r])"}),
            Panel("Refusals", {"{{code}}": "sum by (code) (increase(peerturb_rejects_total{@n}[@r])) > 0"}),
            Panel(
                "Weights that were not the run's",
                {
                    "noticed": "increase(peerturb_digest_mismatch_total{@n}[@r])",
                    "made anew": "increase(peerturb_rebuilds_total{@n}[@r])",
                },
            ),
        ],
    },
)

COORDINATOR = Page(
    uid="peerturb-coordinator",
    title="peerturb: coordinator",
    variables=["coordinator"],
    rows={
        "Now": [
            now("Log can be written", "peerturb_log_writable{@c}", "bool"),
            now("Records", "peerturb_log_records{@c}"),
            now("Disk left", "peerturb_log_disk_free_bytes{@c}", "bytes"),
            now("Streams", "peerturb_sessions{@c}"),
            now("Uptime", "time() - process_start_time_seconds{@c}", "s"),
            now("Finished", "peerturb_finished{@c}", "bool"),
        ],
        "Process": [
            Panel("Processor", {"share of a core": "rate(process_cpu_seconds_total{@c}[@r])"}, "percentunit"),
            Panel("Memory", {"resident": "process_resident_memory_bytes{@c}"}, "bytes"),
            Panel("Open files", {"open": "process_open_fds{@c}", "limit": "process_max_fds{@c}"}),
        ],
        "Log": [
            Panel("Records", {"records": "peerturb_log_records{@c}"}),
            Panel("Disk left where the log lies", {"free": "peerturb_log_disk_free_bytes{@c}"}, "bytes"),
            Panel("The slowest session", {"records to be sent": "peerturb_feed_lag_records{@c}"}),
        ],
    },
)

WIRE = Page(
    uid="peerturb-wire",
    title="peerturb: wire and bytes",
    variables=["coordinator"],
    rows={
        "Bytes": [
            Panel(
                "Bytes a second",
                {"{{direction}}": "sum by (direction) (rate(peerturb_bytes_total{@c}[@r]))"},
                "Bps",
                width=12,
            ),
            Panel(
                "Bytes by kind of message",
                {"{{kind}} {{direction}}": "sum by (direction, kind) (rate(peerturb_bytes_total{@c}[@r]))"},
                "Bps",
                width=12,
            ),
            Panel(
                "Bytes up for each projected gradient",
                {
                    "bytes": 'sum(rate(peerturb_bytes_total{@c,direction="up",kind="contribution"}[@r])) / '
                    "sum(rate(peerturb_probes_total{@c}[@r]))"
                },
                about="A code is one byte; the rest is the message around it.",
                width=12,
            ),
            Panel(
                "Messages a second",
                {"{{kind}} {{direction}}": "sum by (direction, kind) (rate(peerturb_messages_total{@c}[@r]))"},
                "ops",
                width=12,
            ),
        ]
    },
)

PAGES = (RUN, PEERS, NODE, COORDINATOR, WIRE)


def documents() -> dict[str, str]:
    """Return file name -> JSON."""
    encoder = JSONEncoder(sort_keys=True, indent=1)
    return {f"{page.uid}.json": encoder.encode(_dashboard(page).build()) + "\n" for page in PAGES}


def expression(text: str) -> str:
    """Return PromQL as Grafana takes it."""
    for short, meaning in MEANING.items():
        text = text.replace(short, meaning)
    return text


def _dashboard(page: Page) -> dashboard.Dashboard:
    made = dashboard.Dashboard(page.title).uid(page.uid).tags(["peerturb"]).refresh("10s").time("now-1h", "now")
    made.editable().timezone("browser").version(1)
    made.with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    for name in page.variables:
        made.with_variable(_variable(name, is_one=page.title.endswith("one node")))
    number = count(1)
    for title, panels in page.rows.items():
        made.with_row(dashboard.Row(title).id(next(number)))
        for panel in panels:
            made.with_panel(_panel(next(number), panel))
    return made


def _variable(name: str, *, is_one: bool) -> dashboard.QueryVariable:
    made = dashboard.QueryVariable(name).label(name).datasource(SOURCE)
    made.query(f"label_values({KNOWN_BY[name]}, instance)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return made if is_one else made.multi(True).include_all(True).all_value(".+")


def _panel(number: int, panel: Panel) -> stat.Panel | timeseries.Panel:
    made: stat.Panel | timeseries.Panel
    if panel.is_now:
        made = stat.Panel().graph_mode(BigValueGraphMode.NONE).height(4)
    else:
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        made = timeseries.Panel().height(8).fill_opacity(8).legend(legend.show_legend(True))
    made.id(number).title(panel.title).unit(panel.unit).span(panel.width).datasource(SOURCE).description(panel.about)
    for letter, (label, text) in zip(ascii_uppercase, panel.ask.items(), strict=False):
        query = prometheus.Dataquery().expr(expression(text)).ref_id(letter).datasource(SOURCE)
        if panel.is_now:
            query.instant()
        made.with_target(query.legend_format(label))
    return made


def main(arguments: Sequence[str]) -> int:
    """Write or check; return the exit code."""
    wanted = documents()
    stale = [name for name, text in wanted.items() if not _is_current(FOLDER / name, text)]
    if list(arguments) == ["--check"]:
        print(f"out of date: {', '.join(stale)}; run python deploy/grafana/dashboards.py" if stale else "up to date")
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(wanted[name], encoding="utf-8")
    return 0


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
