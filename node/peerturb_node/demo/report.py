"""The demo's HTML report: one file, no requests to anywhere, light and dark, readable on a phone.

It knows the story and the summary; every figure on the page comes from them.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from peerturb_node.demo.events import RATE_WINDOW_ROUNDS, Story
from peerturb_node.demo.examples import Answer
from peerturb_node.demo.summary import Summary, is_good, size, survived
from peerturb_node.demo.svg import Level, Marker, Series, chart, legend

_PAGE = Path(__file__).parent / "page"
_MARK_COLOURS = {"kill": "red", "join": "green", "restart": "amber"}
_TONE_COLOURS = {"plain": "muted", "good": "green", "bad": "red", "act": "amber"}

_PEER_FIGURES = ("slot", "rounds", "codes sent", "bytes sent", "bytes received", "weights after", "digest")

UP_OVERHEAD_BYTES_MAX = 57.6
"""The uplink limit, 1.45 bytes a code at 128 codes, leaves (1.45 - 1) * 128 bytes a message for all framing."""
DOWN_OVERHEAD_BYTES_MAX = 76.8
"""The downlink limit, 1.15 bytes a code at 512 codes, leaves (1.15 - 1) * 512 bytes a round."""


def write_report(
    path: Path,
    story: Story,
    summary: Summary,
    examples: Sequence[tuple[Answer, Answer]],
    commands: Sequence[tuple[str, str]],
    *,
    when: str,
) -> None:
    """Write the page.

    Args:
        path: the file.
        story: what happened.
        summary: the figures.
        examples: (before, after) answers.
        commands: (what it does, command line) to repeat and check the result.
        when: date and time of the run, for the heading.
    """
    sections = [
        _heading(summary, when),
        _tiles(summary),
        _charts(story, summary),
        _bytes(story, summary),
        _peers(story),
        _timeline(story),
        _examples(examples, summary),
        _commands(commands, summary),
    ]
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>peerturb demo: {100 * summary.accuracy_before:.0f} % to {100 * summary.accuracy_after:.0f} %</title>"
        f"<style>{style}</style></head><body><main>"
        + "\n".join(sections)
        + f"</main><script>{script}</script></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _heading(summary: Summary, when: str) -> str:
    alarm = ""
    if not is_good(summary):
        alarm = (
            '<p class="alarm"><b>Something is wrong with this run.</b> '
            f"Digests equal: {summary.digests_equal}; replay equal: {summary.replay_equal}; "
            f"rounds lost: {summary.rounds_lost}; loss {summary.loss_before:.3f} to {summary.loss_after:.3f}.</p>"
        )
    return (
        f"<header><h1>{summary.nodes} nodes fine-tuned one model, one byte per gradient</h1>"
        f'<p class="soft">Real processes on one computer: a coordinator and {summary.nodes} nodes, each with its own '
        f"private part of the data, trained all {summary.parameters:,} parameters of a small language model to tell "
        "English documentation from source code. Nothing model-sized crossed the network. "
        f"{html.escape(when)}.</p>{alarm}</header>"
    )


def _tiles(summary: Summary) -> str:
    exchanged = summary.bytes_up + summary.bytes_down
    tiles = [
        (
            f'<span class="was">{100 * summary.accuracy_before:.1f} →</span> '
            f'<span class="green">{100 * summary.accuracy_after:.1f} %</span>',
            "accuracy on held-out text",
        ),
        (
            f'<span class="was">{summary.loss_before:.3f} →</span> <span class="blue">{summary.loss_after:.3f}</span>',
            "held-out loss",
        ),
        (f"1/{summary.saving:,.0f}", f"of full gradients: {size(exchanged)}, not {size(summary.full_gradient_bytes)}"),
        (
            '<span class="green">equal</span>' if summary.digests_equal else '<span class="red">differ</span>',
            f"weights of all replicas, {summary.digest_rounds_compared} rounds compared",
        ),
        (f"{summary.rounds}", f"rounds, {summary.probes:,} probes, {summary.training_seconds:.0f} s"),
    ]
    cells = "".join(f'<div class="tile"><b>{value}</b><small>{label}</small></div>' for value, label in tiles)
    return f'<div class="tiles">{cells}</div><p>Survived: {survived(summary)}.</p>'


def _charts(story: Story, summary: Summary) -> str:
    marks = [Marker(x=m.round, label=m.label, colour=_MARK_COLOURS[m.kind]) for m in story.marks]
    accuracy = [Series(name="held-out", colour="green", points=[(p.round, 100 * p.accuracy) for p in story.evals])]
    known = [y for _, y in accuracy[0].points if math.isfinite(y)]
    floor = min(40.0, 10 * math.floor(min(known, default=40.0) / 10))
    loss = [
        Series(name="training", colour="sky", kind="dots", points=[(p.round, p.loss) for p in story.rounds]),
        Series(name="held-out", colour="blue", points=[(p.round, p.loss) for p in story.evals]),
    ]
    durations = [
        Series(
            name="a round",
            colour="violet",
            kind="dots",
            points=[(p.round, p.duration_ms / 1_000) for p in story.rounds if math.isfinite(p.duration_ms)],
        )
    ]
    cards = [
        _card(
            "Accuracy", accuracy,
            chart("held-out accuracy by round", accuracy, x_label="round", y_text=lambda y: f"{y:.0f} %",
                  y_range=(floor, 100.0), markers=marks),
        ),
        _card("Loss", loss, chart("loss by round", loss, x_label="round", y_text=lambda y: f"{y:.2f}", markers=marks)),
        _bytes_card(story, summary, marks),
        _card(
            "Duration of a round", durations,
            chart("seconds a round", durations, x_label="round", y_text=lambda y: f"{y:.3g} s", markers=marks),
        ),
    ]  # fmt: skip
    return f'<h2>What happened, round by round</h2><div class="charts">{"".join(cards)}</div>'


def _bytes_card(story: Story, summary: Summary, marks: Sequence[Marker]) -> str:
    rows = story.bytes_per_code_by_round()
    series = [
        Series(name="sent", colour="amber", points=[(float(round), up) for round, up, _ in rows]),
        Series(name="received", colour="blue", points=[(float(round), down) for round, _, down in rows]),
    ]
    limit_up, limit_down = limits(summary)
    levels = [
        Level(y=limit_up, label=f"limit sent {limit_up:.2f}", colour="amber"),
        Level(y=limit_down, label=f"limit received {limit_down:.2f}", colour="blue"),
        Level(y=1.0, label="the code itself"),
    ]
    plot = chart(
        "bytes per code by round", series, x_label="round", y_text=lambda y: f"{y:.2f}", markers=marks, levels=levels
    )
    return _card(f"Bytes per gradient, mean of {RATE_WINDOW_ROUNDS} rounds", series, plot)


def limits(summary: Summary) -> tuple[float, float]:
    """Return the most bytes per code, up and down, that the protocol's budget allows at this run's message sizes."""
    per_message = max(1.0, summary.codes_per_contribution)
    per_round = max(1.0, summary.probes / max(1, summary.rounds))
    return 1 + UP_OVERHEAD_BYTES_MAX / per_message, 1 + DOWN_OVERHEAD_BYTES_MAX / per_round


def _card(title: str, series: Sequence[Series], plot: str) -> str:
    return (
        f'<section class="card"><h3>{title}</h3>{legend(series)}{plot}<p class="readout" aria-live="off"></p></section>'
    )


def _bytes(story: Story, summary: Summary) -> str:
    exchanged = summary.bytes_up + summary.bytes_down
    sent = sum(peer.rounds_part for peer in story.peers.values())
    received = sum(peer.rounds_received for peer in story.peers.values())
    # On a linear scale the first bar would be invisible: it keeps two pixels, and the figures stand beside the bars.
    share = 75 * exchanged / max(1, summary.full_gradient_bytes)
    limit_up, limit_down = limits(summary)
    codes_up = sum(peer.codes_up for peer in story.peers.values())
    codes_down = sum(peer.codes_down for peer in story.peers.values())
    per_round = summary.probes / max(1, summary.rounds)
    return (
        '<h2>Bytes, with the sum written out</h2><div class="card"><div class="bars">'
        + _bar("exchanged", "green", share, size(exchanged))
        + _bar("full gradients", "red", 75.0, size(summary.full_gradient_bytes))
        + '</div><p class="sum">Full f32 gradients in the same rounds: '
        f"({sent:,} sent + {received:,} received) × {summary.parameters:,} parameters × 4 B "
        f"= {summary.full_gradient_bytes:,} B. Exchanged: {summary.bytes_up:,} B sent + {summary.bytes_down:,} B "
        f"received = {exchanged:,} B, 1/{summary.saving:,.0f} of it.</p>"
        f'<p class="sum">Per projected gradient: {summary.bytes_up:,} B / {codes_up:,} codes sent '
        f"= <b>{summary.bytes_up_per_code:.2f} B</b>; "
        f"{summary.bytes_down:,} B / {codes_down:,} codes received "
        f"= <b>{summary.bytes_down_per_code:.2f} B</b>. "
        "These count everything from the first handshake on. In a steady round it was "
        f"{summary.bytes_up_per_code_steady:.2f} B sent and {summary.bytes_down_per_code_steady:.2f} B received; "
        f"the limit at {summary.codes_per_contribution:.0f} codes a message and {per_round:.0f} a round is "
        f"{limit_up:.2f} B and {limit_down:.2f} B.</p>"
        '<p class="small soft">Counted by a relay on loopback in front of every node: all bytes above TCP, so '
        "handshakes, HTTP/2 and gRPC framing, evaluation reports, reconnects, and the replay of the node that joined "
        "late are in. A message has a fixed cost of some 50 bytes, so more codes in a message make each one cheaper; "
        "the limit is 1.45 B sent at 128 codes a message and 1.15 B received at 512 a round. One full gradient says "
        "more than one round of probes: the sum compares the bytes of equal rounds, not the number of rounds.</p></div>"
    )


def _bar(label: str, colour: str, percent: float, text: str) -> str:
    return (
        f'<span>{label}</span><div class="track"><div class="bar {colour}" style="width:{percent:.4f}%"></div>'
        f"<span><b>{text}</b></span></div>"
    )


def _peers(story: Story) -> str:
    heads = [("node", ""), ("state", ""), *((name, "n") for name in _PEER_FIGURES)]
    rows = []
    for peer in story.peers.values():
        note = f" (joined late, replayed {peer.replayed} rounds)" if peer.is_late else ""
        figures = [
            "–" if peer.slot is None else str(peer.slot),
            f"{peer.rounds_part:,}",
            f"{peer.codes_up:,}",
            f"{peer.bytes_up:,}",
            f"{peer.bytes_down:,}",
            "–" if peer.round is None else str(peer.round),
            f"<code>{html.escape(peer.digest)}</code>",
        ]
        cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
        rows.append(f'<tr><td class="name">{html.escape(peer.name)}</td><td>{peer.state}{note}</td>{cells}</tr>')
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in heads)
    return (
        f'<h2>Peers</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _timeline(story: Story) -> str:
    rows = "".join(
        f'<li class="{_TONE_COLOURS[entry.tone]}"><time>{entry.at_s:.1f} s · round {entry.round}</time> '
        f"<span>{html.escape(entry.text)}</span></li>"
        for entry in story.entries
    )
    return f'<h2>Timeline</h2><ol class="timeline">{rows}</ol>'


def _examples(examples: Sequence[tuple[Answer, Answer]], summary: Summary) -> str:
    cards = "".join(
        f'<div class="card"><blockquote>{html.escape(before.text)}</blockquote><div>'
        f'<span class="pill">is {html.escape(before.truth)}</span>{_pill("before", before)}{_pill("after", after)}'
        "</div></div>"
        for before, after in examples
    )
    return (
        '<h2>Answers before and after</h2><p class="soft">Held-out text. Chosen: mistakes that were corrected, answers '
        "that stayed right, and one that is still wrong if there is one. "
        f"Over all held-out text {100 * summary.accuracy_after:.1f} % are right.</p>"
        f'<div class="answers">{cards}</div>'
    )


def _pill(when: str, answer: Answer) -> str:
    kind, sign = ("right", "✓") if answer.is_right else ("wrong", "✗")
    text = f"{when}: {html.escape(answer.answer)}, {100 * answer.confidence:.0f} % sure {sign}"
    return f'<span class="pill {kind}">{text}</span>'


def _commands(commands: Sequence[tuple[str, str]], summary: Summary) -> str:
    rows = "".join(f"<p>{html.escape(label)}</p><pre>{html.escape(command)}</pre>" for label, command in commands)
    return (
        "<h2>Check it yourself</h2>"
        f"<p>The log is the fine-tune: base weights and {summary.rounds} rounds of bytes give the model, byte for byte."
        "</p>"
        f"{rows}"
    )
