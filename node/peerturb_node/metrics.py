"""A node's Prometheus metrics and readiness, from the events that it tells everybody.

Names are those of docs/metrics.md, which follows from this module. All count from the start of the process.
"""

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from peerturb.errors import RejectCode
from peerturb.wire.metrics import SECONDS, build_info
from peerturb_node.events import Event
from peerturb_node.idle.rule import REASONS


class Metrics:
    """Hears events (a `Sink`) and keeps figures.

    Args:
        registry: which the figures join.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.why_not = "the node starts"
        """Why the node does not train now; empty while it does."""
        registry.register(_Build())

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        self._round = gauge("peerturb_round", "Rounds applied to this node's weights.")
        self._loss = gauge("peerturb_loss", "Training loss of the newest applied round, nats.")
        self._peers = gauge("peerturb_round_peers", "Peers whose codes are in the newest applied round.")
        self._connected = gauge("peerturb_connected", "1 while the coordinator has this node in a session.")
        self._training = gauge("peerturb_training", "1 while this node is in a session and up to date.")
        self._paused = gauge("peerturb_paused", "1 while this node gives way to other work (`--idle`).")
        self._behind = gauge("peerturb_rounds_behind", "Rounds to apply when the session began, about.")
        self._tokens_per_s = gauge("peerturb_tokens_per_second", "Tokens through the model while probes are measured.")
        self._eval = Gauge("peerturb_eval", "Newest held-out evaluation of this node.", ["metric"], registry=registry)
        self._probes = counter("peerturb_probes_total", "Probes measured.")
        self._void = counter("peerturb_codes_void_total", "Void codes among them: a loss was not finite.")
        self._tokens = counter("peerturb_tokens_total", "Tokens of the examples of all probes and sides.")
        self._rounds = Counter(
            "peerturb_rounds_applied_total", "Rounds applied, by whether this node's codes are in them.", ["own"],
            registry=registry,
        )  # fmt: skip
        self._bytes = Counter(
            "peerturb_bytes_total", "Bytes of session messages with 5 for the prefix of each.", ["direction", "kind"],
            registry=registry,
        )  # fmt: skip
        self._rejects = Counter("peerturb_rejects_total", "Refusals by the coordinator.", ["code"], registry=registry)
        self._mismatches = counter("peerturb_digest_mismatch_total", "Times this node's weights were not the run's.")
        self._rebuilds = counter("peerturb_rebuilds_total", "Times the weights were made anew from the log.")
        self._pauses = Counter(
            "peerturb_pauses_total", "Times this node gave way to other work.", ["reason"], registry=registry
        )
        self._disconnects = counter("peerturb_disconnects_total", "Sessions that ended or never stood.")
        self._checkpoints = counter("peerturb_checkpoints_total", "Checkpoints written.")
        self._probe_s = Histogram(
            "peerturb_probe_seconds", "Time to measure a contribution's probes.", buckets=SECONDS, registry=registry
        )
        self._apply_s = Histogram(
            "peerturb_apply_seconds", "Time to apply a round.", buckets=SECONDS, registry=registry
        )  # fmt: skip
        for own in ("yes", "no"):
            self._rounds.labels(own)
        for direction in ("up", "down"):
            self._bytes.labels(direction, "session")
        for reason in REASONS:
            self._pauses.labels(reason)
        for metric in ("loss", "accuracy"):
            self._eval.labels(metric).set(math.nan)
        for code in RejectCode:
            self._rejects.labels(code.name.lower())
        self._loss.set(math.nan)
        self._counted = {"up": 0, "down": 0}
        self._is_connected = False

    def emit(self, event: Event) -> None:
        """Take in an event. If that fails this sink is dropped: readiness says so, for the figures stand still then."""
        try:
            self._take(event)
        except Exception as error:
            self.why_not = f"the metrics failed and stand still, training goes on: {error!r}"
            raise

    def _take(self, event: Event) -> None:
        match event["event"]:
            case "joined":
                self._connect(True)
                self._behind.set(0)
                self._stand("the node catches up with the run")
            case "behind":
                self._behind.set(event["rounds"])
            case "training":
                self._stand("")
            case "measured":
                self._measured(event)
            case "round":
                self._applied(event)
            case "eval":
                self._eval.labels("loss").set(_number(event["loss"]))
                self._eval.labels("accuracy").set(_number(event["accuracy"]))
            case "disconnected":
                self._disconnects.inc()
                self._connect(False)
                self._stand(f"not connected: {event['why']}")
            case "paused":
                self._connect(False)
                self._paused.set(1)
                self._pauses.labels(event["reason"]).inc()
                self._stand(f"paused: {event['why']}")
            case "resumed":
                self._paused.set(0)
                self._stand("the node joins again after a pause")
            case "refused":
                self._rejects.labels(event["code"]).inc()
                if event["code"] == RejectCode.DIGEST_MISMATCH.name.lower():
                    self._mismatches.inc()
            case "rebuild":
                self._rebuilds.inc()
                self._stand("the node makes its weights anew from the log")
            case "checkpoint":
                self._checkpoints.inc()
            case "stop":
                self._connect(False)
                self._stand(f"the node stops: {event['why']}")
            case _:
                pass

    def close(self) -> None:
        """Nothing is held."""

    def _connect(self, is_connected: bool) -> None:
        self._is_connected = is_connected
        self._connected.set(is_connected)

    def _stand(self, why_not: str) -> None:
        self.why_not = why_not
        self._training.set(not why_not)

    def _measured(self, event: Event) -> None:
        if self._is_connected:
            self._stand("")
        self._probes.inc(event["codes"])
        self._void.inc(event["void"])
        self._tokens.inc(event["tokens"])
        self._probe_s.observe(event["ms"] / 1000)

    def _applied(self, event: Event) -> None:
        self._round.set(event["round"])
        self._loss.set(_number(event["loss"]))
        self._peers.set(event["peers"])
        self._tokens_per_s.set(event["tokens_per_s"])
        self._rounds.labels("yes" if event["own"] else "no").inc()
        self._apply_s.observe(event["ms"] / 1000)
        for direction in ("up", "down"):
            size = event[f"bytes_{direction}"]
            self._bytes.labels(direction, "session").inc(size - self._counted[direction])
            self._counted[direction] = size


class _Build:
    """The version, as a collector."""

    def describe(self) -> Iterator[Metric]:
        """Yield the figure's name."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the version."""
        yield build_info()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
