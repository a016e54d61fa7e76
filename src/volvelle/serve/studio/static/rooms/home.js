// The catalogue: every technique, newest first.
import { h } from "../dom.js";

export const title = "Catalogue";

/** Fill the room. */
export async function mount(root) {
  root.append(h("h1", {}, "Volvelle"));
}
