"""The demo's result: the figures of `summary.json`, and the page a person reads in the terminal at the end."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peerturb_node.demo.events import Story
from peerturb_node.demo.examples import Answer, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `summary.json` holds. Fractions in [0, 1], losses in nats, times in seconds, sizes in bytes."""

    accuracy_before: float
    accuracy_after: float
    """On all held-out examples, by plain inference on the written model."""
    loss_before: float
    loss_after: float
    rounds: int
    """Sealed rounds in the log."""
    probes: int
    """Projected gradients in them: codes, one byte each."""
    seconds: float
    """From start to result, set-up of processes and evaluations included."""
    training_seconds: float
    bytes_up_per_code: float
    """Socket bytes above TCP from nodes to coordinator, all framing and handshakes included, per code sent."""
    bytes_down_per_code: float
    """The other direction, replay of the late joiner included, per code received."""
    bytes_up_per_code_steady: float
    """Median over windows of rounds: what a round costs when nobody joins and nothing breaks."""
    bytes_down_per_code_steady: float
    bytes_up: int
    bytes_down: int
    full_gradient_bytes: int
    """What f32 gradients would have cost in the same rounds, both directions."""
    codes_per_contribution: float
    parameters: int
    nodes: int
    """Nodes at the start."""
    digests_equal: bool
    """All nodes reported equal digests in every round, and replaying the log gave a live node's weights."""
    digest_rounds_compared: int
    replay_equal: bool
    rounds_lost: int
    """Rounds that a node skipped, saw twice, or saw and the log lacks: 0 if every announced round survived."""
    killed: int
    joined: int
    coordinator_restarts: int
    model_dir: str
    log_file: str
    report_file: str

    def write(self, path: Path) -> None:
        """Write as JSON; figures that are not finite become null."""
        document = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in asdict(self).items()}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @property
    def saving(self) -> float:
        """How many times more full gradients would have cost."""
        return self.full_gradient_bytes / max(1, self.bytes_up + self.bytes_down)


def summarize(
    story: Story,
    before: Verdict,
    after: Verdict,
    *,
    nodes: int,
    rounds_logged: int,
    probes_logged: int,
    seconds: float,
    training_seconds: float,
    is_replay_equal: bool,
    model_dir: Path,
    log_file: Path,
    report_file: Path,
) -> Summary:
    """Put the figures together."""
    peers = story.peers.values()
    windows = story.bytes_per_code_by_round()
    contributions = sum(peer.rounds_part for peer in peers)
    return Summary(
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        loss_before=before.loss,
        loss_after=after.loss,
        rounds=rounds_logged,
        probes=probes_logged,
        seconds=round(seconds, 1),
        training_seconds=round(training_seconds, 1),
        bytes_up_per_code=round(story.bytes_up_per_code, 4),
        bytes_down_per_code=round(story.bytes_down_per_code, 4),
        bytes_up_per_code_steady=_median([up for _, up, _ in windows]),
        bytes_down_per_code_steady=_median([down for _, _, down in windows]),
        bytes_up=story.bytes_up,
        bytes_down=story.bytes_down,
        full_gradient_bytes=story.full_gradient_bytes,
        codes_per_contribution=round(sum(peer.codes_up for peer in peers) / max(1, contributions), 1),
        parameters=story.parameters,
        nodes=nodes,
        digests_equal=story.are_digests_equal and is_replay_equal,
        digest_rounds_compared=story.compared,
        replay_equal=is_replay_equal,
        rounds_lost=sum(peer.disorder for peer in peers) + max(0, story.round - rounds_logged),
        killed=story.killed,
        joined=story.joined,
        coordinator_restarts=story.coordinator_restarts,
        model_dir=str(model_dir),
        log_file=str(log_file),
        report_file=str(report_file),
    )


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4) if values else math.nan


