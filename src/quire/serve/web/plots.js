// The two plots: tokens per second over time, and the roofline with where the engine is.

import { draw, short } from "./page.js";

const LEFT = 52;
const BOTTOM = 24;
const TOP = 10;

function size(svg) {
  const { width, height } = svg.viewBox.baseVal;
  return { width, height, right: width - 10, floor: height - BOTTOM };
}

/** The next of 1, 2, 5, 10, ... that is not below a value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function label(x, y, text, anchor = "end") {
  return draw("text", { x, y, "text-anchor": anchor, class: "tick" }, text);
}

/** Generated tokens as a line, prompt tokens as an area behind it. */
export function drawRates(svg, text, points, span) {
  const { right, floor } = size(svg);
  const now = points.at(-1)?.at ?? 0;
  const most = roundUp(Math.max(1, ...points.map((point) => Math.max(point.generated, point.prompt))));
  const x = (point) => right - ((now - point.at) / span) * (right - LEFT);
  const y = (value) => floor - (value / most) * (floor - TOP);
  const parts = [draw("line", { x1: LEFT, y1: floor, x2: right, y2: floor, class: "axis" })];
  for (const value of [0, most / 2, most]) parts.push(label(LEFT - 6, y(value) + 4, short(value)));
  parts.push(label(LEFT, floor + 16, "2 min ago", "start"), label(right, floor + 16, "now"));
  if (points.length > 1) {
    const path = (name) => points.map((point) => `${x(point).toFixed(1)},${y(point[name]).toFixed(1)}`).join(" ");
    const area = `${x(points[0])},${floor} ${path("prompt")} ${x(points.at(-1))},${floor}`;
    parts.push(draw("polygon", { points: area, class: "prompt" }));
    parts.push(draw("polyline", { points: path("generated"), class: "generated" }));
  }
  svg.replaceChildren(...parts);
  const latest = points.at(-1);
  text.textContent = latest
    ? `Line: ${short(latest.generated)} generated a second now. Area: ${short(latest.prompt)} of prompts.`
    : "";
}

/** What the machine allows at best for each number of requests at once, and what was seen. */
export function drawRoofline(svg, text, ceiling, points) {
  if (!ceiling) {
    svg.replaceChildren();
    text.textContent = "The machine is measured when the engine has a free moment.";
    return;
  }
  const { right, floor } = size(svg);
  const allowed = (rows) =>
    rows / Math.max(ceiling.read_bytes / ceiling.bandwidth, (2 * ceiling.active_weights * rows) / ceiling.flops);
  const mostRows = 512;
  const top = allowed(mostRows) * 1.5;
  const bottom = Math.min(1, allowed(1) / 20);
  const x = (rows) => LEFT + (Math.log(rows) / Math.log(mostRows)) * (right - LEFT);
  const y = (rate) => {
    const share = Math.log(Math.max(rate, bottom) / bottom) / Math.log(top / bottom);
    return floor - share * (floor - TOP);
  };
  const parts = [draw("line", { x1: LEFT, y1: floor, x2: right, y2: floor, class: "axis" })];
  for (const rows of [1, 4, 16, 64, 256]) parts.push(label(x(rows), floor + 16, String(rows), "middle"));
  for (let rate = 10 ** Math.ceil(Math.log10(bottom)); rate < top; rate *= 10) {
    parts.push(label(LEFT - 6, y(rate) + 4, short(rate)));
    parts.push(draw("line", { x1: LEFT, y1: y(rate), x2: right, y2: y(rate), class: "grid" }));
  }
  const roof = Array.from({ length: 40 }, (_, index) => mostRows ** (index / 39));
  const line = roof.map((rows) => `${x(rows).toFixed(1)},${y(allowed(rows)).toFixed(1)}`).join(" ");
  parts.push(draw("polyline", { points: line, class: "roof" }));
  const seen = points.filter((point) => point.rows >= 1 && point.generated > 0);
  for (const point of seen) {
    parts.push(draw("circle", { cx: x(point.rows), cy: y(point.generated), r: 3, class: "seen" }));
  }
  const latest = points.at(-1);
  const now = latest && latest.rows >= 1 && latest.generated > 0 ? latest : null;
  if (now) parts.push(draw("circle", { cx: x(now.rows), cy: y(now.generated), r: 6, class: "now" }));
  svg.replaceChildren(...parts);
  const limits = `${short(ceiling.bandwidth / 1e9)} GB/s and ${short(ceiling.flops / 1e9)} GFLOP/s were measured here.`;
  text.textContent = now
    ? `${short(now.generated)} tokens/s for ${now.rows} at once: ${Math.round((100 * now.generated) / allowed(now.rows))} % of ${short(allowed(now.rows))}. ${limits}`
    : `At best ${short(allowed(1))} tokens/s for one request, ${short(allowed(64))} for 64. ${limits}`;
}
