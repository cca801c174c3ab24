// The live page: hears a run's events and shows them. Names come from strangers: text only, never markup.

import { bars, curve, short } from "/drawing.js";

const PEERS_SHOWN = 50, DRAW_MS = 250;
const SYMBOLS = { connected: "●", lagging: "◐", away: "○", left: "×" };
const byId = (id) => document.getElementById(id);
const wide = (id) => byId(id).clientWidth;
const grouped = (value) => Math.round(value).toLocaleString("en");

let run = null;
const peers = new Map();
let isAllShown = false;
let isDue = false;

const source = new EventSource("/events");
source.addEventListener("everything", (event) => {
  run = JSON.parse(event.data);
  peers.clear();
  for (const row of run.peers) peers.set(row[0], row);
  introduce();
  due();
});
source.addEventListener("changes", (event) => {
  if (run === null) return;
  const changes = JSON.parse(event.data);
  run.now = changes.now;
  run.timeline.push(...changes.timeline);
  run.timeline.splice(0, run.timeline.length - run.limits.timeline);
  run.curve.push(...changes.timeline);
  if (run.curve.length > 2 * run.limits.points) run.curve = run.curve.filter((_, index) => index % 2);
  run.evaluations.push(...changes.evaluations);
  if (run.evaluations.length > run.limits.points) run.evaluations = run.evaluations.filter((_, index) => index % 2 === 0);
  run.events.push(...changes.events);
  run.events.splice(0, run.events.length - 60);
  for (const row of changes.peers) peers.set(row[0], row);
  due();
});
source.onopen = () => { byId("line").textContent = "live"; };
source.onerror = () => { byId("line").textContent = "the line to the coordinator is lost; trying again …"; };
addEventListener("resize", () => { if (run !== null) due(); });
byId("more").addEventListener("click", () => { isAllShown = !isAllShown; showPeers(); });
byId("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(byId("join").textContent);
    byId("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(byId("join"));
    byId("copied").textContent = "selected; press Ctrl-C";
  }
});

/** Draw soon, once for all that comes until then. */
function due() {
  if (isDue) return;
  isDue = true;
  setTimeout(() => { isDue = false; show(); }, run.hasBeenShown ? DRAW_MS : 0);
}

function introduce() {
  document.title = `${run.run} · peerturb`;
  byId("run").textContent = run.run;
  byId("about").textContent = `fine-tunes ${run.model}${run.rounds_wanted ? ` in ${grouped(run.rounds_wanted)} rounds` : ", without an end"}`;
  byId("join").textContent = run.join;
  byId("token-hint").hidden = !run.needs_token;
  byId("digest").textContent = run.digest.slice(0, 16);
}

function show() {
  run.hasBeenShown = true;
  showNow();
  showCurves();
  showTimeline();
  showPeers();
  showEvents();
}

function tile(name, value, detail) {
  const box = document.createElement("div"), term = document.createElement("dt"), data = document.createElement("dd");
  term.textContent = name;
  data.textContent = value;
  if (detail) {
    const small = document.createElement("small");
    small.textContent = detail;
    data.append(small);
  }
  box.append(term, data);
  return box;
}

function showNow() {
  const now = run.now;
  const pill = byId("state");
  pill.textContent = now.state;
  pill.classList.toggle("bad", now.state === "stopped");
  byId("fault").hidden = now.state !== "stopped";
  byId("fault").textContent = now.state === "stopped" ? `No round is sealed: ${now.waiting_for}` : "";
  byId("warning").hidden = !now.warning;
  byId("warning").textContent = now.warning;
  byId("waiting").textContent = now.state === "running" ? `The open round: ${now.waiting_for}.` : "";
  const agree = now.mismatches ? [`${grouped(now.mismatches)} differed`, "contributions left out, replicas rebuilt"] : ["all agree", now.weights ? `weights ${now.weights}` : "no round yet"];
  const bytes = now.up_per_code === null ? ["–", "nothing sealed since the start"] : [`${short(now.up_per_code)} B`, `up; ${short(now.down_per_code)} B down to each peer`];
  byId("tiles").replaceChildren(
    tile("round", grouped(now.round), run.rounds_wanted ? `of ${grouped(run.rounds_wanted)}` : ""),
    tile("loss", short(now.loss), "training, last round"),
    tile("peers", grouped(now.connected), `connected, of ${grouped(now.members)} ever`),
    tile("projected gradients", grouped(now.probes), now.void_codes ? `${grouped(now.void_codes)} void` : "none void"),
    tile("bytes for each", ...bytes),
    tile("replicas", ...agree),
  );
}

