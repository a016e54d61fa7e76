// An all-reduce between processes of this machine, as it happened: who sent what, step by step, with bytes and times.
import { figure, h, post, s, show } from "../dom.js";
import { bytes, choice, powers, slider } from "./inspect_controls.js";

const WORDS = {
  ring: "Each rank sends one block to its right neighbour, again and again: every rank sends 2 (p − 1) V / p bytes, however many ranks there are.",
  "halving-doubling": "Partners exchange halves, then quarters, and all of it back: few rounds, the bytes of the ring where p is a power of two.",
  "recursive-doubling": "Partners exchange everything, log₂ p times: the fewest rounds, more bytes; for short vectors.",
  tree: "Sums go up a tree and the result comes down: the root's neighbours carry the most.",
  star: "All send to one, which answers all: the simplest, and the one does all the work.",
};
const SPEED = 900; // ms a step
const still = matchMedia("(prefers-reduced-motion: reduce)");

export async function mount(root, facts, signal) {
  const algorithm = choice("Algorithm", facts.algorithms.map((name) => [name, name]), "ring", () => { what.textContent = WORDS[algorithm.value]; });
  const ranks = slider("Ranks (processes)", [2, 3, 4, 5, 6, 7, 8], 4);
  const size = slider("Vector on each rank", powers(4, 1024), 64, null, (v) => `${v} KiB`);
  const what = h("p", { class: "meta" }, WORDS.ring);
  const run = h("button", { class: "primary", type: "button", onclick: trace }, "Run it");
  const said = h("p", { class: "meta", role: "status" }, "The ranks are processes of this machine; what is drawn is what they sent.");
  const wheel = s("svg", { class: "ring", viewBox: "-50 -50 100 100", role: "img", "aria-label": "Ranks on a circle and the messages between them" });
  const play = h("button", { type: "button", disabled: true, onclick: () => (state.playing ? pause() : start()) }, "Play");
  const back = h("button", { type: "button", disabled: true, onclick: () => go(-1) }, "Step back");
  const next = h("button", { type: "button", disabled: true, onclick: () => go(1) }, "Step");
  const counter = h("output", { class: "number" });
  const step = h("p", { class: "number", role: "status" });
  const table = h("div", { class: "scroll" });
  const times = h("div", {});
  root.append(h("div", { class: "split turned" },
    h("div", {}, h("form", { class: "panel choices", onsubmit: (event) => event.preventDefault() }, algorithm.element, what, ranks.element, size.element, h("div", { class: "bar" }, run), said), table),
    h("div", { class: "panel" }, wheel, h("div", { class: "bar player" }, back, play, next, counter), step, times)));
  const state = { trace: null, at: 0, playing: false, frame: 0, began: 0 };
  signal.addEventListener("abort", pause);
  draw();

  async function trace() {
    pause();
    run.disabled = true;
    said.textContent = `Running it on ${ranks.value} processes…`;
    try {
      state.trace = await post("/studio/api/inspect/trace", { algorithm: algorithm.value, ranks: ranks.value, kilobytes: size.value }, { signal });
      state.at = 0;
      const { right, messages, steps } = state.trace;
      said.textContent = `${messages.length} messages in ${steps} steps; ${right ? "every rank ended with the sum" : "a rank ended with a WRONG sum"}.`;
      for (const one of [play, back, next]) one.disabled = false;
      told();
      start();
    } catch (error) {
      said.textContent = "";
      show(error);
    } finally {
      run.disabled = false;
    }
  }

  function start() {
    if (state.at >= state.trace.steps) state.at = 0;
    state.playing = true;
    play.textContent = "Pause";
    state.began = performance.now() - (state.at % 1) * SPEED - Math.floor(state.at) * SPEED;
    const tick = (now) => {
      if (!state.playing) return;
      state.at = Math.min((now - state.began) / SPEED, state.trace.steps);
      draw();
      if (state.at >= state.trace.steps) return pause();
      state.frame = requestAnimationFrame(tick);
    };
    state.frame = requestAnimationFrame(tick);
  }

  function pause() {
    state.playing = false;
    cancelAnimationFrame(state.frame);
    play.textContent = "Play";
  }

  function go(by) {
    pause();
    const whole = by > 0 ? Math.floor(state.at) + 1 : Math.ceil(state.at) - 1;
    state.at = Math.max(0, Math.min(whole, state.trace.steps));
    draw();
  }

  function draw() {
    const p = state.trace?.ranks ?? ranks.value;
    const places = [...Array(p).keys()].map((r) => [36 * Math.sin((2 * Math.PI * r) / p), -36 * Math.cos((2 * Math.PI * r) / p)]);
    const messages = state.trace?.messages ?? [];
    const now = Math.min(Math.floor(state.at), (state.trace?.steps ?? 1) - 1);
    const done = state.at >= (state.trace?.steps ?? Infinity);
    const part = done ? 1 : still.matches ? 0.5 : state.at - now;
    const ways = new Set(messages.map((m) => `${m.source} ${m.target}`));
    const sent = Array(p).fill(0);
    for (const m of messages) sent[m.source] += m.size * (m.step < now || done ? 1 : m.step === now ? part : 0);
    const most = Math.max(...(state.trace?.sent ?? [1]));
    const live = state.trace && !done ? messages.filter((m) => m.step === now) : [];
    wheel.replaceChildren(
      s("g", {}, [...ways].map((way) => s("path", { class: "way", d: bow(...way.split(" ").map((r) => places[r])) }))),
      s("g", {}, live.map((m) => parcel(places[m.source], places[m.target], part, m.size / Math.max(...messages.map((one) => one.size))))),
      s("g", {}, places.map(([x, y], r) => s("g", { class: "rank", transform: `translate(${x} ${y})` },
        s("circle", { r: 8.6 }), s("circle", { class: "filled", r: 8.6, transform: "rotate(-90)", pathLength: 100, "stroke-dasharray": `${(100 * sent[r]) / most} 100`, visibility: sent[r] ? "visible" : "hidden" }),
        s("text", { y: 0.4 }, r), s("text", { class: "size", y: 4.3 }, sent[r] ? bytes(sent[r]) : "")))));
    if (!state.trace) return;
    counter.textContent = done ? `all ${state.trace.steps} steps` : `step ${now + 1} of ${state.trace.steps}`;
    const line = live.map((m) => `${m.source} → ${m.target} ${bytes(m.size)}`).join("   ");
    step.textContent = done ? "Every rank has the sum." : line;
    for (const rect of times.querySelectorAll("rect")) rect.classList.toggle("now", !done && Number(rect.dataset.step) === now);
  }

  function told() {
    const { algorithm: name, ranks: p, size: v, sent, formula, messages } = state.trace;
    const total = sent.reduce((a, b) => a + b, 0);
    const each = name === "ring" ? (2 * (p - 1) * v) / p : null;
    table.replaceChildren(h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, "rank"), h("th", { class: "number" }, "bytes sent"), h("th", { class: "number" }, each ? "2 (p − 1) V / p" : "formula"))),
      h("tbody", {}, sent.map((value, r) => h("tr", {}, h("td", {}, r), h("td", { class: "number" }, value.toLocaleString("en")), h("td", { class: "number" }, each ? each.toLocaleString("en") : ""))),
        h("tr", {}, h("td", {}, "together"), h("td", { class: "number" }, total.toLocaleString("en")), h("td", { class: "number" }, formula.total.toLocaleString("en"))))),
      h("p", {}, h("span", { class: `badge ${total === formula.total ? "held" : "failed"}` }, total === formula.total ? "as the formula says" : "not what the formula says")));
    const last = Math.max(...messages.map((m) => m.arrived)) || 1e-6;
    const wide = 600, high = 14;
    times.replaceChildren(h("h3", {}, "When messages were under way"), s("svg", { class: "times", viewBox: `0 0 ${wide + 44} ${p * high + 18}`, role: "img", "aria-label": `Messages of each rank over ${figure(last * 1000)} ms` },
      [...Array(p).keys()].map((r) => s("g", {}, s("text", { x: 0, y: r * high + 10 }, `rank ${r}`), s("line", { x1: 40, x2: wide + 44, y1: r * high + high - 1, y2: r * high + high - 1 }))),
      messages.map((m) => s("rect", { x: 40 + (m.left / last) * wide, y: m.source * high + 2, width: Math.max(1, ((m.arrived - m.left) / last) * wide), height: high - 5, dataset: { step: m.step } })),
      s("text", { x: 40, y: p * high + 14 }, "0"), s("text", { x: wide + 44, y: p * high + 14, "text-anchor": "end" }, `${figure(last * 1000)} ms`)));
    draw();
  }
}

/** A way between two ranks that bends to the middle, so that both directions can be seen. */
function bow([x1, y1], [x2, y2]) {
  const [cx, cy] = bend([x1, y1], [x2, y2]);
  return `M${x1} ${y1}Q${cx} ${cy} ${x2} ${y2}`;
}

function bend([x1, y1], [x2, y2]) {
  return [(x1 + x2) / 2 + (y2 - y1) * 0.14, (y1 + y2) / 2 - (x2 - x1) * 0.14];
}

function parcel(from, to, part, share) {
  const [cx, cy] = bend(from, to);
  const at = (t) => [0, 1].map((i) => (1 - t) ** 2 * from[i] + 2 * t * (1 - t) * [cx, cy][i] + t ** 2 * to[i]);
  // What moves can be seen only between the ranks' circles.
  const t = 0.16 + 0.68 * (part * part * (3 - 2 * part));
  const [x, y] = at(t);
  return s("circle", { class: "parcel", cx: x, cy: y, r: 1.2 + 1.6 * Math.sqrt(share) });
}
