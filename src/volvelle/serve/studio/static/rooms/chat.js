// Chat: an answer token by token, what was drafted for it, and what that gained.
import { ask, duration, events, figure, get, h, notice, post, show } from "../dom.js";
import { followJob } from "./job.js";
import { answerView, raceView } from "./chat_answers.js";

export const title = "Chat";
export const styles = ["chat.css"];

const API = "/studio/api/chat";
const SAMPLES = [
  ["Copy with changes", "Write this list again, one item a line, with a number before each: apples, pears, plums, cherries, apricots, quinces, medlars."],
  ["Explain", "Explain in three sentences why the sky is blue."],
  ["Code", "Write a Python class Point with x and y, and methods add, subtract, scale and __repr__."],
];

export async function mount(root, { signal }) {
  const facts = await get(API, { signal });
  root.append(h("div", { class: "head" }, h("div", {},
    h("h1", {}, "Chat"),
    h("p", { class: "lead" }, "Watch a language model write. A cheap drafter guesses the next tokens, the model checks several of them in one step and keeps those it would have written itself."))));
  if (facts.state === "absent") await fetched(root, facts, signal);
  room(root, facts, signal);
}

/** Offer to fetch the model, and wait until it is there. */
async function fetched(root, facts, signal) {
  const panel = h("section", { class: "panel offer" });
  root.append(panel);
  await new Promise((done) => {
    const begin = async () => {
      button.disabled = true;
      try {
        const job = await post(`${API}/fetch`, {}, { signal });
        if ((await followJob(job.number, panel, signal)).state === "finished") return done();
        button.disabled = false;
      } catch (error) {
        button.disabled = false;
        show(error);
      }
    };
    const button = h("button", { class: "primary", type: "button", onclick: begin }, `Fetch it, ${figure(Math.round(facts.download / 1e6))} MB`);
    panel.append(h("h2", {}, "The model is not on this machine yet"), h("p", {}, `${facts.what}. Licence: ${facts.licence}.`), button);
  });
  panel.remove();
}

/** The room with a model that can be opened. */
function room(root, facts, signal) {
  const state = { facts, messages: [], stop: null, opening: null };
  const thread = h("div", { class: "thread", role: "log", "aria-label": "Conversation" });
  const controls = settings();
  const status = h("p", { class: "meta", role: "status" });
  const text = h("textarea", { rows: 3, id: "say", placeholder: "Write to the model…", maxlength: 32768,
    onfocus: () => opened().catch(show), onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send(false);
      }
    } });
  const sendButton = h("button", { class: "primary", type: "button", onclick: () => send(false) }, "Send");
  const raceButton = h("button", { type: "button", onclick: () => send(true), title: "Write the answer twice: without drafts, then with them" }, "Race");
  const stopButton = h("button", { type: "button", disabled: true, onclick: () => state.stop?.abort() }, "Stop");
  const clearButton = h("button", { class: "plain quiet", type: "button", onclick: clear }, "New conversation");
  const samples = h("div", { class: "chips", "aria-label": "Examples" }, SAMPLES.map(([name, words]) =>
    h("button", { type: "button", onclick: () => { text.value = words; text.focus(); } }, name)));
  const composer = h("form", { class: "panel composer", onsubmit: (event) => event.preventDefault() },
    h("label", { class: "unseen", for: "say" }, "Your message"), text, samples,
    h("div", { class: "bar" }, sendButton, raceButton, stopButton, h("span", { class: "grow" }), clearButton), status);
  root.append(h("div", { class: "split" }, h("div", {}, thread, composer), controls.element));
  root.addEventListener("keydown", (event) => event.key === "Escape" && state.stop?.abort());
  controls.show(facts);
  say();

  function say(words) {
    const { model, state: at, parameters, dtype, exact, problem, chats } = state.facts;
    const kind = exact === "bitwise" ? "; drafts change no bit of it" : "";
    status.textContent = words ?? (at === "open" ? `${model}: ${(parameters / 1e6).toFixed(1)}M parameters, ${dtype}${kind}${chats ? "" : "; it has no chat template and goes on from your text"}.`
      : at === "failed" ? `${model} did not open: ${problem}` : `${model} opens when you begin to write.`);
  }

  /** Open the model, once; resolves when it is open. */
  function opened() {
    state.opening ??= (async () => {
      try {
        if (state.facts.state !== "open") say(`Opening ${state.facts.model}…`);
        state.facts = await post(`${API}/open`, {}, { signal });
        while (state.facts.state === "opening") {
          await new Promise((done) => setTimeout(done, 250));
          state.facts = await get(API, { signal });
        }
        if (state.facts.state !== "open") throw new Error(state.facts.problem ?? `${state.facts.model} is ${state.facts.state}`);
        controls.show(state.facts);
        say();
      } catch (error) {
        state.opening = null;
        say();
        throw error;
      }
    })();
    return state.opening;
  }

  function busy(on) {
    for (const one of [sendButton, raceButton, clearButton]) one.disabled = on;
    stopButton.disabled = !on;
  }

  function clear() {
    state.messages = [];
    thread.replaceChildren();
    text.focus();
  }

  async function send(race) {
    const words = text.value.trim();
    if (!words || state.stop) return;
    const way = controls.way();
    if (race && way.name === "none") return notice("Choose who drafts: a race is with drafts against without.");
    state.stop = new AbortController();
    signal.addEventListener("abort", () => state.stop?.abort());
    busy(true);
    try {
      await opened();
      text.value = "";
      const messages = [...state.messages, { role: "user", content: words }];
      const view = race ? raceView(way) : answerView(way);
      const turn = h("article", { class: "turn" }, h("p", { class: "said" }, words), view.element);
      thread.append(turn);
      turn.scrollIntoView({ block: "nearest" });
      let answer = null;
      for (const lane of view.lanes) {
        const asked = { messages, draft: lane.draft, ...controls.options() };
        answer = await written(asked, lane, state.stop.signal);
        controls.rate(lane.draft === "none" ? "plain" : "drafted", answer);
      }
      view.done?.(controls.options().temperature);
      state.messages = [...messages, { role: "assistant", content: answer.text }];
    } catch (error) {
      if (error.name !== "AbortError") show(error);
      else if (!signal.aborted) thread.lastElementChild?.append(h("p", { class: "meta" }, "Stopped."));
    } finally {
      state.stop = null;
      busy(false);
    }
  }

  /** One answer into one lane; resolves with its summary. */
  async function written(asked, lane, stop) {
    const headers = { "content-type": "application/json" };
    const response = await ask(`${API}/answer`, { method: "POST", headers, body: JSON.stringify(asked), signal: stop });
    lane.begin();
    for await (const { event, data } of events(response)) {
      if (event === "error") throw new Error(data.message);
      if (event === "step") controls.live(asked.draft === "none" ? "plain" : "drafted", lane.step(data));
      if (event === "end") return lane.end(data);
    }
    throw new Error("The answer broke off.");
  }
}

