"""The report of a simulated run: one HTML file, no requests to anywhere, light and dark, printable.

It knows a `Result` and nothing else; the same result gives the same page, byte for byte.
"""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean

from peerturb.errors import SpecError
from peerturb_sim import amounts
from peerturb_sim.drawings import POINTS_MAX, SLIM, WIDE, Band, Curve, at_once, curves, timeline
from peerturb_sim.result import FaultRow, PeerRow, Result
from peerturb_sim.scenario_text import scenario_toml

PEERS_MAX = 100
"""Peers with a row of their own: those who gave most. The rest is summed."""
SCENARIO_FILE = "scenario.toml"
"""Name under which the page shows the scenario: to be saved by whoever has lost the file."""
FAULTS_MAX = 100
"""Faults that are listed; all are drawn and counted."""

_STYLE = """
svg.plot { width: 100%; height: auto; display: block; overflow: visible; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(46%, 220px), 1fr)); }
.tile b { white-space: normal; overflow-wrap: anywhere; }
.slim { display: none; }
h1, p, summary, .alarm { overflow-wrap: anywhere; }
tr.sum td { font-weight: 600; }
th { vertical-align: bottom; line-height: 1.25; }
.card.figures { padding-left: 0; padding-right: 0; } .figures td { white-space: nowrap; }
.figures th, .figures td { padding-right: 8px; } .figures th.n { white-space: normal; }
.figures th:first-child, .figures td:first-child { position: sticky; left: 0; background: var(--card); }
.figures th:first-child, .figures td:first-child { padding-left: 16px; }
.figures th:last-child, .figures td:last-child { padding-right: 16px; }
td.said, .figures td.said { white-space: normal; min-width: 9em; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
ul.broken { margin: 6px 0 0; padding-left: 20px; }
@media (max-width: 620px) {
  .wide { display: none; } .slim { display: block; }
  h1 { font-size: 1.5rem; } .tile, .card { padding: 12px; }
  .tile b { font-size: 1.25rem; } .tile .was { font-size: 0.9rem; }
}
@media print { details > * { display: block; } .card { break-inside: avoid; } }
"""
_UNITS = ((120.0, 1.0, "s"), (7_200.0, 60.0, "min"), (172_800.0, 3_600.0, "h"))


def write_report(path: Path, result: Result, *, command: str = "") -> None:
    """Write the page.

    Args:
        path: the file.
        result: the run.
        command: the command line that simulates it again; empty: with the scenario that the page shows.

    Raises:
        SpecError: the file cannot be written.
    """
    try:
        path.write_text(page(result, command=command), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot write the report {path}: {error.strerror or error}") from error


def page(result: Result, *, command: str = "") -> str:
    """Return the page as text; see `write_report`."""
    command = command or f"peerturb sim run {SCENARIO_FILE} --seed {result.seed}"
    style = resources.files("peerturb_node.demo").joinpath("page", "report.css").read_text(encoding="utf-8")
    sections = [_heading(result), _tiles(result), _plots(result), _faults(result), _groups(result), _peers(result),
                _again(result, command)]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>peerturb sim: {html.escape(result.name)}, seed {result.seed}</title>"
        f"<style>{style}{_STYLE}</style></head><body><main>" + "\n".join(sections) + "</main></body></html>\n"
    )


def _heading(result: Result) -> str:
    alarm = ""
    if result.broken:
        rows = "".join(
            f"<li>{row.at_s:,.1f} s, {_said(row.name)}: {_said(row.text)}</li>" for row in result.broken[:20]
        )
        more = f"<li>and {len(result.broken) - 20} more</li>" if len(result.broken) > 20 else ""
        alarm = f'<div class="alarm"><b>Invariants were broken.</b><ul class="broken">{rows}{more}</ul></div>'
    elif not result.is_finished:
        alarm = '<p class="alarm"><b>Not all rounds were sealed.</b></p>'
    verdict = "All rounds were sealed and no checker saw an invariant broken. " if not alarm else ""
    return (
        f"<header><h1>{_said(result.name)}: {len(result.peers):,} simulated peers, {len(result.rounds):,} rounds</h1>"
        f'<p class="soft">{verdict}Seed {result.seed}, objective {_said(result.compute)}, RunSpec '
        f"{_said(result.spec_digest[:16])}. Times are virtual.</p>{alarm}</header>"
    )


