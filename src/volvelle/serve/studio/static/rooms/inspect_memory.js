// The memory of a training step: choices on the left, the peak by what it holds on the right, earlier plans below.
import { duration, h, post, settled, show } from "../dom.js";
import { bytes, choice, powers, slider, tick } from "./inspect_controls.js";

const KINDS = [["weights", 0], ["gradients", 1], ["optimiser", 2], ["activations", 3], ["temporaries", 4], ["buffers", 5], ["inputs", 5], ["communication", 5]];
const CARDS = [["0", "this machine's processor"], ["1x24", "one card of 24 GB"], ["1x80", "one card of 80 GB"], ["2x80", "two cards of 80 GB"], ["8x80", "eight cards of 80 GB"], ["20x80", "twenty cards of 80 GB"]];
const METHODS = [["full", "everything"], ["lora", "LoRA"], ["adapter", "bottleneck adapters"], ["prefix", "a prefix"]];
const PRECISIONS = [["fp32", "fp32"], ["amp", "fp32 weights, bf16 autocast"], ["bf16", "all in bf16"], ["bf16-master", "bf16, fp32 master copies"], ["fp16-master", "fp16, fp32 master copies"]];
const OPTIMIZERS = [["adamw", "AdamW, fused"], ["adamw-foreach", "AdamW, foreach"], ["momentum", "SGD with momentum"], ["sgd", "SGD"], ["adafactor", "Adafactor"]];

export async function mount(root, facts, signal) {
  const change = settled(350, plan);
  const names = Object.entries(facts.models).sort((a, b) => a[1].parameters - b[1].parameters);
  const model = choice("Model", names.map(([name, one]) => [name, `${name} (${short(one.parameters)})`]), "smollm2-135m", () => { fitLength(); change(); });
  const method = choice("What is trained", METHODS, "full", change);
  const precision = choice("Precision", PRECISIONS, "amp", change);
  const optimizer = choice("Optimiser", OPTIMIZERS, "adamw", change);
  const cards = choice("On", CARDS, "2x80", change);
  const shard = choice("Many cards hold", [["ddp", "everything each (DDP)"], ["fsdp", "a share each (FSDP)"]], "ddp", change);
  const batch = slider("Batch a card", powers(1, 256), 1, change);
  const length = slider("Length in tokens", powers(64, 32768), 1024, change);
  const again = tick("recompute blocks in the backward pass (checkpointing)", false, change);
  const status = h("p", { class: "meta", role: "status" });
  const result = h("div", { class: "plan" });
  const past = h("div", { class: "past" });
  const all = [model, method, precision, optimizer, cards, shard, batch, length];
  root.append(h("div", { class: "split turned" },
    h("form", { class: "panel choices", "aria-label": "The step", onsubmit: (event) => event.preventDefault() }, all.map((one) => one.element), again.element),
    h("div", {}, h("section", { class: "panel", "aria-label": "The plan" }, status, result), past)));
  const state = { asked: null, plans: [] };
  fitLength();
  plan(); // the room is there before the step is planned

  function fitLength() {
    length.limit(facts.models[model.value].context);
  }

  async function plan() {
    state.asked?.abort();
    const asked = new AbortController();
    state.asked = asked;
    signal.addEventListener("abort", () => asked.abort());
    const [count, gigabytes] = cards.value === "0" ? [0, 80] : cards.value.split("x").map(Number);
    shard.select.disabled = count < 2;
    const body = { model: model.value, method: method.value, precision: precision.value, optimizer: optimizer.value, batch: batch.value,
      length: length.value, checkpointing: again.value, cards: count, gigabytes, shard: shard.value };
    const began = performance.now();
    const clock = setInterval(() => { status.textContent = `Planning… ${duration((performance.now() - began) / 1000)}`; }, 200);
    result.setAttribute("aria-busy", "true");
    try {
      const found = await post("/studio/api/inspect/memory", body, { signal: asked.signal });
      const words = `${body.model}, ${body.method}, ${body.precision}${body.checkpointing ? ", checkpointing" : ""}, ${body.batch} × ${body.length} tokens, ${cards.select.selectedOptions[0].textContent}${count > 1 ? `, ${body.shard}` : ""}`;
      status.textContent = `${found.how}, in ${duration(found.seconds)}; nothing was allocated.`;
      const most = Math.max(found.total, found.capacity ?? 0);
      result.replaceChildren(...drawn(found, most));
      state.plans = [{ found, words }, ...state.plans.filter((one) => one.words !== words)].slice(0, 6);
      const widest = Math.max(...state.plans.map((one) => one.found.total));
      past.replaceChildren(...(state.plans.length < 2 ? [] : [h("h2", {}, "Plans so far"),
        ...state.plans.map((one) => h("div", { class: "former" }, h("p", { class: "meta" }, one.words, " ", h("b", { class: "number" }, bytes(one.found.total))), bar(one.found, widest)))]));
    } catch (error) {
      if (error.name === "AbortError") return;
      status.textContent = error.message;
      result.replaceChildren();
      show(error);
    } finally {
      clearInterval(clock);
      if (state.asked === asked) result.removeAttribute("aria-busy");
    }
  }
}

function drawn(found, most) {
  const rows = KINDS.filter(([name]) => found.sizes[name] > 0);
  const verdict = found.capacity === null ? null
    : h("span", { class: `badge ${found.fits ? "held" : "failed"}` }, `${found.fits ? "fits" : "does not fit"}: ${bytes(found.total)} of ${bytes(found.capacity)} on each card`);
  return [
    h("p", { class: "peak" }, h("strong", { class: "number" }, bytes(found.total)), " at the peak of a step ", verdict),
    bar(found, most),
    h("table", { class: "parts-of" }, h("tbody", {}, rows.map(([name, colour]) => h("tr", {},
      h("td", {}, h("i", { class: `swatch k${colour}` }), name), h("td", { class: "number" }, bytes(found.sizes[name])),
      h("td", { class: "number" }, `${((100 * found.sizes[name]) / found.total).toFixed(1)} %`))))),
  ];
}

function bar(found, most) {
  const parts = KINDS.filter(([name]) => found.sizes[name] > 0);
  const words = parts.map(([name]) => `${name} ${bytes(found.sizes[name])}`).join(", ");
  const line = found.capacity && found.capacity < most ? h("span", { class: "limit", title: "what a card offers", style: { left: `${(100 * found.capacity) / most}%` } }) : null;
  return h("div", { class: "stack", role: "img", "aria-label": words }, parts.map(([name, colour]) =>
    h("span", { class: `k${colour}`, title: `${name} ${bytes(found.sizes[name])}`, style: { width: `${(100 * found.sizes[name]) / most}%` } })), line);
}

function short(count) {
  return count >= 1e9 ? `${(count / 1e9).toPrecision(2)}B` : `${Math.round(count / 1e6)}M`;
}
