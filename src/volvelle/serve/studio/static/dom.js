// What every room needs of the page: elements, requests, and errors that a reader can act on.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("button", {class: "quiet", onclick: f, disabled: true}, "Stop"). null and false children are left out. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG: s("circle", {cx: 8, cy: 8, r: 4}). */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, v]) => element.style.setProperty(key, v));
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "value" && "value" in element) element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  // A select's value exists only after its options.
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  if (element.tagName === "SELECT" && props?.value !== undefined) element.value = props.value;
  return element;
}

/** Exchange an element's children for others of the same kind; the focus stays at its place among them. */
export function renew(element, children) {
  const place = [...element.children].findIndex((child) => child === document.activeElement);
  element.replaceChildren(...children);
  if (place < 0) return;
  const again = element.children[place];
  (again && !again.disabled ? again : element.querySelector("button:not(:disabled)"))?.focus();
}

/** What the server refused, or why it could not be asked. `status` is 0 where there was no answer. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** JSON of a path; raises Refusal, or AbortError when the room was left. */
export async function get(url, { signal } = {}) {
  return (await ask(url, { signal })).json();
}

/** JSON of what the server made of `body`: an object as JSON, FormData and Blob as they are. */
export async function post(url, body = {}, { signal, method = "POST" } = {}) {
  const raw = body instanceof FormData || body instanceof Blob;
  const headers = raw ? {} : { "content-type": "application/json" };
  return (await ask(url, { signal, method, headers, body: raw ? body : JSON.stringify(body) })).json();
}

/** A response whose status is good, for those who read it piece by piece. */
export async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The studio does not answer. Is `volvelle studio` still running?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refusal(said.error?.message ?? `${response.status} ${response.statusText}`, response.status);
}

/** Say an error at the page's foot; leaving a room is none. */
export function show(error) {
  if (error?.name === "AbortError") return;
  notice(error?.message ?? String(error), "bad");
}

/** Say something at the page's foot for a while. */
export function notice(text, kind = "") {
  const close = () => line.remove();
  const line = h("div", { class: `notice ${kind}` }, h("span", {}, text),
    h("button", { class: "plain", type: "button", "aria-label": "Dismiss", onclick: close }, "×"));
  document.getElementById("notices").append(line);
  setTimeout(close, kind === "bad" ? 15000 : 5000);
}

/** Call f every `ms` while the room is open, the next call only after the last one ended. */
export function every(ms, f, signal) {
  let timer = 0;
  const turn = async () => {
    try {
      await f();
    } catch (error) {
      show(error);
    }
    if (!signal.aborted) timer = setTimeout(turn, ms);
  };
  timer = setTimeout(turn, ms);
  signal.addEventListener("abort", () => clearTimeout(timer));
}

/** Call f when `ms` have passed without another call. */
export function settled(ms, f) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...given), ms);
  };
}

/** Events of a stream of server-sent events: for await (const {event, data} of events(response)). `data` is parsed JSON. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      const event = lines.find((line) => line.startsWith("event:"))?.slice(6).trim() ?? "message";
      if (data) yield { event, data: data === "[DONE]" ? null : JSON.parse(data) };
    }
  }
}

/** 3.2 s, 4 min 5 s, 2 h 3 min. */
export function duration(seconds) {
  if (seconds < 60) return `${seconds < 10 ? Math.round(seconds * 10) / 10 : Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** A number as a reader wants it: 4 digits, powers of ten only where they are needed. */
export function figure(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e6 ? String(value) : value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || (size > 0 && size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** When something was, as the reader's own clock says it. */
export function when(text) {
  const date = new Date(text);
  return Number.isNaN(date.getTime()) ? "" : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
