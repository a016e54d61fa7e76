// Vision: click on a picture and get a mask, find objects, keep them for the next training.
import { Refusal, duration, figure, get, h, notice, post, show } from "../dom.js";
import { followJob } from "./job.js";
import { css, stage } from "./vision_stage.js";

export const title = "Vision";
export const styles = ["vision.css"];

const API = "/studio/api/vision";
const MOST = 20e6; // bytes of a picture

export async function mount(root, { signal }) {
  const state = { facts: await get(API, { signal }), picture: null, opening: 0, objects: [], count: 0, found: [], current: fresh(), asked: null };
  const canvas = stage({ click, box: boxed, undo, keep });
  const segmenter = h("select", { id: "segmenter", "aria-label": "Who segments", onchange: forget });
  const finder = h("select", { id: "finder", "aria-label": "Who detects" });
  const status = h("p", { class: "number", role: "status" });
  const caption = h("p", { class: "meta" });
  const offers = h("div", {});
  const list = h("ol", { class: "objects" });
  const label = h("input", { id: "label", value: "object", maxlength: 80, list: "labels", "aria-label": "Name of the object" });
  const labels = h("datalist", { id: "labels" });
  const file = h("input", { type: "file", id: "file", accept: "image/*", class: "unseen", onchange: () => file.files[0] && upload(file.files[0]) });
  const keepButton = h("button", { type: "button", class: "primary", onclick: keep }, "Keep");
  const undoButton = h("button", { type: "button", onclick: undo }, "Undo");
  const detectButton = h("button", { type: "button", onclick: detect }, "Detect");
  const masksButton = h("button", { type: "button", onclick: masks, hidden: true }, "Boxes to masks");
  const saveButton = h("button", { type: "button", class: "primary", onclick: save }, "Save for training");
  const downloadButton = h("button", { type: "button", onclick: download }, "Download COCO");
  const saved = h("p", { class: "meta" });
  const scene = h("button", { type: "button", onclick: () => compose((state.picture?.number ?? -1) + 1), hidden: !state.facts.scenes }, "Another scene");
  root.append(
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Vision"),
      h("p", { class: "lead" }, "Click on a thing and get its mask. Correct it with more clicks, keep it, and train on what you kept."))),
    offers,
    h("div", { class: "split" },
      h("div", {},
        h("div", { class: "bar" }, h("label", { class: "button", for: "file" }, "Open a picture…"), file, scene, caption),
        canvas.element,
        h("p", { class: "meta", id: "stage-help" }, h("b", {}, "Click"), " on the object, ", h("b", {}, "Shift-click"), " beside it, ", h("b", {}, "drag"), " a box around it. Keys: ",
          ["arrows", "Enter", "Shift+Enter", "Backspace", "K"].flatMap((key) => [h("kbd", {}, key), " "])),
        status),
      h("aside", { class: "panel tools", "aria-label": "Objects" },
        h("div", { class: "field" }, h("label", { for: "segmenter" }, "Masks by the run"), segmenter),
        h("div", { class: "bar" }, h("label", { class: "unseen", for: "label" }, "Name"), label, labels, keepButton, undoButton),
        h("div", { class: "field" }, h("label", { for: "finder" }, "Boxes by the run"), finder),
        h("div", { class: "bar" }, detectButton, masksButton),
        h("h3", {}, "Kept objects"), list,
        h("div", { class: "bar" }, saveButton, downloadButton), saved)));
  canvas.element.addEventListener("dragover", (event) => event.preventDefault());
  canvas.element.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
  ready();
  if (state.facts.scenes) compose(0);
  else say("Open a picture to begin.");
  redraw();

  function fresh() {
    return { points: [], labels: [], box: null, mask: null };
  }

  function say(words) {
    status.textContent = words;
  }

  /** What can be asked with the runs that are there; what is missing can be trained. */
  function ready() {
    for (const [select, names] of [[segmenter, state.facts.segment], [finder, state.facts.detect]]) {
      select.replaceChildren(...(names.length ? names.map((name) => h("option", { value: name }, name)) : [h("option", { value: "" }, "none yet")]));
      select.disabled = !names.length;
    }
    const missing = [["promptable", state.facts.segment, "Nothing answers clicks yet", "A small Segment Anything, trained on composed scenes"],
      ["detect", state.facts.detect, "Nothing finds objects yet", "A small ThunderNet, trained on composed scenes"]].filter(([, names]) => !names.length);
    offers.replaceChildren(...missing.map(([kind, , head, what]) => offer(kind, head, what)));
    buttons();
  }

  function offer(kind, head, what) {
    const place = h("div", {});
    const begin = h("button", { type: "button", class: "primary", onclick: async () => {
      begin.disabled = true;
      try {
        const job = await post(`${API}/train`, { kind }, { signal });
        const ended = await followJob(job.number, place, signal);
        if (ended.state === "finished") notice(`Trained in ${duration(ended.seconds)}.`);
        state.facts = await get(API, { signal });
        ready();
      } catch (error) {
        show(error);
      }
      begin.disabled = false;
    } }, "Train it");
    return h("section", { class: "panel offer" }, h("h2", {}, head), h("p", {}, `${what}: about two minutes on two idle cores. `, h("code", {}, state.facts.train[kind])), h("div", { class: "bar" }, begin), place);
  }

  function buttons() {
    keepButton.disabled = !state.current.mask;
    undoButton.disabled = !state.current.points.length && !state.current.box;
    detectButton.disabled = !state.picture || !state.facts.detect.length;
    masksButton.hidden = !state.found.length || !state.facts.segment.length;
    for (const one of [saveButton, downloadButton]) one.disabled = !state.objects.length;
  }

  async function compose(number) {
    const turn = ++state.opening;
    try {
      const found = await get(`${API}/scene?number=${number % state.facts.scenes}`, { signal });
      if (turn !== state.opening) return; // another picture was opened meanwhile
      await open({ image: found.image, name: `scene-${found.number}.png`, number: found.number });
      caption.textContent = `Scene ${found.number}, ${found.label}.`;
    } catch (error) {
      show(error);
    }
  }

  async function upload(chosen) {
    if (chosen.size > MOST) return notice(`${chosen.name} has ${figure(Math.round(chosen.size / 1e6))} MB; at most ${MOST / 1e6} are taken.`, "bad");
    state.opening += 1;
    try {
      const image = await new Promise((done, failed) => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result);
        reader.onerror = () => failed(new Error(`${chosen.name} cannot be read.`));
        reader.readAsDataURL(chosen);
      });
      await open({ image, name: chosen.name });
      caption.textContent = chosen.name;
    } catch (error) {
      show(error);
    }
    file.value = "";
  }

  async function open(picture) {
    const image = new Image();
    image.src = picture.image;
    await image.decode().catch(() => { throw new Error(`${picture.name}: the browser cannot show this picture.`); });
    Object.assign(state, { picture: { ...picture, id: null }, objects: [], found: [], current: fresh() });
    saved.replaceChildren();
    canvas.show(image);
    say(state.facts.segment.length ? "Click on an object." : "");
    redraw();
  }

  function forget() {
    state.picture &&= { ...state.picture, id: null };
    state.current = fresh();
    redraw();
  }

  /** Ask a run about the picture: by its id once it is known there, with the picture itself where it is not. */
  async function ask(path, body, aborting) {
    const { picture } = state;
    const send = (what) => post(`${API}/${path}`, { ...body, ...what }, { signal: aborting });
    const key = `${path} ${body.run}`;
    picture.known ??= {};
    let found;
    try {
      found = await send(picture.known[key] ? { image_id: picture.known[key] } : { image: picture.image });
    } catch (error) {
      if (!(error instanceof Refusal) || error.status !== 404 || !picture.known[key]) throw error;
      found = await send({ image: picture.image });
    }
    picture.known[key] = found.image_id;
    return found;
  }

  async function segment() {
    const { current } = state;
    state.asked?.abort();
    if (!current.points.length && !current.box) {
      current.mask = null;
      return redraw();
    }
    if (!segmenter.value) return notice("There is no run yet that answers clicks: train one above.");
    state.asked = new AbortController();
    signal.addEventListener("abort", () => state.asked?.abort());
    redraw();
    say("asking…");
    const body = { run: segmenter.value, points: current.points.length ? [current.points] : [], boxes: current.box ? [current.box] : [] };
    if (current.points.length) body.labels = [current.labels];
    try {
      const found = await ask("segment", body, state.asked.signal);
      if (current !== state.current) return;
      const [mask] = found.masks;
      current.mask = mask.area ? mask : null;
      const took = found.seconds.embed > 0.001 ? `picture ${ms(found.seconds.embed)}, click ${ms(found.seconds.decode)}` : `click ${ms(found.seconds.decode)}`;
      say(mask.area ? `A mask of ${mask.area.toLocaleString("en")} pixels, estimated IoU ${mask.predicted_iou.toFixed(2)} (${took}).` : `The model answers with an empty mask (${took}).`);
    } catch (error) {
      if (error.name !== "AbortError") say("");
      show(error);
    }
    redraw();
  }

  function click(x, y, on) {
    state.current.points.push([x, y]);
    state.current.labels.push(on);
    segment();
  }

  function boxed(...box) {
    state.current = { ...fresh(), box };
    segment();
  }

  function undo() {
    const { current } = state;
    if (current.points.length) {
      current.points.pop();
      current.labels.pop();
    } else current.box = null;
    say("");
    segment();
  }

  function keep() {
    const { mask, points } = state.current;
    if (!mask) return;
    add(mask, label.value.trim() || "object", points);
    state.current = fresh();
    say(`Kept ${state.objects.at(-1).name}; click on the next object.`);
    redraw();
  }

  function add(mask, name, points = []) {
    state.objects.push({ segmentation: mask.segmentation, area: mask.area, predicted_iou: mask.predicted_iou, name, points, colour: state.count++ });
  }

  async function detect() {
    detectButton.disabled = true;
    say("looking…");
    try {
      const found = await ask("detect", { run: finder.value }, signal);
      state.found = found.objects;
      say(`${found.objects.length} objects in ${ms(found.seconds.detect)}.`);
    } catch (error) {
      say("");
      show(error);
    }
    redraw();
  }

  /** The found boxes as prompts: a mask for each, kept under its class. */
  async function masks() {
    try {
      const kept = state.found.map((one) => inside(one.box)).map((box, i) => [box, state.found[i].class]).filter(([box]) => box);
      if (!kept.length) return;
      const found = await ask("segment", { run: segmenter.value, boxes: kept.map(([box]) => box).slice(0, 64) }, signal);
      found.masks.forEach((mask, i) => mask.area && add(mask, kept[i][1]));
      state.found = [];
      say(`Kept ${found.masks.filter((mask) => mask.area).length} objects: look at them, delete what is wrong.`);
    } catch (error) {
      show(error);
    }
    redraw();
  }

  function inside([x1, y1, x2, y2]) {
    const box = [Math.max(0, x1), Math.max(0, y1), Math.min(canvas.width, x2), Math.min(canvas.height, y2)].map((v) => Math.round(v * 10) / 10);
    return box[2] - box[0] >= 1 && box[3] - box[1] >= 1 ? box : null;
  }

  function body() {
    const objects = state.objects.map(({ segmentation, name, predicted_iou, points }) => ({ segmentation, name, predicted_iou, points }));
    return { image: state.picture.image, file_name: state.picture.name, objects };
  }

  async function save() {
    try {
      const found = await post(`${API}/save`, body(), { signal });
      saved.replaceChildren(`${found.objects} objects of ${found.pictures} pictures in ${found.file}. Next: `, h("code", {}, found.next));
    } catch (error) {
      show(error);
    }
  }

  async function download() {
    try {
      const text = JSON.stringify(await post(`${API}/coco`, body(), { signal }));
      const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      h("a", { href: url, download: `${state.picture.name.replace(/\.[^.]*$/, "")}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    } catch (error) {
      show(error);
    }
  }

  function redraw() {
    const { points, labels: on, box, mask } = state.current;
    canvas.draw({ objects: state.objects, mask: mask && { ...mask, colour: state.count }, points, labels: on, box, found: state.found });
    list.replaceChildren(...state.objects.map((one, i) => h("li", {},
      h("i", { class: "swatch", style: { background: css(one.colour) } }),
      h("input", { value: one.name, maxlength: 80, "aria-label": `Name of object ${i + 1}`, onchange: (event) => { one.name = event.target.value.trim() || "object"; redraw(); } }),
      h("span", { class: "meta number" }, `${one.area.toLocaleString("en")} px`),
      h("button", { type: "button", class: "plain", "aria-label": `Delete object ${i + 1}, ${one.name}`, onclick: () => { state.objects.splice(i, 1); redraw(); } }, "×"))));
    if (!state.objects.length) list.replaceChildren(h("li", { class: "meta" }, "none yet"));
    labels.replaceChildren(...[...new Set(state.objects.map((one) => one.name))].map((value) => h("option", { value })));
    buttons();
  }
}

const ms = (seconds) => `${figure(Math.round(seconds * 1000))} ms`;
