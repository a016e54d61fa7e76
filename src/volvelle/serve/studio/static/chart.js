// A small line chart in SVG: axes with round ticks, a legend, a reading under the pointer.
import { figure, h, s } from "./dom.js";

const LEFT = 56, RIGHT = 12, TOP = 10, FOOT = 34;

/** Round steps that cut [low, high] into at most `most` pieces. */
export function ticks(low, high, most = 5) {
  const rough = (high - low) / most || 1;
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * ten).find((one) => one >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/**
 * A figure of curves. `series`: [{name, points: [[x, y], …], dashed?}]; points that are no numbers break the curve.
 * Options: label (what is shown, for those who cannot see it), x and y (names of the axes), log (y in decades), height,
 * low and high (bounds of y), legend (true). It is drawn for the width that it is given, anew when that changes.
 */
export function chart(series, { label, x = "", y = "", log = false, height = 240, low, high, legend = true } = {}) {
  const up = log ? (v) => Math.log10(v) : (v) => v;
  const good = ([a, b]) => Number.isFinite(a) && Number.isFinite(up(b));
  const all = series.flatMap((one) => one.points.filter(good));
  if (!all.length) return h("p", { class: "meta" }, "No figures yet.");
  const bound = log ? (v) => (v === undefined ? undefined : Math.log10(v)) : (v) => v;
  const axes = { x: span(all.map((p) => p[0])), y: span(all.map((p) => up(p[1])), bound(low), bound(high)) };
  const reading = h("output", { class: "meta number" });
  const place = h("div", { class: "plot" });
  const names = legend && h("div", { class: "legend" },
    series.map((one, i) => h("span", {}, h("i", { style: { background: colour(i) } }), one.name)));
  const draw = (width) => place.replaceChildren(plot(series, { label, x, y, log, height, width, up, good, all, axes, reading }));
  new ResizeObserver(([entry]) => draw(Math.max(200, Math.round(entry.contentRect.width)))).observe(place);
  draw(640);
  return h("figure", { class: "chart" }, place, h("figcaption", {}, names, reading));
}

function span(values, low, high) {
  let a = low ?? Infinity, b = high ?? -Infinity;
  for (const v of values) {
    if (low === undefined) a = Math.min(a, v);
    if (high === undefined) b = Math.max(b, v);
  }
  return a === b ? [a - (Math.abs(a) * 0.05 || 0.5), b + (Math.abs(b) * 0.05 || 0.5)] : [a, b];
}

function plot(series, { label, x, y, log, height, width, up, good, all, axes, reading }) {
  const [x0, x1] = axes.x, [y0, y1] = axes.y;
  const px = (v) => LEFT + ((v - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const py = (v) => height - FOOT - ((up(v) - y0) / (y1 - y0)) * (height - FOOT - TOP);
  const whole = all.every((p) => Number.isInteger(p[0])); // steps have no halves
  const axis = s("g", { class: "axis" },
    (log ? decades(y0, y1) : ticks(y0, y1)).map((v) => s("g", {}, s("line", { x1: LEFT, x2: width - RIGHT, y1: py(v), y2: py(v) }),
      s("text", { x: LEFT - 8, y: py(v) + 4, "text-anchor": "end" }, figure(v)))),
    ticks(x0, x1, Math.max(2, width / 90)).filter((v) => !whole || Number.isInteger(v)).map((v) => s("text", { x: px(v), y: height - FOOT + 17, "text-anchor": "middle" }, figure(v))),
    s("line", { class: "base", x1: LEFT, x2: width - RIGHT, y1: height - FOOT, y2: height - FOOT }),
    x && s("text", { x: width - RIGHT, y: height - 3, "text-anchor": "end", class: "name" }, x),
    y && s("text", { x: LEFT, y: height - 3, class: "name" }, y));
  const curves = series.map((one, i) => s("path", { class: "curve", d: path(one.points, good, px, py), style: { stroke: colour(i) },
    "stroke-dasharray": one.dashed ? "5 4" : null }));
  const lone = series.map((one, i) => one.points.filter(good).length === 1
    && s("circle", { cx: px(one.points.find(good)[0]), cy: py(one.points.find(good)[1]), r: 3, style: { fill: colour(i) } }));
  const rule = s("line", { class: "rule", y1: TOP, y2: height - FOOT, visibility: "hidden" });
  const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label ?? (y || "a line chart") }, axis, curves, lone, rule);
  drawing.addEventListener("pointermove", (event) => {
    const at = x0 + ((event.clientX - drawing.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    const near = all.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a))[0];
    for (const end of ["x1", "x2"]) rule.setAttribute(end, px(near));
    rule.setAttribute("visibility", "visible");
    const told = series.map((one) => [one.name, one.points.find((p) => p[0] === near)]).filter(([, p]) => p && good(p));
    reading.replaceChildren(`${x || "x"} ${figure(near)}: ${told.map(([name, p]) => `${name} ${figure(p[1])}`).join(" · ")}`);
  });
  drawing.addEventListener("pointerleave", () => {
    rule.setAttribute("visibility", "hidden");
    reading.replaceChildren();
  });
  return drawing;
}

/** The colour of the i-th curve, as a value for style. */
export function colour(i) {
  return `var(--c${i % 6})`;
}

function decades(low, high) {
  const found = ticks(low, high, 5).filter(Number.isInteger).map((v) => 10 ** v);
  return found.length > 1 ? found : ticks(low, high, 4).map((v) => Number((10 ** v).toPrecision(2)));
}

function path(points, good, px, py) {
  let d = "", pen = "M";
  for (const point of points) {
    if (!good(point)) {
      pen = "M";
      continue;
    }
    d += `${pen}${px(point[0]).toFixed(1)} ${py(point[1]).toFixed(1)}`;
    pen = "L";
  }
  return d;
}
