// Source code as the server coloured it, and text from docstrings.
import { h, notice } from "./dom.js";

/** Pieces [[kind, text], …] as a block of code. */
export function code(pieces) {
  return h("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Source code" }, h("code", {}, pieces.map(([kind, text]) => (kind ? h("span", { class: kind }, text) : text))));
}

/** A command with a button that copies it. */
export function command(text) {
  const copy = h("button", { class: "plain", type: "button", "aria-label": `Copy: ${text}`, onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      notice("Copied.");
    } catch {
      getSelection().selectAllChildren(line);
      notice("The browser gives no clipboard; the command is selected.");
    }
  } }, "copy");
  const line = h("code", {}, text);
  return h("div", { class: "command" }, line, copy);
}

/** Paragraphs and lines of a docstring; `backticks` become code. */
export function prose(blocks) {
  return blocks.map(({ kind, text }) => (kind === "lines" ? h("pre", { class: "formula" }, text)
    : h("p", {}, text.split(/`([^`]+)`/).map((part, i) => (i % 2 ? h("code", {}, part) : part)))));
}