function showCurves() {
  const losses = run.curve.filter((row) => row[1] !== null).map((row) => [row[0], row[1]]);
  const held = run.evaluations.filter((row) => row[1] !== null).map((row) => [row[0], row[1]]);
  const accuracies = run.evaluations.filter((row) => row[2] !== null).map((row) => [row[0], row[2]]);
  const durations = run.curve.filter((row) => row[4] !== null).map((row) => [row[0], row[4] / 1000]);
  const change = losses.length ? `${short(losses[0][1])} to ${short(losses.at(-1)[1])}` : "";
  byId("loss-text").textContent = change;
  byId("loss-chart").replaceChildren(curve(`loss over ${grouped(run.now.round)} rounds: ${change}`, wide("loss-chart"), losses, held));
  byId("accuracy-card").hidden = !accuracies.length;
  if (accuracies.length) {
    const newest = `${(100 * accuracies.at(-1)[1]).toFixed(1)} % after round ${grouped(accuracies.at(-1)[0])}`;
    byId("accuracy-text").textContent = newest;
    byId("accuracy-chart").replaceChildren(curve(`held-out accuracy: ${newest}`, wide("accuracy-chart"), [], accuracies));
  }
  const { rows, text } = withoutRare(durations);
  byId("duration-text").textContent = `opening to sealing, since this coordinator started${text}`;
  byId("duration-chart").replaceChildren(curve(`seconds from opening to sealing, over rounds${text}`, wide("duration-chart"), rows, [], true));
}

/** Cut off what lies far above the usual: a round that waited for its first peer leaves nothing else to be seen. */
function withoutRare(rows) {
  const values = rows.map(([, value]) => value).sort((one, two) => one - two);
  const most = values.length < 20 ? Infinity : 3 * values[Math.floor(0.95 * (values.length - 1))];
  const longer = values.filter((value) => value > most).length;
  const text = longer ? `; ${longer} longer than ${short(most)} s, at most ${short(values.at(-1))} s` : "";
  return { rows: rows.map(([round, value]) => [round, Math.min(value, most)]), text };
}

function showTimeline() {
  const rows = run.timeline.map(([round, loss, codes, count, duration, reason]) => ({
    round,
    value: duration === null ? null : duration / 1000,
    isFull: reason !== "deadline",
    text: `round ${round}: ${count} peers, ${codes} projected gradients${duration === null ? "" : `, ${short(duration / 1000)} s`}${reason ? `, sealed: ${reason}` : ""}, loss ${short(loss)}`,
  }));
  const late = rows.filter((row) => !row.isFull).length;
  byId("timeline").replaceChildren(bars(`the last ${rows.length} rounds, ${late} of them sealed at the deadline`, wide("timeline"), rows, run.limits.timeline));
}

function showPeers() {
  const rows = [...peers.values()].sort((one, other) => other[4] - one[4] || one[0] - other[0]);
  const all = rows.reduce((sum, row) => sum + row[4], 0) || 1;
  const most = rows.length ? rows[0][4] || 1 : 1;
  byId("peers-count").textContent = `${grouped(run.now.connected)} of ${grouped(rows.length)} connected`;
  byId("peers").replaceChildren(...rows.slice(0, isAllShown ? rows.length : PEERS_SHOWN).map((row) => peerRow(row, all, most)));
  byId("more").hidden = rows.length <= PEERS_SHOWN;
  byId("more").textContent = isAllShown ? "Show those who gave most" : `Show all ${grouped(rows.length)}`;
}

function peerRow([slot, name, key, state, probes, last, loss], all, most) {
  const row = document.createElement("tr"), head = document.createElement("th");
  head.scope = "row";
  head.textContent = name || `slot ${slot}`;
  head.title = `slot ${slot}, identity ${key}…`;
  row.append(head, cell(`${SYMBOLS[state] ?? ""} ${state}`), cell(grouped(probes), true));
  const share = cell(""), track = document.createElement("span"), bar = document.createElement("span");
  track.className = "track";
  bar.className = "bar";
  bar.style.width = `${(100 * probes) / most}%`;
  track.append(bar);
  share.append(track, `${((100 * probes) / all).toFixed(1)} %`);
  row.append(share, cell(last === null ? "–" : grouped(last), true), cell(short(loss), true));
  return row;
}

function cell(text, isNumber = false) {
  const made = document.createElement("td");
  if (isNumber) made.className = "n";
  made.textContent = text;
  return made;
}

function showEvents() {
  const rows = run.events.toReversed().map(([atS, round, what, slot, name]) => {
    const row = document.createElement("li");
    const when = atS === null ? "" : `${new Date(atS * 1000).toLocaleTimeString("en-GB")}, `;
    row.textContent = `${when}round ${grouped(round)}: ${slot === null ? what : `${name || `slot ${slot}`} ${what}`}`;
    return row;
  });
  if (!rows.length) {
    const row = document.createElement("li");
    row.className = "soft";
    row.textContent = "nobody yet";
    rows.push(row);
  }
  byId("events").replaceChildren(...rows);
}
