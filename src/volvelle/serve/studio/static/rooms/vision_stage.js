// The picture that is worked on: masks painted on it, points and boxes drawn over it, a pointer and a cross to ask with.
import { h, s } from "../dom.js";
import { paint } from "./run_lengths.js";

export const COLOURS = [[214, 66, 46], [40, 110, 200], [30, 150, 110], [200, 140, 20], [140, 80, 170], [90, 130, 40], [220, 90, 150], [20, 150, 170]];
export const css = (i) => `rgb(${COLOURS[i % COLOURS.length].join(" ")})`;
const NEAR = 5; // px on the screen: less is a click, more draws a box
const KEYS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

/** `on` is told of click(x, y, label), box(x1, y1, x2, y2), undo() and keep(). */
export function stage(on) {
  const canvas = h("canvas", { width: 4, height: 3 });
  const over = s("svg", { class: "over", tabindex: 0, role: "application", "aria-describedby": "stage-help",
    "aria-label": "The picture. Arrow keys move the cross, Enter clicks, Shift and Enter clicks beside the object, Backspace takes back, K keeps." });
  const element = h("div", { class: "stage" }, canvas, over);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const self = { element, over, show, draw, width: 0, height: 0 };
  let image = null, cross = null, drag = null, shown = {};

  function show(loaded) {
    image = loaded;
    [canvas.width, canvas.height] = [self.width, self.height] = [loaded.naturalWidth, loaded.naturalHeight];
    over.setAttribute("viewBox", `0 0 ${self.width} ${self.height}`);
    element.style.setProperty("--shape", `${self.width} / ${self.height}`);
    cross = null;
    draw({});
  }

  function place(event) {
    const box = over.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * self.width, y = ((event.clientY - box.top) / box.height) * self.height;
    return [Math.max(0, Math.min(x, self.width - 0.01)), Math.max(0, Math.min(y, self.height - 0.01))];
  }

  over.addEventListener("pointerdown", (event) => {
    if (!image || event.button) return;
    over.setPointerCapture(event.pointerId);
    drag = { from: place(event), screen: [event.clientX, event.clientY], to: null };
  });
  over.addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (drag.to || Math.hypot(event.clientX - drag.screen[0], event.clientY - drag.screen[1]) > NEAR) {
      drag.to = place(event);
      marks();
    }
  });
  over.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const { from, to } = drag;
    drag = null;
    if (!to) on.click(Math.floor(from[0]), Math.floor(from[1]), event.shiftKey ? 0 : 1);
    else {
      const [x1, x2] = [from[0], to[0]].sort((a, b) => a - b), [y1, y2] = [from[1], to[1]].sort((a, b) => a - b);
      if (x2 - x1 >= 2 && y2 - y1 >= 2) on.box(...[x1, y1, x2, y2].map(Math.round));
      else marks();
    }
  });
  over.addEventListener("pointercancel", () => {
    drag = null;
    marks();
  });
  over.addEventListener("keydown", (event) => {
    if (!image || event.ctrlKey || event.metaKey || event.altKey) return;
    const way = KEYS[event.key];
    if (way) {
      const step = Math.max(1, Math.round(Math.max(self.width, self.height) / (event.shiftKey ? 16 : 64)));
      cross = cross ?? [Math.floor(self.width / 2), Math.floor(self.height / 2)];
      cross = [Math.max(0, Math.min(cross[0] + step * way[0], self.width - 1)), Math.max(0, Math.min(cross[1] + step * way[1], self.height - 1))];
      marks();
    } else if (event.key === "Enter") {
      cross = cross ?? [Math.floor(self.width / 2), Math.floor(self.height / 2)];
      on.click(...cross, event.shiftKey ? 0 : 1);
    } else if (event.key === "Backspace") on.undo();
    else if (event.key === "k" || event.key === "K") on.keep();
    else return;
    event.preventDefault();
  });
  over.addEventListener("focus", () => {
    if (image && over.matches(":focus-visible")) {
      cross = cross ?? [Math.floor(self.width / 2), Math.floor(self.height / 2)];
      marks();
    }
  });

  /** Draw the picture with `objects` ({segmentation, colour}), the `current` mask, points, box and found boxes. */
  function draw({ objects = [], mask = null, points = [], labels = [], box = null, found = [] }) {
    shown = { points, labels, box, found };
    if (!image) return;
    pen.drawImage(image, 0, 0, self.width, self.height);
    if (objects.length || mask) {
      const pixels = pen.getImageData(0, 0, self.width, self.height);
      for (const one of objects) paint(pixels, one.segmentation, COLOURS[one.colour % COLOURS.length], 0.45);
      if (mask) paint(pixels, mask.segmentation, COLOURS[mask.colour % COLOURS.length], 0.6);
      pen.putImageData(pixels, 0, 0);
    }
    marks();
  }

  function marks() {
    const unit = Math.max(self.width, self.height) / 100;
    const { points = [], labels = [], box, found = [] } = shown;
    const drawn = drag?.to ? [Math.min(drag.from[0], drag.to[0]), Math.min(drag.from[1], drag.to[1]), Math.max(drag.from[0], drag.to[0]), Math.max(drag.from[1], drag.to[1])] : box;
    const rect = ([x1, y1, x2, y2], name) => s("rect", { class: name, x: x1, y: y1, width: x2 - x1, height: y2 - y1 });
    over.replaceChildren(
      ...found.map((one) => s("g", { class: "found" }, rect(one.box, "frame"),
        s("text", { x: one.box[0], y: Math.max(one.box[1] - unit * 0.8, unit * 3.2), "font-size": unit * 3.2 }, `${one.class} ${one.score.toFixed(2)}`))),
      ...(drawn ? [rect(drawn, "asked")] : []),
      ...points.map(([x, y], i) => s("g", { class: labels[i] ? "on" : "off", transform: `translate(${x + 0.5} ${y + 0.5})` }, s("circle", { r: unit * 1.6 }),
        s("path", { d: labels[i] ? `M${-unit * 0.8} 0h${unit * 1.6}M0 ${-unit * 0.8}v${unit * 1.6}` : `M${-unit * 0.8} 0h${unit * 1.6}`, "stroke-width": unit * 0.45 }))),
      ...(cross ? [s("path", { class: "cross", d: `M0 ${cross[1] + 0.5}H${self.width}M${cross[0] + 0.5} 0V${self.height}` })] : []));
  }

  return self;
}
