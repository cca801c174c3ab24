"""A coordinator's Prometheus metrics. Most are read when they are scraped, so that they cost a run nothing.

Names are those of docs/metrics.md, which follows from this module. Labels are few and bounded: none names a peer. What
follows from the log (`peerturb_round`, `peerturb_probes_total`, `peerturb_codes_void_total`, `peerturb_log_records`)
goes on after a restart; all else counts from the start of the process, as Prometheus expects.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from peerturb.ids import Slot
from peerturb.protocol.records import Record, RoundOpened, RoundSealed
from peerturb.protocol.sealing import SealReason
from peerturb.protocol.status import CoordinatorStatus
from peerturb.wire.metrics import SECONDS, build_info
from peerturb_coordinator.live.history import History
from peerturb_coordinator.runner import Runner

STATES = ("connected", "lagging", "away", "left")
_SEALS = (SealReason.EVERYONE, SealReason.DEADLINE)


class Metrics:
    """Collects a run's figures (a collector of `prometheus_client`, and a `Watcher`).

    Args:
        registry: which the figures join.
        runner: of the run.
        history: has heard every record.
        data_dir: folder of the log, whose disk is watched.
    """

    def __init__(self, registry: CollectorRegistry, runner: Runner, history: History, data_dir: Path) -> None:
        self._runner, self._history, self._data_dir = runner, history, data_dir
        self._durations = Histogram(
            "peerturb_round_duration_seconds", "Time from opening to sealing a round.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        is_open = runner.machine.ledger.open
        self._opened_ms = None if is_open is None else runner.now_ms
        self._is_timed = False
        """Whether this process has opened the round itself; one of an earlier process counts as opened now."""
        self._deadline_ms = 0 if is_open is None else is_open.deadline_ms
        registry.register(self)

    def hear(self, record: Record, *, now_ms: int | None, at_s: float | None, reason: str) -> None:
        """See `Watcher`."""
        if isinstance(record, RoundOpened):
            self._opened_ms, self._deadline_ms, self._is_timed = now_ms, record.deadline_ms, True
        elif isinstance(record, RoundSealed):
            if self._is_timed and now_ms is not None and self._opened_ms is not None:
                self._durations.observe((now_ms - self._opened_ms) / 1000)
            self._opened_ms = None

    def stand(self, slot: Slot, *, is_there: bool, at_s: float) -> None:
        """Nothing: who is there is read when it is scraped."""

    def describe(self) -> Iterator[Metric]:
        """Say nothing in advance: names are checked by tests, and a scrape must not be taken for registering."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield all figures."""
        status = self._runner.status()
        yield build_info()
        yield from self._of_run(status)
        yield from self._of_peers(status)
        yield from self._of_wire()
        yield from self._of_log(status)

    def _of_run(self, status: CoordinatorStatus) -> Iterator[Metric]:
        counters = self._runner.machine.counters
        yield _gauge("peerturb_round", "Sealed rounds.", status.round)
        wanted = self._runner.machine.spec.round.count
        yield _gauge("peerturb_rounds_wanted", "Rounds after which the run ends; 0: never.", wanted)
        yield _gauge("peerturb_finished", "1 once all rounds are sealed.", status.is_finished)
        yield _gauge("peerturb_diverging", "1 while the losses say that the run diverges.", bool(status.warning))
        yield _gauge("peerturb_loss", "Training loss of the newest sealed round, nats.", status.loss)
        yield _gauge("peerturb_scale", "Projected gradient for each unit of a code.", status.scale)
        yield _gauge("peerturb_step_size", "Alpha of the newest sealed round.", status.alpha)
        yield _gauge(
            "peerturb_round_open_seconds", "Time since the open round was opened; 0 while none is.", self._open_s()
        )
        yield _gauge(
            "peerturb_round_deadline_seconds", "Time after which the open round is sealed without the missing peers.",
            self._deadline_ms / 1000,
        )  # fmt: skip
        seals = CounterMetricFamily("peerturb_seal", "Rounds sealed, by reason.", labels=["reason"])
        for reason in _SEALS:
            seals.add_metric([reason.value], counters.seals[reason])
        yield seals
        newest = self._history.evaluations[-1] if self._history.evaluations else (0, None, None)
        evaluation = GaugeMetricFamily("peerturb_eval", "Newest held-out evaluation.", labels=["metric"])
        for name, value in (("loss", newest[1]), ("accuracy", newest[2])):
            evaluation.add_metric([name], math.nan if value is None else value)
        yield evaluation

    def _of_peers(self, status: CoordinatorStatus) -> Iterator[Metric]:
        counters = self._runner.machine.counters
        peers = GaugeMetricFamily("peerturb_peers", "Identities that have joined, by state.", labels=["state"])
        for state in STATES:
            peers.add_metric([state], sum(peer.state == state for peer in status.peers))
        yield peers
        yield _gauge("peerturb_sessions", "Streams that stand, handshakes included.", self._runner.streams)
        yield _counter("peerturb_probes", "Codes in sealed rounds, of the whole run.", status.probes)
        exact = self._runner.machine.ledger.exact_probes
        estimators = CounterMetricFamily(
            "peerturb_codes", "Codes in sealed rounds by how they were found, of the whole run.", labels=["estimator"]
        )
        for estimator, count in (("spsa", status.probes - exact), ("exact", exact)):
            estimators.add_metric([estimator], count)
        yield estimators
        yield _counter("peerturb_codes_void", "Void codes in sealed rounds, of the whole run.", status.void_codes)
        yield _counter(
            "peerturb_digest_mismatch", "Contributions left out because they were measured on other weights.",
            counters.digest_mismatches,
        )  # fmt: skip
        rejects = CounterMetricFamily("peerturb_rejects", "Refusals, by code.", labels=["code"])
        for code, count in counters.rejects.items():
            rejects.add_metric([code.name.lower()], count)
        yield rejects

    def _of_wire(self) -> Iterator[Metric]:
        labels = ["direction", "kind"]
        sizes = CounterMetricFamily(
            "peerturb_bytes", "Bytes of session messages with 14 for the framing of each.", labels=labels
        )
        messages = CounterMetricFamily("peerturb_messages", "Session messages.", labels=labels)
        for way, size in sorted(self._runner.traffic.bytes.items()):
            sizes.add_metric(way, size)
            messages.add_metric(way, self._runner.traffic.messages[way])
        yield sizes
        yield messages
        yield _gauge("peerturb_feed_lag_records", "Records still to be sent to the slowest session.", self._runner.lag)

    def _of_log(self, status: CoordinatorStatus) -> Iterator[Metric]:
        yield _gauge("peerturb_log_records", "Records in the run log.", status.head)
        yield _gauge(
            "peerturb_log_writable",
            "0 while the log cannot be written; nothing is sealed then.",
            not self._runner.fault,
        )
        yield _gauge("peerturb_log_disk_free_bytes", "Free space where the log lies.", _free_bytes(self._data_dir))

    def _open_s(self) -> float:
        return 0.0 if self._opened_ms is None else max(0, self._runner.now_ms - self._opened_ms) / 1000


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))


def _free_bytes(folder: Path) -> float:
    try:
        return float(shutil.disk_usage(folder).free)
    except OSError:
        return math.nan
