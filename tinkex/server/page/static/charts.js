// Curves of metrics over steps, as SVG: one chart per metric, losses of both kinds in one.

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 640, NARROW = 320, HEIGHT = 200, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;
const NOT_DRAWN = new Set(["step", "time"]);
const FIRST = ["loss", "eval_loss", "tokens_per_second", "learning_rate"];

export function drawCharts(place, points) {
  const names = [...new Set(points.flatMap(Object.keys))].filter((name) => !NOT_DRAWN.has(name));
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const charts = [];
  for (const name of names) {
    if (name === "eval_loss" && names.includes("loss")) continue;
    const second = name === "loss" && names.includes("eval_loss") ? ["eval_loss"] : [];
    charts.push(chart([name, ...second], points, charts.length === 0));
  }
  place.replaceChildren(...charts);
}

function rank(name) {
  const found = FIRST.indexOf(name);
  return found < 0 ? FIRST.length : found;
}

function chart(names, points, wide) {
  const width = wide ? WIDE : NARROW;
  const curves = names.map((name) => points
    .map((point, i) => [point.step ?? i + 1, point[name]])
    .filter(([, value]) => value !== undefined));
  const all = curves.flat();
  const [x0, x1] = range(all.map(([x]) => x)), [y0, y1] = padded(range(all.map(([, y]) => y)));
  const x = (value) => LEFT + (value - x0) / (x1 - x0 || 1) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - y0) / (y1 - y0 || 1) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  const figure = document.createElement("figure");
  figure.classList.toggle("wide", wide);
  figure.dataset.metric = names[0];
  const caption = document.createElement("figcaption");
  const told = [];
  for (const [i, curve] of curves.entries()) {
    const label = names[i].replaceAll("_", " ");
    const [step, value] = curve.at(-1);
    told.push(`${label}: ${number(curve[0][1])} at step ${curve[0][0]}, ${number(value)} at step ${step}`);
    const name = document.createElement("span");
    name.textContent = label;
    const now = document.createElement("span");
    now.className = "value";
    now.textContent = number(value);
    caption.append(name, now);
  }
  const description = shape("title");
  description.textContent = told.join("; ");
  svg.append(description);
  for (const part of [0, 0.5, 1]) {
    const value = y0 + (y1 - y0) * part;
    svg.append(shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      text(number(value), LEFT - 6, y(value) + 4, "end"));
  }
  svg.append(text(String(x0), LEFT, HEIGHT - 6, "start"), text(`step ${x1}`, width - RIGHT, HEIGHT - 6, "end"));
  for (const [i, curve] of curves.entries()) {
    const kind = i ? "second" : "first";
    const path = curve.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    svg.append(shape("polyline", { class: `curve ${kind}`, points: path }));
    const [step, value] = curve.at(-1);
    svg.append(shape("line", { class: `dot ${kind}`, x1: x(step), x2: x(step), y1: y(value), y2: y(value) }));
  }
  figure.append(caption, svg);
  return figure;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

function padded([low, high]) {
  const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
}

function number(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function shape(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(content, x, y, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}
