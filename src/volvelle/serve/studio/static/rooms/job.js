// A verb that the studio runs: its state, its newest lines, a way to end it.
import { ask, duration, events, h, post, show } from "../dom.js";

/** Show job `number` in `place` until it has ended; resolves with what it came to: {state, code, seconds, …}. */
export async function followJob(number, place, signal) {
  const state = h("span", { class: "meta" }, "waiting…");
  const output = h("pre", { class: "console", tabindex: "0", "aria-label": "Output" });
  const cancel = h("button", { type: "button", onclick: () => post(`/studio/api/jobs/${number}/cancel`).catch(show) }, "Cancel");
  const view = h("div", { class: "job" }, h("div", { class: "bar" }, state, h("span", { class: "grow" }), cancel), output);
  place.append(view);
  let last = null;
  try {
    for await (const { event, data } of events(await ask(`/studio/api/jobs/${number}/events`, { signal }))) {
      if (event === "line") {
        output.append(`${data}\n`);
        output.scrollTop = output.scrollHeight;
      } else if (event === "state") {
        last = data;
        const took = data.seconds ? `, ${duration(data.seconds)}` : "";
        state.replaceChildren(h("code", {}, data.command), ` ${data.state}${took}`);
      }
    }
  } finally {
    cancel.remove();
  }
  if (last?.state === "finished") view.remove();
  return last ?? { state: "failed" };
}
