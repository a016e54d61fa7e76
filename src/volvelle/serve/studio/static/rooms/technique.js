// One technique: what it is, its formula, its code, and what its claim was found to be.
import { code, command, prose } from "../code.js";
import { get, h, duration, figure, show, when } from "../dom.js";
import { badge, origin, value } from "../verdict.js";

export let title = "Technique";
export const styles = ["technique.css"];
const ROOMS = { chat: "Chat", vision: "Vision", inspect: "Inspect" };

/** Fill the room; `rest` is the technique's key. */
export async function mount(root, { signal, rest }) {
  const one = await get(`/studio/api/techniques/${encodeURIComponent(rest)}`, { signal });
  title = one.title;
  document.title = `${title} · Volvelle`;
  const parts = one.files.filter((file) => file.file.startsWith("parts/"));
  root.append(
    h("p", { class: "meta" }, h("a", { href: "#/" }, "Catalogue"), " / ", h("a", { href: `#/?family=${one.family}` }, one.family)),
    h("h1", {}, one.title),
    one.authors && h("p", { class: "meta" }, `${one.authors} ${one.year}`, one.paper && [", ", one.url
      ? h("a", { href: one.url, rel: "noreferrer" }, one.paper) : h("cite", {}, one.paper)], one.where && `, ${one.where}`),
    h("p", { class: "lead" }, one.summary),
    one.summary_zh && h("p", { class: "lead zh", lang: "zh" }, one.summary_zh),
    h("div", { class: "split" },
      h("div", {}, formulas(one.files), claim(one), texts(parts.length ? parts : one.files), sources(one.files, signal)),
      aside(one)));
}

function formulas(files) {
  const found = files.filter((file) => file.formulas.length);
  if (!found.length) return null;
  return h("section", { class: "panel equation", "aria-label": "Equation" }, found.slice(0, 4).map((file) => h("figure", {},
    file.formulas.slice(0, 2).map((text) => h("pre", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Formula" }, text)),
    found.length > 1 && h("figcaption", { class: "meta" }, h("code", {}, name(file.file))))));
}

function claim(one) {
  const told = one.claim;
  if (!told) return null;
  const shared = one.key !== told.name;
  return h("section", {}, h("h2", {}, shared ? "The claim that measures it" : "The claim"),
    h("blockquote", {}, h("p", {}, told.sentence), h("footer", { class: "meta" }, told.paper)),
    h("p", {}, h("span", { class: "meta" }, "Measured by "), told.measured_by, "."),
    told.records.length ? told.records.map((record, i) => found(record, told.name, i > 0)) : h("div", { class: "panel" },
      h("p", {}, "Not measured on this machine yet. It takes at most ",
        Object.entries(told.seconds).map(([budget, s]) => `${duration(s)} (${budget})`).join(" or "), "."),
      h("p", {}, h("a", { href: `#/claims?q=${told.name}` }, "Measure it in the Claims room"))));
}

function found(record, name, folded) {
  const judged = record.findings.filter((one) => one.held !== null), told = record.findings.filter((one) => one.held === null);
  const body = [
    h("p", { class: "meta" }, `${origin(record)}; ${record.budget}, ${duration(record.seconds)}, ${when(record.measured)}`),
    record.why && h("p", {}, record.why),
    figures(judged),
    told.length > 0 && (told.length > 6 ? h("details", {}, h("summary", {}, `${told.length} more figures, reported without a bound`), figures(told)) : figures(told)),
    record.pictures.map((picture, i) => h("figure", {}, h("img", { src: `/studio/api/techniques/${name}/pictures/${i}?own=${record.own}`,
      alt: `${name}: ${picture}`, loading: "lazy" }), h("figcaption", { class: "meta" }, picture))),
    record.notes.map((note) => h("p", { class: "meta" }, note)),
    h("details", {}, h("summary", {}, "Setting and versions"), h("dl", { class: "facts" },
      Object.entries({ ...record.setting, ...record.peers, python: record.machine.python, torch: record.machine.torch }).map(([key, v]) =>
        [h("dt", {}, key), h("dd", {}, typeof v === "number" ? figure(v) : String(v))]))),
  ];
  if (folded) return h("details", { class: "panel" }, h("summary", {}, "Also ", badge(record), ` ${record.own ? "in this folder" : "as it came with the checkout"}, ${record.budget}`), body);
  return h("div", { class: "panel" }, h("p", { class: "verdict" }, badge(record)), body);
}

function figures(findings) {
  if (!findings.length) return null;
  const bounds = findings.some((one) => one.held !== null);
  const head = ["measured", "figure", ...(bounds ? ["expected", ""] : [])];
  return h("div", { class: "scroll" }, h("table", { class: "findings" },
    h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { class: i === 1 || i === 2 ? "number" : "" }, name)))),
    h("tbody", {}, findings.map((one) => h("tr", { class: one.held === false ? "bad" : "" },
      h("td", {}, one.what), h("td", { class: "number" }, value(one)),
      bounds && [h("td", { class: "number" }, one.bound ?? ""), h("td", {}, one.held === null ? ""
        : h("span", { class: `badge ${one.held ? "held" : "failed"}` }, one.held ? "held" : "not held"))])))));
}

function texts(files) {
  const told = files.filter((file) => file.text.length);
  if (!told.length) return null;
  return h("section", {}, h("h2", {}, "What the code says of itself"), told.map((file, i) =>
    h("details", { class: "panel", open: i === 0 }, h("summary", {}, h("code", {}, name(file.file))), h("div", { class: "prose" }, prose(file.text)))));
}

function sources(files, signal) {
  const place = h("div", { role: "tabpanel" });
  const tabs = h("div", { class: "chips", role: "tablist", "aria-label": "Files" });
  const choose = async (file) => {
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.file === file));
    try {
      const { pieces } = await get(`/studio/api/techniques/source?file=${encodeURIComponent(file)}`, { signal });
      place.replaceChildren(code(pieces));
    } catch (error) {
      show(error);
    }
  };
  tabs.append(...files.map(({ file, lines }) => h("button", { type: "button", role: "tab", dataset: { file }, onclick: () => choose(file) },
    name(file), h("small", {}, `${lines} lines`))));
  choose(files[0].file);
  return h("section", {}, h("h2", {}, "The code"), tabs, place);
}

function aside(one) {
  const room = one.instrument?.split("/")[0];
  return h("aside", { class: "panel facts" },
    h("p", {}, badge(one.found, Boolean(one.claimed)), one.found?.main && [h("br"), h("span", { class: "meta" },
      `${one.found.main.what}: ${value(one.found.main)} (${one.found.main.bound})`)]),
    room && h("p", {}, h("a", { class: "button primary", href: `#/${one.instrument}` }, `Open its instrument in ${ROOMS[room]}`)),
    one.names.length > 0 && [h("h3", {}, "Import"), h("ul", {}, one.names.map((each) => h("li", {}, h("code", {}, `volvelle.${each}`))))],
    one.recipe && [h("h3", {}, "Run"), command(one.recipe)],
    one.claim && [h("h3", {}, "Measure"), command(`volvelle claim ${one.claim.name}`)],
    one.kin.length > 0 && [h("h3", {}, "Measured together with"), h("ul", {}, one.kin.map((each) =>
      h("li", {}, h("a", { href: `#/technique/${each.key}` }, each.title))))]);
}

const name = (file) => file.replace(/^parts\//, "");
