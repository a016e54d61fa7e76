// The shell: which room the address asks for, the way between rooms, light and dark.
import { h } from "./dom.js";

// What is under the hash, and the module that shows it. Rooms are loaded when they are first opened.
const ROOMS = [
  { path: "", name: "home", label: "Catalogue" },
  { path: "chat", name: "chat", label: "Chat" },
  { path: "vision", name: "vision", label: "Vision" },
  { path: "inspect", name: "inspect", label: "Inspect" },
  { path: "runs", name: "runs", label: "Runs" },
  { path: "claims", name: "claims", label: "Claims" },
  { path: "technique", name: "technique" },
];

const root = document.getElementById("room");
const nav = document.getElementById("nav");
let leave = new AbortController();
let open = null;

nav.append(...ROOMS.filter((room) => room.label).map((room) =>
  h("a", { href: `#/${room.path}`, dataset: { room: room.name } }, room.label)));

/** The address behind #: {room, rest, query}; "#/runs/first?x=1" is {room: "runs", rest: "first"}. */
export function address(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [room, ...rest] = path.split("/");
  return { room, rest: rest.map(decodeURIComponent).join("/"), query: new URLSearchParams(query) };
}

async function enter() {
  const { room, rest, query } = address();
  const found = ROOMS.find((one) => one.path === room);
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  for (const link of nav.children) {
    const here = link.dataset.room === found?.name || (found?.name === "technique" && link.dataset.room === "home");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const page = h("div", { class: `room room-${found?.name ?? "none"}` });
  root.replaceChildren(page);
  root.setAttribute("aria-busy", "true");
  try {
    if (!found) throw new Error(`There is no room “${room}”.`);
    const module = await load(found);
    if (signal.aborted) return;
    document.title = `${module.title} · Volvelle`;
    await module.mount(page, { signal, rest, query });
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    page.replaceChildren(h("div", { class: "empty", role: "alert" }, h("h1", {}, "This room did not open"),
      h("p", {}, error.message), h("p", {}, h("a", { href: "#/" }, "Back to the catalogue"))));
  } finally {
    if (!signal.aborted) root.removeAttribute("aria-busy");
  }
  if (open !== null && open !== location.hash.split("?")[0]) {
    window.scrollTo(0, 0);
    root.focus({ preventScroll: true });
  }
  open = location.hash.split("?")[0];
}

async function load(room) {
  try {
    const module = await import(`./rooms/${room.name}.js`);
    await Promise.all((module.styles ?? []).map(style));
    return module;
  } catch (error) {
    throw new Error(`The module of the room “${room.label ?? room.name}” could not be loaded (${error.message}).`);
  }
}

/** Load a style sheet beside a room's module, once. */
function style(file) {
  const href = `/static/rooms/${file}`;
  if (document.querySelector(`link[href="${href}"]`)) return Promise.resolve();
  return new Promise((done, failed) => document.head.append(
    h("link", { rel: "stylesheet", href, onload: done, onerror: () => failed(new Error(`${href} is missing`)) })));
}

const SCHEMES = { auto: ["◐", "as the system"], light: ["○", "light"], dark: ["●", "dark"] };
const button = document.getElementById("scheme");

function scheme(chosen) {
  if (chosen === "auto") delete document.documentElement.dataset.scheme;
  else document.documentElement.dataset.scheme = chosen;
  localStorage.setItem("scheme", chosen);
  const [sign, words] = SCHEMES[chosen];
  button.replaceChildren(sign);
  button.setAttribute("aria-label", `Colours: ${words}. Change`);
}

button.addEventListener("click", () => {
  const names = Object.keys(SCHEMES);
  scheme(names[(names.indexOf(localStorage.getItem("scheme") ?? "auto") + 1) % names.length]);
});
scheme(localStorage.getItem("scheme") in SCHEMES ? localStorage.getItem("scheme") : "auto");
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which room is open, and stays
  root.focus();
});
window.addEventListener("hashchange", enter);
enter();
