// The receptive field of a backbone's layers: move over a layer's map, see what its unit sees of the picture.
import { duration, get, h, post, s, show } from "../dom.js";
import { choice } from "./inspect_controls.js";

const FIRST = "efficientnet-lite0";

export async function mount(root, facts, signal) {
  const model = choice("Network", facts.backbones.map((name) => [name, name]), facts.backbones.includes(FIRST) ? FIRST : facts.backbones[0], load);
  const layer = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Layer", oninput: () => select(Number(layer.value)) });
  const said = h("p", { class: "meta", role: "status" });
  const reading = h("p", { class: "number reading", role: "status" });
  const picture = s("svg", { class: "sheet", role: "img", "aria-label": "The picture, and what the unit sees of it" });
  const map = s("svg", { class: "sheet map", tabindex: 0, role: "application", "aria-label": "The layer's map. Arrow keys move over its units." });
  const names = [h("figcaption", {}), h("figcaption", {})];
  const body = h("tbody", {});
  const table = h("table", {}, h("thead", {}, h("tr", {}, ["layer", "operation", "map", "field", "stride", "offset"].map((name, i) => h("th", { class: i > 1 ? "number" : null }, name)))), body);
  root.append(
    h("div", { class: "panel" }, h("div", { class: "bar" }, model.element, h("label", { class: "field grow" }, "Layer, from the picture to the last map", layer)), said),
    h("div", { class: "pair" }, h("figure", {}, map, names[0]), h("figure", {}, picture, names[1])),
    reading,
    h("h2", {}, "Layers where the field changes"),
    h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Layers where the field changes" }, table));
  const state = { found: null, at: 0, unit: [0, 0], image: null, asked: null };
  get("/studio/api/vision/scene?number=3", { signal }).then((scene) => { state.image = scene.image; draw(); }, () => {});
  map.addEventListener("pointermove", (event) => point(event));
  map.addEventListener("pointerdown", (event) => point(event));
  map.addEventListener("keydown", move);
  load(); // the room is there before the network is traced

  async function load() {
    state.asked?.abort();
    const asked = new AbortController();
    state.asked = asked;
    signal.addEventListener("abort", () => asked.abort());
    said.textContent = `Tracing ${model.value}…`;
    root.setAttribute("aria-busy", "true");
    try {
      const found = await post("/studio/api/inspect/field", { model: model.value }, { signal: asked.signal });
      state.found = found;
      said.textContent = `${found.model} at ${found.side} × ${found.side} pixels, traced in ${duration(found.seconds)}. Sizes are those of a picture without borders.`
        + (found.unknown.length ? ` No rule for ${found.unknown.join(", ")}: the whole picture is assumed behind them.` : "");
      layer.max = found.layers.length - 1;
      body.replaceChildren(...found.layers.map(row));
      // The deepest layer that still sees clearly less than the picture: there is most to be seen.
      const near = found.layers.findLastIndex((one) => one.axes.every((axis) => axis.local <= 0.45 * found.side));
      select(Math.max(near, 0));
    } catch (error) {
      if (error.name !== "AbortError") said.textContent = "";
      show(error);
    } finally {
      if (state.asked === asked) root.removeAttribute("aria-busy");
    }
  }

  function row(one, i) {
    const [y] = one.axes;
    const size = y.size === "whole" ? (y.local ? `whole (near: ${y.local})` : "whole") : each(one, (axis) => axis.size);
    const pick = h("button", { class: "plain", type: "button", onclick: () => select(i) }, one.module);
    return h("tr", {}, h("td", {}, pick), h("td", {}, one.op), h("td", { class: "number" }, `${one.channels} × ${one.grid.join(" × ")}`),
      h("td", { class: "number" }, size), h("td", { class: "number" }, each(one, (axis) => axis.stride)), h("td", { class: "number" }, each(one, (axis) => axis.offset ?? "–")));
  }

  function select(i) {
    state.at = i;
    layer.value = i;
    const { module, grid } = state.found.layers[i];
    layer.setAttribute("aria-valuetext", module);
    state.unit = grid.map((n) => Math.floor((n - 1) / 2));
    [...body.children].forEach((tr, j) => tr.classList.toggle("here", i === j));
    draw();
  }

  function point(event) {
    if (!state.found) return;
    const box = map.getBoundingClientRect();
    const [high, wide] = state.found.layers[state.at].grid;
    state.unit = [Math.floor(((event.clientY - box.top) / box.height) * high), Math.floor(((event.clientX - box.left) / box.width) * wide)]
      .map((at, axis) => Math.max(0, Math.min(at, [high, wide][axis] - 1)));
    draw();
  }

  function move(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !state.found) return;
    event.preventDefault();
    const { grid } = state.found.layers[state.at];
    state.unit = state.unit.map((at, axis) => Math.max(0, Math.min(at + step[axis], grid[axis] - 1)));
    draw();
  }

  function draw() {
    if (!state.found) return;
    const { side, layers } = state.found;
    const one = layers[state.at];
    const [high, wide] = one.grid;
    const spans = one.axes.map((axis, i) => {
      const middle = axis.centre + 0.5 + axis.stride * state.unit[i];
      return [middle - axis.local / 2, middle + axis.local / 2];
    });
    const cell = 100 / Math.max(high, wide);
    map.setAttribute("viewBox", `0 0 ${wide * cell} ${high * cell}`);
    const lines = Math.max(high, wide) <= 56 ? [...Array(wide - 1).keys()].map((i) => s("line", { x1: (i + 1) * cell, x2: (i + 1) * cell, y1: 0, y2: high * cell }))
      .concat([...Array(high - 1).keys()].map((i) => s("line", { y1: (i + 1) * cell, y2: (i + 1) * cell, x1: 0, x2: wide * cell }))) : [];
    map.replaceChildren(s("g", { class: "mesh" }, lines),
      s("rect", { class: "unit", x: state.unit[1] * cell, y: state.unit[0] * cell, width: cell, height: cell }));
    // The frame shows what hangs over the border too, up to half a picture: there is only padding.
    const over = Math.min(side / 2, Math.max(0, -spans[0][0], -spans[1][0], spans[0][1] - side, spans[1][1] - side));
    picture.setAttribute("viewBox", `${-over} ${-over} ${side + 2 * over} ${side + 2 * over}`);
    const [[y1, y2], [x1, x2]] = spans;
    picture.replaceChildren(
      s("rect", { class: "page", width: side, height: side }),
      state.image && s("image", { href: state.image, width: side, height: side, preserveAspectRatio: "none" }),
      s("rect", { class: "seen", x: x1, y: y1, width: x2 - x1, height: y2 - y1 }));
    names[0].replaceChildren(h("b", {}, one.module), ` ${one.channels} × ${high} × ${wide}`);
    names[1].replaceChildren(`Picture of ${side} × ${side}${state.image ? ", a composed scene" : ""}`);
    const whole = one.axes.some((axis) => axis.size === "whole");
    reading.textContent = `Unit in row ${state.unit[0]}, column ${state.unit[1]} sees rows ${range(spans[0])} and columns ${range(spans[1])}: `
      + `${one.axes[0].local} × ${one.axes[1].local} pixels, ${one.axes[0].stride} pixels from one unit to the next.`
      + (whole ? " Through pooling of the whole map it also sees a little of everything." : "");
  }
}

const range = ([low, high]) => `${Math.ceil(low)} to ${Math.floor(high) - 1}`;

function each(one, f) {
  const [a, b] = one.axes.map(f);
  return a === b ? String(a) : `${a} × ${b}`;
}