def _tiles(result: Result) -> str:
    losses = [row.loss for row in result.rounds if row.loss is not None]
    codes = sum(row.codes for row in result.rounds)
    gave = sum(1 for peer in result.peers if peer.codes)
    tiles = [
        (f'<span class="was">{losses[0]:.4g} →</span> {losses[-1]:.4g}' if losses else "none", "training loss"),
        (amounts.seconds(result.virtual_s), "virtual time"),
        (f"{codes:,}", "codes in the log"),
        (amounts.size(result.log.bytes), f"log, {result.log.records:,} records"),
        (f"{gave:,}", f"of {len(result.peers):,} peers gave codes"),
        (f"{result.seals.get('deadline', 0):,}", f"of {len(result.rounds):,} rounds were sealed by the deadline"),
        (amounts.size(result.bytes_up), "sent by all peers"),
        (amounts.size(result.bytes_down), "received by all peers"),
    ]
    cells = "".join(f'<div class="tile"><b>{value}</b><small>{label}</small></div>' for value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _plots(result: Result) -> str:
    rounds = result.rounds
    if not rounds:
        return "<p>No round was sealed: there are no curves.</p>"
    scale, unit = _unit(result.virtual_s)
    at = [row.sealed_s / scale for row in rounds]
    took = [row.sealed_s - row.opened_s for row in rounds]
    late = [index for index, row in enumerate(rounds) if row.reason == "deadline"]
    held = _held_out(result)
    x = f"virtual time, {unit}"
    loss = [Curve(name="training", xs=at, ys=[row.loss for row in rounds])]
    if held:
        where, values = [at_s / scale for at_s, _ in held], [value for _, value in held]
        loss.append(Curve(name="held-out, as peers say", xs=where, ys=values, colour="green", dash="", mark="o"))
    peers = [
        Curve(name="connected at its seal", xs=at, ys=[row.connected for row in rounds], colour="amber", dash="dashed"),
        Curve(name="in the sealed round", xs=at, ys=[row.peers for row in rounds]),
    ]
    durations = [Curve(name="a round", xs=at, ys=took, colour="violet")]
    if late:
        by_deadline = Curve(
            name="sealed by its deadline", xs=[at[index] for index in late], ys=[took[index] for index in late],
            colour="red", dash="", mark="x",
        )  # fmt: skip
        durations.append(by_deadline)
    traffic = [
        Curve(name="down, all peers", xs=at, ys=[row.bytes_down for row in rounds]),
        Curve(name="up, all peers", xs=at, ys=[row.bytes_up for row in rounds], colour="amber", dash="dashed"),
    ]
    cards = [
        _card("Loss", curves("loss", loss, title="loss by virtual time", x=x, y="loss")),
        _card("Peers", curves("peers", peers, title="peers by virtual time", x=x, y="peers")),
        _card(
            "Duration of a round", curves("time", durations, title="seconds a round by virtual time", x=x, y="seconds")
        ),
        _card(
            "Bytes in a round",
            curves("bytes", traffic, title="bytes a round", x=x, y="in a round", is_log=True, amount=amounts.size),
        ),
    ]
    note = ""
    if len(rounds) > POINTS_MAX:
        note = f'<p class="small soft">Each point is the mean of {-(-len(rounds) // POINTS_MAX)} rounds.</p>'
    return f'<h2>Round by round</h2><div class="plots">{"".join(cards)}</div>{note}'


def _held_out(result: Result) -> list[tuple[float, float]]:
    """Return (time, loss) of each evaluated round, means over the peers that evaluated it."""
    by_round: dict[int, list[tuple[float, float]]] = {}
    for row in result.evaluations:
        if row.loss is not None:
            by_round.setdefault(row.round, []).append((row.at_s, row.loss))
    return [(fmean(at_s for at_s, _ in rows), fmean(loss for _, loss in rows)) for _, rows in sorted(by_round.items())]


def _card(title: str, plot: str) -> str:
    return f'<section class="card"><h3>{title}</h3>{plot}</section>'


def _faults(result: Result) -> str:
    if not result.faults:
        return "<h2>Faults</h2><p>Nothing went wrong.</p>"
    kinds = Counter(row.kind for row in result.faults)
    scale, unit = _unit(result.virtual_s)
    end = result.virtual_s / scale
    bands = []
    for kind, count in sorted(kinds.items()):
        spans = [_span(row, scale) for row in result.faults if row.kind == kind]
        most = max(at_once(spans, end))
        name = f"{kind.replace('_', ' ')} ({count:,}" + (f", up to {most:,} at once)" if most > 1 else ")")
        colour = "red" if kind.startswith(("coordinator", "corruption")) else "amber"
        bands.append(Band(name=name, spans=spans, colour=colour))
    drawings = "".join(
        f'<div class="{kind}">'
        + timeline(f"faults-{kind}", bands, end=end, title="timeline of faults", x=f"virtual time, {unit}", width=width)
        + "</div>"
        for kind, width in (("wide", WIDE), ("slim", SLIM))
    )
    rows = [
        [f"{row.at_s:,.2f}", "" if row.until_s is None else f"{row.until_s:,.2f}", row.kind.replace("_", " "), row.who,
         row.text]
        for row in sorted(result.faults, key=lambda row: row.at_s)[:FAULTS_MAX]
    ]  # fmt: skip
    shown = f"the first {FAULTS_MAX} of {len(result.faults):,}" if len(result.faults) > FAULTS_MAX else "all of them"
    heads = [("from, s", "n"), ("to, s", "n"), ("what", ""), ("who", ""), ("details", "said")]
    if not any(row.text for row in result.faults):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    listed = _table(heads, rows)
    return (
        f'<h2>Faults</h2><section class="card">{drawings}</section>'
        f"<details><summary>{shown}, one by one</summary>{listed}</details>"
    )


def _span(row: FaultRow, scale: float) -> tuple[float, float]:
    return row.at_s / scale, (row.at_s if row.until_s is None else row.until_s) / scale


_FIGURES = tuple(
    (name, "n")
    for name in (
        "probes measured", "contributions", "codes in the log", "share of codes", "refused", "crashes", "rebuilds",
        "sent", "received",
    )
)  # fmt: skip


def _figures(peers: Sequence[PeerRow], codes: int) -> list[str]:
    """Return the cells of `_FIGURES`, summed."""

    def total(name: str) -> int:
        return sum(getattr(peer, name) for peer in peers)

    counts = [total(name) for name in ("measured", "contributions", "codes")]
    share = f"{100 * counts[2] / codes:.3g} %" if codes else "–"
    rest = [total(name) for name in ("refused", "crashes", "rebuilds")]
    sizes = [amounts.size(total(name)) for name in ("bytes_up", "bytes_down")]
    return [*(f"{count:,}" for count in counts), share, *(f"{count:,}" for count in rest), *sizes]


def _groups(result: Result) -> str:
    codes = sum(peer.codes for peer in result.peers)
    parts: dict[tuple[str, str, str], list[PeerRow]] = {}
    for peer in result.peers:
        parts.setdefault((peer.group, peer.lie, peer.estimator), []).append(peer)
    rows = [
        [group, f"lie: {lie}" if lie else "honest", estimator, f"{len(peers):,}", *_figures(peers, codes)]
        for (group, lie, estimator), peers in parts.items()
    ]
    heads = [("group", ""), ("behaviour", ""), ("estimator", ""), ("peers", "n"), *_FIGURES]
    if all(row[2] == "spsa" for row in rows):
        heads, rows = [*heads[:2], *heads[3:]], [[*row[:2], *row[3:]] for row in rows]
    table = _table(heads, rows, css="figures")
    return f"<h2>What each group gave</h2>{table}"


def _peers(result: Result) -> str:
    codes = sum(peer.codes for peer in result.peers)
    ranked = sorted(result.peers, key=lambda peer: (-peer.codes, peer.peer))
    rows = []
    for peer in ranked[:PEERS_MAX]:
        said = [peer.lie and f"lie: {peer.lie}", peer.stopped and f"stopped: {peer.stopped}"]
        what = ", ".join(filter(None, ["exact" if peer.estimator == "exact" else "", *said]))
        slots = ", ".join(map(str, peer.slots[:4])) + (" …" if len(peer.slots) > 4 else "")
        own = [f"{peer.probes_per_s:.3g}", amounts.seconds(peer.present_s)]
        rows.append([peer.name, slots, *own, *_figures([peer], codes), what])
    rest = ranked[PEERS_MAX:]
    if rest:
        here = amounts.seconds(sum(peer.present_s for peer in rest))
        rows.append([f"{len(rest):,} others", "", "", here, *_figures(rest, codes), ""])
    heads = [("peer", ""), ("slot", ""), ("probes/s", "n"), ("there for", "n"), *_FIGURES, ("remarks", "said")]
    if not any(row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    table = _table(heads, rows, has_sum=bool(rest), css="figures")
    shown = f", the {PEERS_MAX} who gave most" if rest else ""
    return f"<h2>What each peer gave{shown}</h2>{table}"


def _table(
    heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], *, has_sum: bool = False, css: str = "listed"
) -> str:
    """Return a table; a column has a heading and a kind: "n" for numbers, "said" for sentences, or ""."""
    head = "".join(f'<th class="{kind}">{_said(name)}</th>' for name, kind in heads)
    lines = [
        "".join(f'<td class="{kind}">{_said(cell)}</td>' for (_, kind), cell in zip(heads, row, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in (lines[:-1] if has_sum else lines))
    last = f'<tr class="sum">{lines[-1]}</tr>' if has_sum else ""
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}{last}</tbody></table>"
    return f'<div class="card scroll {css}">{whole}</div>'


def _again(result: Result, command: str) -> str:
    rejects = ", ".join(f"{_said(name)} {count:,}" for name, count in sorted(result.rejects.items())) or "none"
    scenario = _said(scenario_toml(result.scenario))
    return (
        f"<h2>The same run again</h2><pre>{_said(command)}</pre>"
        f"<p>It writes the same log, byte for byte: chain {_said(result.log.chain[:16])} after "
        f"{result.log.records:,} records. `peerturb sim compare` finds the first difference of two logs. "
        f"Refusals by code: {rejects}.</p>"
        f"<details><summary>{SCENARIO_FILE}, every default written out</summary><pre>{scenario}</pre></details>"
    )


def _unit(end_s: float) -> tuple[float, str]:
    """Return what to divide seconds by, and the unit, for an axis that ends there."""
    for limit, scale, unit in _UNITS:
        if end_s < limit:
            return scale, unit
    return 86_400.0, "days"


def _said(text: str) -> str:
    return html.escape(text)
