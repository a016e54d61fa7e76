// The Runs room: what was trained here, and a page of each run that grows with it.
import { chart } from "../chart.js";
import { command } from "../code.js";
import { duration, every, figure, get, h, when } from "../dom.js";

export let title = "Runs";
export const styles = ["runs.css"];
const PACE = 1500;
const SHOWN = 4; // curves beyond these are folded away
const FIRST = ["loss", "held_out_loss", "perplexity", "held_out_perplexity", "accuracy", "mean_iou"];
const ASIDE = new Set(["step", "event", "seconds"]);

/** Fill the room; with `rest`, the page of that run. */
export async function mount(root, { signal, rest }) {
  title = rest || "Runs";
  document.title = `${title} · Volvelle`;
  await (rest ? page(root, rest, signal) : list(root, signal));
}

async function list(root, signal) {
  const place = h("div");
  root.append(h("h1", {}, "Runs"), place);
  let shown = "";
  async function draw() {
    const { root: folder, runs } = await get("/studio/api/runs", { signal });
    if (shown === JSON.stringify(runs)) return;
    shown = JSON.stringify(runs);
    if (!runs.length) {
      place.replaceChildren(h("div", { class: "empty" }, h("h2", {}, "No runs yet"),
        h("p", {}, "Trainings leave a folder in ", h("code", {}, `${folder}/`), " each; this one makes a small segmenter from drawn scenes:"), command("volvelle train segment steps=20 batch=4 crop=96,96")));
      return;
    }
    const focused = place.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    place.replaceChildren(h("ul", { class: "runs" }, runs.map(row)));
    if (focused) place.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }
  await draw();
  every(4000, draw, signal);
}

function row(run) {
  const shown = figures(run.last).slice(0, 4);
  return h("li", { class: "panel run" },
    h("div", {}, h("h3", {}, h("a", { href: `#/runs/${encodeURIComponent(run.name)}` }, run.name)),
      h("p", { class: "meta" }, [run.kind, run.base, when(run.created)].filter(Boolean).join(" · "))),
    h("dl", { class: "last" }, run.last.step !== undefined && figureOf("step", run.last.step), shown.map(([name, v]) => figureOf(name, v))),
    status(run.status));
}

const figureOf = (name, v) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", { class: "number" }, figure(v)));
const status = (text) => h("span", { class: `badge ${{ finished: "held", running: "pending", failed: "failed", interrupted: "failed" }[text] ?? ""}` }, text);

/** Numbers of a record, those that people look for first. */
function figures(record) {
  const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return Object.entries(record).filter(([name, v]) => typeof v === "number" && !ASIDE.has(name)).sort((a, b) => place(a[0]) - place(b[0]));
}

async function page(root, name, signal) {
  const url = `/studio/api/runs/${encodeURIComponent(name)}`;
  let run = await get(url, { signal });
  const state = h("span", { role: "status" }, status(run.status));
  const told = h("p", { class: "meta" });
  const curves = h("div", { class: "curves" });
  const links = h("p", { class: "bar" });
  const gallery = h("div");
  const facts = h("div");
  root.append(h("p", { class: "meta" }, h("a", { href: "#/runs" }, "Runs")),
    h("div", { class: "head" }, h("div", {}, h("h1", {}, name), told), state), links, curves, gallery, facts);

  const lines = new Lines();
  const rest = () => {
    told.replaceChildren([run.kind, run.base && `from ${run.base}`, `begun ${when(run.created)}`, run.ended && `ended ${when(run.ended)}`].filter(Boolean).join(" · "));
    links.replaceChildren(run.report ? h("a", { class: "button primary", href: `${url}/report`, target: "_blank", rel: "noopener" }, "Open its report")
      : h("span", { class: "meta" }, "The report comes with the end of the run."));
    gallery.replaceChildren(...pictures(run, url), ...samples(run.samples));
    facts.replaceChildren(settings("Configuration", run.config), settings("Environment", run.environment ?? {}),
      h("h2", {}, "Go on"), ...next(run).map(command));
  };
  rest();

  let pinned = false;
  curves.addEventListener("pointerenter", () => { pinned = true; });
  curves.addEventListener("pointerleave", () => { pinned = false; });
  async function grow() {
    const found = await get(`${url}/metrics?offset=${lines.offset}`, { signal });
    const grew = lines.add(found);
    if (found.status !== run.status) {
      run = await get(url, { signal });
      state.replaceChildren(status(run.status));
      rest();
    }
    if (grew && !(pinned && curves.childElementCount)) curves.replaceChildren(...lines.draw());
    return found.records.length > 0;
  }
  while (await grow()); // all that is there, piece by piece
  if (!curves.childElementCount) curves.replaceChildren(...lines.draw());
  every(PACE, async () => {
    if (run.status === "running" || lines.steps === 0) await grow();
  }, signal);
}