/** The panel beside the conversation: who drafts, how tokens are chosen, the rates. */
function settings() {
  const way = h("select", { id: "way", onchange: explain });
  const what = h("p", { class: "meta" });
  const heat = h("input", { type: "range", id: "heat", min: 0, max: 1.5, step: 0.1, value: 0, oninput: warm });
  const heatSaid = h("output", { for: "heat" });
  const seed = h("input", { type: "number", id: "seed", min: 0, max: 4294967295, value: 0 });
  const most = h("input", { type: "range", id: "most", min: 16, max: 512, step: 16, value: 160, oninput: warm });
  const mostSaid = h("output", { for: "most" });
  const meters = { plain: meter("without drafts"), drafted: meter("with drafts") };
  let ways = [];
  function explain() {
    what.textContent = chosen().what ?? "";
  }
  function chosen() {
    return ways.find((one) => one.name === way.value) ?? { name: "none", label: "no drafts" };
  }
  function warm() {
    heatSaid.textContent = Number(heat.value) ? heat.value : "0, always the likeliest";
    mostSaid.textContent = `${most.value} tokens`;
    seed.disabled = !Number(heat.value);
  }
  warm();
  const top = () => Math.max(...Object.values(meters).map((one) => one.value), 1);
  const redraw = () => Object.values(meters).forEach((one) => one.draw(top()));
  const element = h("aside", { class: "panel settings", "aria-label": "Settings" },
    h("div", { class: "field" }, h("label", { for: "way" }, "Who drafts"), way, what),
    h("div", { class: "field" }, h("label", { for: "heat" }, "Temperature ", heatSaid), heat),
    h("div", { class: "field" }, h("label", { for: "seed" }, "Seed"), seed,
      h("p", { class: "meta" }, "The same draw again without drafts; with them only the same distribution, for how much is drafted depends on the clock.")),
    h("div", { class: "field" }, h("label", { for: "most" }, "Longest answer ", mostSaid), most),
    h("div", { class: "rates" }, h("h3", {}, "Tokens a second"), Object.values(meters).map((one) => one.element)),
    h("div", { class: "key" }, h("h3", {}, "What is shown"),
      h("p", {}, h("span", { class: "token" }, "written"), " by the model in a step of its own"),
      h("p", {}, h("span", { class: "token kept" }, "kept"), " from a draft: a token for nothing"),
      h("p", {}, h("del", { class: "token rejected" }, "rejected"), " drafted, and not what the model writes")));
  return {
    element,
    way: chosen,
    options: () => ({ temperature: Number(heat.value), max_tokens: Number(most.value),
      ...(Number(heat.value) ? { seed: Number(seed.value) || 0 } : {}) }),
    show(facts) {
      const before = way.value || "lookup";
      ways = facts.ways;
      way.replaceChildren(...ways.map((one) => h("option", { value: one.name }, one.label)));
      way.value = ways.some((one) => one.name === before) ? before : "lookup";
      explain();
    },
    live(kind, rate) {
      meters[kind].value = rate;
      redraw();
    },
    rate(kind, answer) {
      this.live(kind, answer.tokens_per_second);
    },
  };
}

function meter(name) {
  const bar = h("div", { class: "fill" });
  const said = h("output", { class: "number" }, "–");
  const element = h("div", { class: "meter" }, h("span", {}, name), h("div", { class: "track" }, bar), said);
  return {
    element,
    value: 0,
    draw(most) {
      bar.style.width = `${Math.max(0, Math.min(100, (100 * this.value) / most))}%`;
      said.textContent = this.value ? this.value.toFixed(1) : "–";
    },
  };
}
