// The Claims room: what every claim was found to be, and a button that measures it again.
import { duration, get, h, post, renew, settled, show, when } from "../dom.js";
import { badge, origin, value, verdictClass } from "../verdict.js";
import { followJob } from "./job.js";

export const title = "Claims";
export const styles = ["claims.css"];
const STATES = [["", "all"], ["held", "held"], ["failed", "not held"], ["pending", "not measurable here"], ["none", "not measured"]];

/** Fill the room. */
export async function mount(root, { signal, query }) {
  const state = { q: query.get("q") ?? "", verdict: query.get("verdict") ?? "" };
  let claims = [];
  const followed = new Set();
  const search = h("input", { type: "search", id: "search", placeholder: "Search claims", value: state.q, autocomplete: "off",
    oninput: settled(120, () => { state.q = search.value; draw(); }) });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Verdict" });
  const said = h("p", { class: "meta" });
  const work = h("div", { role: "region", "aria-label": "Measurements under way" });
  const rows = h("tbody");

  async function load() {
    const found = await get("/studio/api/claims", { signal });
    claims = found.claims;
    for (const one of claims) {
      one.mark = verdictClass(one.found);
      one.text = [one.name, one.title, one.family, one.paper, one.sentence].join(" ").toLowerCase();
      if (one.job) follow(one.job);
    }
    said.replaceChildren(`This machine: ${found.machine.processor}, ${found.machine.cores} cores. New measurements go to `, h("code", {}, `${found.results}/`), ".");
    draw();
  }

  function draw() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const near = claims.filter((one) => words.every((word) => one.text.includes(word)));
    const kept = new URLSearchParams(Object.entries(state).filter(([, v]) => v));
    history.replaceState(null, "", `#/claims${kept.size ? `?${kept}` : ""}`);
    renew(chips, STATES.map(([mark, name]) => h("button", { type: "button", "aria-pressed": String(state.verdict === mark),
      onclick: () => { state.verdict = mark; draw(); } }, name, h("small", {}, mark ? near.filter((one) => one.mark === mark).length : near.length))));
    const shown = near.filter((one) => !state.verdict || one.mark === state.verdict);
    rows.replaceChildren(...(shown.length ? shown.map(row) : [h("tr", {}, h("td", { colspan: 5, class: "meta" }, "No claim fits."))]));
  }

  function row(one) {
    const { found, declared, job } = one;
    const again = (budget) => h("button", { type: "button", class: "plain", disabled: Boolean(job),
      "aria-label": `Measure ${one.name}, ${budget}, at most ${duration(declared[budget])}`, title: `at most ${duration(declared[budget])}`,
      onclick: () => measure(one, budget) }, budget);
    return h("tr", { dataset: { claim: one.name } },
      h("td", { class: "what" }, h("a", { href: `#/technique/${one.name}` }, one.title), h("p", { class: "sentence" }, `“${brief(one.sentence)}”`), h("p", { class: "meta" }, one.paper)),
      h("td", { class: "figure" }, found?.main ? [h("span", { class: "number" }, value(found.main)), h("p", { class: "meta" }, found.main.what,
        found.main.bound && `, expected ${found.main.bound}`)] : found?.why && h("p", { class: "meta" }, found.why)),
      h("td", {}, badge(found)),
      h("td", { class: "when" }, found && [h("span", { class: "number" }, duration(found.seconds)), h("p", { class: "meta" }, `${found.budget}, ${when(found.measured)}`),
        h("p", { class: "meta", title: origin(found) }, found.here ? "this machine" : `another machine: ${found.machine.processor}`)]),
      h("td", { class: "again" }, job ? h("span", { class: "badge pending" }, job.state) : [Object.keys(declared).map(again), h("p", { class: "meta" }, found ? "measure again" : "measure it")]));
  }

  async function measure(one, budget) {
    try {
      one.job = await post(`/studio/api/claims/${one.name}/measure`, { budget }, { signal });
      draw();
      follow(one.job);
    } catch (error) {
      show(error);
    }
  }

  async function follow(job) {
    if (followed.has(job.number)) return;
    followed.add(job.number);
    const panel = h("section", { class: "panel" }, h("h3", {}, job.title));
    work.append(panel);
    try {
      const end = await followJob(job.number, panel, signal);
      // The verb's exit code is 1 for a claim that does not hold: that is an answer, not a failure.
      const found = end.state === "failed" && end.code === 1 ? "it did not hold" : end.state;
      if (end.state === "finished") panel.remove();
      else panel.append(h("div", { class: "bar" }, h("p", {}, found), h("button", { type: "button", onclick: () => panel.remove() }, "Close")));
      await load();
    } catch (error) {
      show(error);
    }
  }

  root.append(
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Claims"),
      h("p", { class: "lead" }, "A sentence from a paper, and whether it held where it was measured. One that does not hold is shown as not held."))),
    said, work,
    h("div", { class: "bar" }, h("div", { class: "grow" }, h("label", { class: "unseen", for: "search" }, "Search claims"), search), chips),
    h("table", { class: "claims" }, h("thead", {}, h("tr", {}, ["claim", "measured", "verdict", "took", ""].map((name) => h("th", { scope: "col" }, name)))), rows));
  search.style.setProperty("width", "100%");
  await load();
}

function brief(text) {
  if (text.length <= 150) return text;
  return `${text.slice(0, text.lastIndexOf(" ", 140))} …`;
}