/** The verbs that take this run. */
function next(run) {
  if (run.status === "interrupted") return [`volvelle resume ${run.folder}`];
  const use = { classify: "predict {} PICTURE", segment: "predict {} PICTURE", detect: "predict {} PICTURE", promptable: "predict {} PICTURE points=60,60",
    gan: "generate {} count=4 out=drawn.png", prior: "generate {} count=4 out=drawn.png", language: 'generate {} "Once"', adapt: 'generate {} "Once"' };
  return [use[run.kind], "eval {} data=PATH"].filter(Boolean).map((words) => `volvelle ${words.replace("{}", run.folder)}`);
}

/** The curves of metrics.jsonl, as far as it was read. */
class Lines {
  offset = 0;
  steps = 0;
  series = new Map();
  unfolded = false;

  /** Take what the server read; true when there is something new to draw. */
  add({ records, offset, began }) {
    if (began < this.offset) this.series.clear(); // the file was written anew
    this.offset = offset;
    for (const record of records) {
      this.steps += 1;
      const x = record.step ?? this.steps;
      for (const [name, v] of Object.entries(record)) {
        if (ASIDE.has(name) || !(typeof v === "number" || v === "NaN")) continue;
        if (!this.series.has(name)) this.series.set(name, []);
        this.series.get(name).push([x, v === "NaN" ? NaN : v]);
      }
    }
    return records.length > 0;
  }

  /** One figure a quantity: what was trained on and what was held out together. The first few stand open. */
  draw() {
    const groups = new Map();
    for (const name of this.series.keys()) {
      const base = name.replace(/^held_out_/, "");
      groups.set(base, [...(groups.get(base) ?? []), name]);
    }
    const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
    if (!groups.size) return [h("p", { class: "meta" }, "Nothing is logged yet.")];
    const drawn = [...groups].sort((a, b) => place(a[0]) - place(b[0])).map(([base, names]) => h("section", { class: "panel" },
      h("h3", {}, base.replaceAll("_", " ")),
      chart(names.map((name) => ({ name: name.replaceAll("_", " "), points: thin(this.series.get(name)) })), { label: `${base} by step`, x: "step", height: 210, legend: names.length > 1 })));
    if (drawn.length <= SHOWN + 2) return drawn;
    return [...drawn.slice(0, SHOWN), h("details", { class: "more", open: this.unfolded, ontoggle: (event) => { this.unfolded = event.target.open; } },
      h("summary", {}, `${drawn.length - SHOWN} more curves`), h("div", { class: "curves" }, drawn.slice(SHOWN)))];
  }
}

/** At most 600 points: more than a screen has dots. */
function thin(points) {
  const every = Math.ceil(points.length / 600);
  return every === 1 ? points : points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

function pictures(run, url) {
  if (!run.pictures.length) return [];
  return [h("h2", {}, "Pictures"), h("div", { class: "gallery" }, run.pictures.map((file, i) => h("figure", {},
    h("a", { href: `${url}/pictures/${i}`, target: "_blank", rel: "noopener" }, h("img", { src: `${url}/pictures/${i}`, alt: file, loading: "lazy" })),
    h("figcaption", { class: "meta" }, file))))];
}

function samples(found) {
  if (!Array.isArray(found) || !found.length) return [];
  return [h("h2", {}, "Samples"), ...found.slice(0, 8).map((one) => h("div", { class: "panel" }, h("dl", { class: "facts" },
    ["prompt", "before", "after"].filter((key) => one[key]).map((key) => [h("dt", {}, key), h("dd", { class: "said" }, String(one[key]))]))))];
}

function settings(name, given) {
  const flat = (object, before = "") => Object.entries(object).flatMap(([key, v]) =>
    (v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${before}${key}.`) : [[before + key, v]]));
  const text = (v) => (v === null || v === undefined ? "–" : Array.isArray(v) ? v.join(" ") : String(v));
  return h("details", { class: "panel" }, h("summary", {}, name), h("dl", { class: "facts" },
    flat(given).map(([key, v]) => [h("dt", {}, key), h("dd", {}, key === "seconds" ? duration(v) : text(v))])));
}
