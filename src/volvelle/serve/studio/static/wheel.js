// The volvelle on the home page: a sector for each family, a mark for each technique, a hand that turns to the chosen one.
import { s } from "./dom.js";

const C = 200, RIM = 190, LABEL = 109, INNER = 71, OUTER = 101;

const at = (radius, turn) => [C + radius * Math.sin(turn), C - radius * Math.cos(turn)];
const degrees = (turn) => (turn * 180) / Math.PI;

/**
 * The drawing and its hand: {drawing, point(family)}. `families`: [[name, count], …]; `marks(family)`: the verdict class of
 * each of its techniques; `choose(family)` is called with a name, or null for all.
 */
export function wheel(families, { marks, choose }) {
  const step = (2 * Math.PI) / families.length;
  const middle = families.map((_, i) => i * step);
  const sectors = families.map(([name, count], i) => s("g", { class: "sector", dataset: { family: name }, onclick: () => choose(name) },
    s("title", {}, `${name}: ${count}`),
    s("path", { class: "face", d: ring(middle[i] - step / 2, middle[i] + step / 2) }),
    label(name, middle[i]),
    dots(marks(name), middle[i], step)));
  const hand = s("g", { class: "hand" },
    s("path", { d: `M${C} ${C - INNER + 3} l-5 12 l2.6 0 L${C - 3} ${C} l6 0 L${C + 2.4} ${C - INNER + 15} l2.6 0 z` }),
    s("path", { d: `M${C} ${C - RIM + 5} l-7 -14 l14 0 z` }));
  const number = s("text", { class: "number", x: C, y: C + 9, "text-anchor": "middle" });
  const drawing = s("svg", { class: "wheel", viewBox: "0 0 400 400", "aria-hidden": "true" },
    s("circle", { class: "rim", cx: C, cy: C, r: RIM + 8 }), s("circle", { class: "rim", cx: C, cy: C, r: RIM }), scale(families.length),
    sectors, s("circle", { class: "rim", cx: C, cy: C, r: INNER - 6 }), hand,
    s("g", { class: "hub", onclick: () => choose(null) }, s("title", {}, "all families"), s("circle", { cx: C, cy: C, r: 34 }), number));
  let turned = 0;
  return {
    drawing,
    /** Turn the hand to a family, the shorter way; without one it rests where it is and only fades. */
    point(family, shown) {
      const i = families.findIndex(([name]) => name === family);
      if (i >= 0) {
        const goal = degrees(middle[i]);
        turned += ((((goal - turned) % 360) + 540) % 360) - 180;
        hand.style.setProperty("transform", `rotate(${turned}deg)`);
      }
      drawing.classList.toggle("chosen", i >= 0);
      for (const sector of sectors) sector.classList.toggle("on", sector.dataset.family === family);
      number.replaceChildren(String(shown));
    },
  };
}

function ring(from, to) {
  const [a, b] = at(RIM, from), [c, d] = at(RIM, to), [e, f] = at(INNER - 6, to), [g, i] = at(INNER - 6, from);
  const wide = to - from > Math.PI ? 1 : 0;
  return `M${a} ${b}A${RIM} ${RIM} 0 ${wide} 1 ${c} ${d}L${e} ${f}A${INNER - 6} ${INNER - 6} 0 ${wide} 0 ${g} ${i}z`;
}

/** Words along the radius, never upside down. */
function label(name, turn) {
  const left = turn > Math.PI;
  const [x, y] = at(left ? RIM - 7 : LABEL, turn);
  return s("text", { x, y, dy: "0.34em", transform: `rotate(${degrees(turn) - (left ? 270 : 90)} ${x} ${y})` }, name);
}

function dots(marks, turn, step) {
  const columns = Math.min(4, Math.max(1, Math.ceil(Math.sqrt(marks.length))));
  const rows = Math.ceil(marks.length / columns);
  return marks.map((mark, i) => {
    const row = Math.floor(i / columns), inRow = Math.min(columns, marks.length - row * columns);
    const radius = OUTER - 2 - row * Math.min(9, (OUTER - INNER - 4) / Math.max(rows - 1, 1));
    const side = ((i % columns) - (inRow - 1) / 2) * Math.min(7 / radius, (step * 0.84) / columns);
    const [cx, cy] = at(radius, turn + side);
    return s("circle", { class: `mark ${mark}`, cx, cy, r: 2.2 });
  });
}

/** Degrees on the rim, as on an instrument. */
function scale(count) {
  const n = count * 6;
  const ticks = Array.from({ length: n }, (_, i) => {
    const turn = (i / n) * 2 * Math.PI - Math.PI / count;
    const [a, b] = at(RIM, turn), [c, d] = at(RIM + (i % 6 ? 4 : 8), turn);
    return `M${a.toFixed(2)} ${b.toFixed(2)}L${c.toFixed(2)} ${d.toFixed(2)}`;
  });
  return s("path", { class: "scale", d: ticks.join("") });
}
