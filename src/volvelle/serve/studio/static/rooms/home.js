// The catalogue: every technique, newest paper first; a wheel of families, a search, pages.
import { get, h, renew, settled } from "../dom.js";
import { badge, verdictClass } from "../verdict.js";
import { wheel } from "../wheel.js";

export const title = "Catalogue";
export const styles = ["home.css"];
const PAGE = 12;
const MARKS = [["held", "held"], ["failed", "not held"], ["pending", "not measurable"], ["none", "not measured"], ["bare", "without a claim"]];

/** Fill the room. */
export async function mount(root, { signal, query }) {
  const { techniques, families, machine } = await get("/studio/api/techniques", { signal });
  const state = {
    q: query.get("q") ?? "",
    family: query.get("family") ?? "",
    verdict: query.get("verdict") ?? "",
    page: Math.max(1, Number(query.get("page")) || 1),
  };
  for (const one of techniques) {
    one.mark = one.claimed ? verdictClass(one.found) : "bare";
    one.text = [one.title, one.summary, one.summary_zh, one.family, one.authors, one.paper, one.words, one.key].join(" ").toLowerCase();
  }

  const count = (mark) => techniques.filter((one) => one.mark === mark).length;
  const marks = MARKS.filter(([mark]) => count(mark));
  const dial = wheel(families, {
    marks: (family) => techniques.filter((one) => one.family === family).map((one) => one.mark),
    choose: (family) => change({ family: family === state.family ? "" : family ?? "" }),
  });
  const search = h("input", { type: "search", id: "search", placeholder: "Search, in English or Chinese", value: state.q, autocomplete: "off",
    oninput: settled(120, () => change({ q: search.value }, true)) });
  const family = h("select", { id: "family", onchange: () => change({ family: family.value }) },
    h("option", { value: "" }, "all families"), families.map(([name, count]) => h("option", { value: name }, `${name} (${count})`)));
  const verdicts = h("div", { class: "chips", role: "group", "aria-label": "Verdict" });
  const told = h("p", { class: "meta", role: "status" });
  const cards = h("ul", { class: "cards" });
  const pages = h("nav", { class: "bar pages", "aria-label": "Pages" });

  function change(part, replace = false) {
    Object.assign(state, { page: 1 }, part);
    const kept = new URLSearchParams(Object.entries(state).filter(([key, v]) => v && !(key === "page" && v === 1)));
    const where = `#/${kept.size ? `?${kept}` : ""}`;
    if (replace) history.replaceState(null, "", where);
    else history.pushState(null, "", where);
    draw();
  }

  function draw() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (one) => (!state.family || one.family === state.family) && words.every((word) => one.text.includes(word));
    const near = techniques.filter(fits);
    const found = near.filter((one) => !state.verdict || one.mark === state.verdict);
    const last = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(state.page, last);
    const first = (state.page - 1) * PAGE;
    family.value = state.family;
    dial.point(state.family, found.length);
    renew(verdicts, [["", "all"], ...marks].map(([mark, name]) => h("button", { type: "button", "aria-pressed": String(state.verdict === mark),
      onclick: () => change({ verdict: mark }) }, name, h("small", {}, mark ? near.filter((one) => one.mark === mark).length : near.length))));
    told.replaceChildren(found.length ? `${first + 1} to ${Math.min(first + PAGE, found.length)} of ${found.length}, newest paper first` : "");
    cards.replaceChildren(...(found.length ? found.slice(first, first + PAGE).map(card) : [nothing()]));
    pages.hidden = last === 1;
    renew(pages, [turn(state.page - 1, last, "← Newer"), h("span", { class: "meta number" }, `page ${state.page} of ${last}`), turn(state.page + 1, last, "Older →")]);
  }

  const turn = (to, last, text) => h("button", { type: "button", disabled: to < 1 || to > last, onclick: () => {
    change({ page: to });
    told.scrollIntoView({ block: "start" });
  } }, text);
  const nothing = () => h("li", { class: "empty" }, h("h2", {}, "Nothing of that name"), h("button", { type: "button", onclick: () => {
    search.value = "";
    change({ q: "", family: "", verdict: "" });
  } }, "Show everything"));

  root.append(hero(marks.map(([mark, name]) => [mark, name, count(mark)]), machine, dial.drawing),
    h("div", { class: "bar filters" },
      h("div", { class: "grow" }, h("label", { class: "unseen", for: "search" }, "Search"), search),
      h("label", { class: "unseen", for: "family" }, "Family"), family, verdicts),
    told, cards, pages);
  draw();
}

function hero(tally, machine, drawing) {
  return h("section", { class: "hero" },
    h("div", {},
      h("h1", {}, "Papers you can turn by hand"),
      h("p", { class: "lead" }, "A volvelle is the paper wheel in an old book: a page you operate. Each technique here is a part to import, "
        + "often a model to run, and a claim that was measured, not quoted."),
      h("dl", { class: "tally" }, tally.map(([mark, name, count]) => h("div", { class: mark }, h("dt", {}, name), h("dd", {}, String(count))))),
      h("p", { class: "meta" }, `This machine: ${machine.processor}, ${machine.cores} cores, torch ${machine.torch}. `,
        h("a", { href: "#/claims" }, "Measure the claims here"))),
    drawing);
}

function card(one) {
  const paper = one.authors && `${one.authors} ${one.year}`;
  return h("li", { class: "card" },
    h("p", { class: "meta top-line" }, h("span", {}, one.family), h("span", { class: "number" }, one.year || "")),
    h("h3", {}, h("a", { href: `#/technique/${one.key}` }, one.title)),
    h("p", {}, one.summary),
    one.summary_zh && h("p", { class: "zh", lang: "zh" }, one.summary_zh),
    h("p", { class: "foot" },
      paper && (one.url ? h("a", { href: one.url, rel: "noreferrer", class: "meta", title: one.paper }, paper) : h("span", { class: "meta", title: one.paper ?? "" }, paper)),
      badge(one.found, Boolean(one.claimed))));
}
