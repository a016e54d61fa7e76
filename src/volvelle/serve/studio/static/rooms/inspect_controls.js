// Controls that the instruments of Inspect share: labelled choices, sliders over given values, a busy line.
import { h } from "../dom.js";

/** A labelled select; `options` are [value, label]. */
export function choice(label, options, value, change) {
  const select = h("select", { value, onchange: () => change?.() }, options.map(([one, words]) => h("option", { value: one }, words)));
  return { element: h("label", { class: "field" }, label, select), select, get value() { return select.value; } };
}

/** A labelled slider over `values`; `words` says one of them. */
export function slider(label, values, value, change, words = String) {
  const said = h("output", { class: "number" });
  const input = h("input", { type: "range", min: 0, max: values.length - 1, step: 1, value: Math.max(0, values.indexOf(value)) });
  const self = {
    element: h("label", { class: "field" }, h("span", {}, `${label} `, said), input),
    input,
    values,
    get value() { return self.values[Number(input.value)]; },
    limit(most) {
      const before = self.value;
      self.values = values.filter((one) => one <= most);
      input.max = self.values.length - 1;
      input.value = Math.min(self.values.length - 1, Math.max(0, self.values.indexOf(before) < 0 ? self.values.length - 1 : self.values.indexOf(before)));
      tell();
    },
    tell: () => tell(),
  };
  function tell() {
    said.textContent = words(self.value);
    input.setAttribute("aria-valuetext", words(self.value));
  }
  input.addEventListener("input", () => {
    tell();
    change?.();
  });
  tell();
  return self;
}

/** A labelled tick. */
export function tick(label, value, change) {
  const input = h("input", { type: "checkbox", checked: value, onchange: () => change?.() });
  return { element: h("label", { class: "tick" }, input, ` ${label}`), get value() { return input.checked; } };
}

/** Powers of two from low to high. */
export function powers(low, high) {
  const found = [];
  for (let v = low; v <= high; v *= 2) found.push(v);
  return found;
}

/** Bytes for people. */
export function bytes(value) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${(value / size).toPrecision(3).replace(/e\+(\d+)/, "")} ${unit}`.replace(/^(\d{4,})\.\d+/, "$1");
  }
  return `${Math.round(value)} B`;
}
