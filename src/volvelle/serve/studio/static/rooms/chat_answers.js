// Answers as they are written: tokens with what became of each draft, and two answers side by side.
import { h } from "../dom.js";

const LONG = 40; // tokens from which a rate says something

/** One answer with drafts of `way`. `lanes` are what is written one after the other, here one. */
export function answerView(way) {
  const one = lane(way.name, way.label);
  return { element: h("div", { class: "answer" }, one.element), lanes: [one] };
}

/** The same prompt twice, without drafts and with them, and what came of it. */
export function raceView(way) {
  const lanes = [lane("none", "without drafts"), lane(way.name, `with drafts: ${way.label}`)];
  const verdict = h("p", { class: "verdict", role: "status" });
  return {
    element: h("div", { class: "answer" }, h("div", { class: "race" }, lanes.map((one) => one.element)), verdict),
    lanes,
    done(temperature) {
      const [plain, drafted] = lanes.map((one) => one.answer);
      const ratio = drafted.tokens_per_second / plain.tokens_per_second;
      const at = plain.ids.findIndex((id, i) => id !== drafted.ids[i]);
      const same = at < 0 && plain.ids.length === drafted.ids.length;
      const speed = plain.ids.length < LONG || !Number.isFinite(ratio) ? "Too short an answer to compare rates. " : `${ratio.toFixed(2)} times the rate of plain decoding. `;
      const kept = `${drafted.accepted_per_step.toFixed(2)} tokens a step instead of 1. `;
      let words = `The answers are the same, token for token (${plain.ids.length} of them).`;
      if (!same && temperature) words = "With a temperature above 0 the answers are drawn from the same distribution, but they are not the same draw.";
      else if (!same) words = `The answers differ from token ${(at < 0 ? Math.min(plain.ids.length, drafted.ids.length) : at) + 1} on: rounding decided between two words that are almost equally likely.`;
      verdict.replaceChildren(h("span", { class: `badge ${same ? "held" : temperature ? "pending" : "failed"}` }, same ? "equal" : "not equal"), ` ${speed}${kept}${words}`);
    },
  };
}

/** One answer in the making: begin, a step at a time (returns tokens a second so far), end (returns its summary). */
function lane(draft, label) {
  const body = h("div", { class: "tokens" });
  const line = h("p", { class: "meta number" }, "waiting…");
  const element = h("section", { class: "lane", "aria-label": `Answer ${label}` }, h("h3", {}, label), body, line);
  let tokens = 0, kept = 0, rejected = 0, steps = 0;
  const self = {
    draft,
    element,
    answer: null,
    begin() {
      line.textContent = "reading the prompt…";
    },
    step(data) {
      steps += 1;
      tokens += data.tokens.length;
      kept += data.tokens.filter((one) => one.drafted).length;
      rejected += data.rejected.length;
      // Rejected tokens stood where the step's last token, the model's own, now stands.
      const spans = data.tokens.map((one) => one.text && h("span", { class: one.drafted ? "token kept" : "token" }, one.text));
      const last = spans.pop();
      const wrong = data.rejected.length ? h("del", { class: "token rejected", title: "drafted and rejected" }, data.rejected.join("").replaceAll("\n", "⏎").replace(/ {2,}/g, " ")) : null;
      body.append(...[...spans, wrong, last].filter(Boolean));
      const rate = data.at > 0 ? (tokens - 1) / data.at : 0;
      line.textContent = told(tokens, rate, steps, kept, rejected);
      return rate;
    },
    end(answer) {
      self.answer = answer;
      const why = { eos: "the model ended it", stop: "stopped", length: "cut at the longest length" }[answer.finish];
      line.textContent = `${told(tokens, answer.tokens_per_second, steps, kept, rejected)} · ${why}`;
      return answer;
    },
  };
  return self;
}

function told(tokens, rate, steps, kept, rejected) {
  const drafts = kept + rejected ? ` · ${kept} kept, ${rejected} rejected` : "";
  return `${tokens} tokens in ${steps} steps${rate ? ` · ${rate.toFixed(1)} a second` : ""}${drafts}`;
}