def size(count: float) -> str:
    """Return a byte count for people, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:.3g} TB"


def survived(summary: Summary) -> str:
    """Return what the network lived through, as a phrase."""
    parts = []
    if summary.killed:
        parts.append("a node killed with SIGKILL")
    if summary.joined:
        parts.append("a new one joined by replay")
    if summary.coordinator_restarts:
        parts.append("the coordinator killed and restarted")
    return ", ".join(parts) or "nothing was broken on purpose (--no-chaos)"


def closing_page(summary: Summary, examples: list[tuple[Answer, Answer]], *, columns: int) -> RenderableType:
    """Return the last page: figures, examples, files."""
    return Panel(
        Group(_figures(summary), Text(), _examples(examples, columns - 4), Text(), _files(summary)),
        title=Text.assemble((" peerturb demo ", "bold"), (_verdict(summary), "green" if is_good(summary) else "red")),
        title_align="left",
        box=box.ROUNDED,
        border_style="green" if is_good(summary) else "red",
        width=columns,
    )


def is_good(summary: Summary) -> bool:
    """Whether the run kept what it promises: equal digests, no lost round, a better model."""
    return summary.digests_equal and not summary.rounds_lost and summary.loss_after < summary.loss_before


def _verdict(summary: Summary) -> str:
    return "done " if is_good(summary) else "done, but something is wrong: see below "


def _figures(summary: Summary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    exchanged = summary.bytes_up + summary.bytes_down
    table.add_row(
        "accuracy",
        Text.assemble(
            f"{100 * summary.accuracy_before:.1f} % → ", (f"{100 * summary.accuracy_after:.1f} %", "bold green"),
            ("   on text no node ever had", "dim"),
        ),
    )  # fmt: skip
    table.add_row("loss", Text.assemble(f"{summary.loss_before:.3f} → ", (f"{summary.loss_after:.3f}", "bold cyan")))
    table.add_row(
        "training",
        f"{summary.rounds} rounds, {summary.probes:,} probes, {summary.training_seconds:.0f} s "
        f"({summary.seconds:.0f} s in all)",
    )
    table.add_row(
        "exchanged",
        Text.assemble(
            (size(exchanged), "bold"), f" instead of {size(summary.full_gradient_bytes)} of full gradients: ",
            (f"1/{summary.saving:,.0f}", "bold green"),
        ),
    )  # fmt: skip
    table.add_row(
        "per gradient",
        f"{summary.bytes_up_per_code:.2f} B sent, {summary.bytes_down_per_code:.2f} B received; "
        f"{summary.bytes_up_per_code_steady:.2f} and {summary.bytes_down_per_code_steady:.2f} without handshakes",
    )
    table.add_row("replicas", _replicas(summary))
    table.add_row("survived", survived(summary))
    return table


def _replicas(summary: Summary) -> Text:
    if summary.digests_equal:
        return Text.assemble(
            (f"bit-identical in all {summary.digest_rounds_compared} rounds", "bold green"),
            "; base + log = model, byte for byte",
        )
    if not summary.replay_equal:
        return Text("replaying the log does NOT give a live node's weights", style="bold red")
    return Text("digests of the nodes DIFFER", style="bold red")


def _examples(pairs: list[tuple[Answer, Answer]], width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), width=width, header_style="dim", pad_edge=False)
    table.add_column("held-out text", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("it is", no_wrap=True)
    table.add_column("before", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for before, after in pairs:
        table.add_row(Text(before.text), before.truth, _answer(before), _answer(after))
    return table


def _answer(answer: Answer) -> Text:
    sign, style = ("✓", "green") if answer.is_right else ("✗", "red")
    return Text(f"{answer.answer:>4} {100 * answer.confidence:3.0f} % {sign}", style=style)


def _files(summary: Summary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("report", Text(summary.report_file, style="bold"))
    table.add_row("model", summary.model_dir)
    table.add_row("log", summary.log_file)
    return table


def next_lines(commands: list[tuple[str, str]]) -> list[Text]:
    """Return what to try next, a line each; to be printed unwrapped, so that a command can be copied."""
    return [Text.assemble((f"  {label:<8}", "dim"), (command, "cyan")) for label, command in commands]
