// Curves of position encodings against distance, as the library's parts compute them.
import { chart } from "../chart.js";
import { h, post, settled, show } from "../dom.js";
import { choice, powers, slider } from "./inspect_controls.js";

const KINDS = [
  ["rope", "RoPE", "Queries and keys are turned by their positions; a score depends on the distance alone. Slow pairs tell far from farther; a scaling slows them for texts longer than the trained ones."],
  ["sinusoidal", "Sinusoidal", "Sines and cosines are added to the embeddings once; the product of two of them depends on the distance."],
  ["alibi", "ALiBi", "Far keys cost more: a slope a head, nothing is trained."],
  ["t5", "T5", "Distances fall into buckets, exact when near and wider when far; each bucket has a trained number a head."],
];
const SCALINGS = [["none", "none"], ["linear", "linear (position interpolation)"], ["ntk", "NTK-aware"], ["dynamic-ntk", "dynamic NTK"], ["yarn", "YaRN"], ["llama3", "Llama 3"]];

export async function mount(root, facts, signal) {
  const change = settled(120, draw);
  const sayTokens = (v) => `${v} tokens`;
  const kit = {
    length: slider("Up to a distance of", powers(64, 131072), 4096, change, sayTokens),
    dim: slider("Features", [16, 32, 64, 128, 256], 64, change),
    base: slider("Base", [100, 1000, 10000, 100000, 500000, 1000000, 10000000], 10000, change, (v) => v.toLocaleString("en")),
    scaling: choice("Scaling", SCALINGS, "none", () => { lay(); change(); }),
    factor: slider("Stretched by", [1, 1.5, 2, 3, 4, 6, 8, 16, 32, 64], 8, change, (v) => `${v} ×`),
    original: slider("Trained length", powers(512, 32768), 2048, change, sayTokens),
    heads: slider("Heads", [1, 2, 4, 6, 8, 12, 16, 32], 8, change),
    buckets: slider("Buckets", [8, 16, 32, 64, 128], 32, change),
    max_distance: slider("Last bucket from", [128, 256, 512, 1024], 128, change, (v) => `distance ${v}`),
  };
  const used = { rope: ["length", "dim", "base", "scaling", "factor", "original"], sinusoidal: ["length", "dim", "base"], alibi: ["length", "heads"], t5: ["buckets", "max_distance"] };
  let kind = "rope", asked = null;
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Encoding" }, KINDS.map(([name, label]) =>
    h("button", { type: "button", dataset: { kind: name }, onclick: () => { kind = name; lay(); draw(); } }, label)));
  const what = h("p", { class: "meta" });
  const controls = h("div", { class: "choices" });
  const charts = h("div", { class: "panel charts", role: "status" });
  root.append(h("div", { class: "split turned" }, h("div", { class: "panel" }, chips, what, controls), charts));
  lay();
  await draw();

  function lay() {
    for (const chip of chips.children) chip.setAttribute("aria-pressed", String(chip.dataset.kind === kind));
    what.textContent = KINDS.find(([name]) => name === kind)[2];
    const plain = kit.scaling.value === "none";
    controls.replaceChildren(...used[kind].filter((name) => !(plain && (name === "factor" || name === "original"))).map((name) => kit[name].element));
  }

  async function draw() {
    asked?.abort();
    asked = new AbortController();
    signal.addEventListener("abort", () => asked.abort());
    const body = { kind, ...Object.fromEntries(used[kind].map((name) => [name, kit[name].value])) };
    try {
      const found = await post("/studio/api/inspect/curves", body, { signal: asked.signal });
      charts.replaceChildren(...found.charts.map((one) => h("section", {}, h("h3", {}, one.label), chart(one.series, one))));
    } catch (error) {
      show(error);
    }
  }
}
