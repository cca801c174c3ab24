// Plots as SVG elements. They know numbers and labels, nothing of a run.

const SPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 200, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;
const NARROWEST = 260, RINGS_MAX = 40;

export function element(name, attributes = {}, text = null) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

/** Return about `count` round numbers from `low` to `high`. */
export function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function scale(low, high, from, to) {
  const width = high - low || 1;
  return (value) => from + ((value - low) / width) * (to - from);
}

function frame(label, xs, ys, wide) {
  const width = Math.max(wide, NARROWEST);
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label });
  const x = scale(xs[0], xs[1], LEFT, width - RIGHT), y = scale(ys[0], ys[1], HEIGHT - BOTTOM, TOP);
  for (const value of ticks(ys[0], ys[1], 4)) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(xs[0], xs[1], 5)) {
    if (Number.isInteger(value)) svg.append(element("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, short(value)));
  }
  svg.append(element("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  return { svg, x, y };
}

function span(values, isFromZero) {
  let low = Math.min(...values), high = Math.max(...values);
  if (isFromZero) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  return [isFromZero ? 0 : low - room, high + room];
}

/**
 * Draw a line and, as rings, single points over rounds.
 * line, rings: lists of [round, value]; label: what a person hears who does not see it; wide: of the place, in pixels.
 */
export function curve(label, wide, line, rings = [], isFromZero = false) {
  const all = [...line, ...rings];
  if (!all.length) return nothing();
  const xs = [Math.min(...all.map(([round]) => round)), Math.max(...all.map(([round]) => round), 1)];
  const { svg, x, y } = frame(label, xs, span(all.map(([, value]) => value), isFromZero), wide);
  const points = line.map(([round, value]) => `${x(round).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  if (line.length) svg.append(element("polyline", { class: "line", points }));
  const gap = Math.ceil(rings.length / RINGS_MAX);
  const shown = rings.filter((_, index) => (rings.length - 1 - index) % gap === 0);
  for (const [round, value] of shown) svg.append(element("circle", { class: "ring", cx: x(round), cy: y(value), r: 3.5 }));
  return svg;
}

/** Draw one bar for each of the newest rounds: bars = [{round, value, isFull, text}], at most `most`. */
export function bars(label, wide, rows, most) {
  if (!rows.length) return nothing();
  const width = Math.max(wide, NARROWEST), height = 120;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const hatch = element("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  hatch.append(element("line", { class: "hatch", x1: 0, y1: 0, x2: 0, y2: 6 }));
  svg.append(element("defs", {}));
  svg.firstChild.append(hatch);
  const high = Math.max(...rows.map((row) => row.value ?? 0)) || 1;
  const step = (width - LEFT) / most;
  svg.append(element("text", { x: LEFT - 6, y: 14, "text-anchor": "end" }, `${short(high)} s`));
  rows.forEach((row, index) => {
    const tall = Math.max(2, ((row.value ?? 0) / high) * (height - 30));
    const bar = element("rect", { class: row.isFull ? "full" : "part", x: LEFT + index * step + 1, y: height - 20 - tall, width: Math.max(step - 2, 1), height: tall, rx: 1 });
    bar.append(element("title", {}, row.text));
    svg.append(bar);
  });
  for (const index of [0, rows.length - 1]) {
    if (index > 0 && rows.length < 8) continue;
    svg.append(element("text", { x: LEFT + index * step + step / 2, y: height - 5, "text-anchor": index ? "end" : "start" }, `round ${rows[index].round}`));
  }
  return svg;
}

function nothing() {
  const paragraph = document.createElement("p");
  paragraph.className = "soft small";
  paragraph.textContent = "nothing yet";
  return paragraph;
}
