// Inspect: four instruments, each at its own address: #/inspect/field, memory, positions, ring.
import { get, h } from "../dom.js";

export const title = "Inspect";
export const styles = ["inspect.css"];

const PARTS = [
  ["field", "Receptive field", "What one unit of a network sees of the picture."],
  ["memory", "Memory plan", "What a training step holds at its peak, planned without allocating it."],
  ["positions", "Positions", "How encodings tell near from far."],
  ["ring", "Collectives", "An all-reduce between processes, as it happened."],
];

export async function mount(root, { signal, rest }) {
  const chosen = PARTS.find(([name]) => name === rest) ?? PARTS[0];
  const facts = await get("/studio/api/inspect", { signal });
  const place = h("div", { class: "instrument" });
  root.append(
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Inspect"), h("p", { class: "lead" }, chosen[2]))),
    h("nav", { class: "parts", "aria-label": "Instruments" }, PARTS.map(([name, label]) =>
      h("a", { href: `#/inspect/${name}`, "aria-current": name === chosen[0] ? "page" : null }, label))),
    place);
  const part = await import(`./inspect_${chosen[0]}.js`);
  if (!signal.aborted) await part.mount(place, facts, signal);
}
