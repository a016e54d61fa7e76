// How a verdict is said, in the catalogue, on a technique's page and in the Claims room.
import { figure, h } from "./dom.js";

const CLASSES = { held: "held", "not held": "failed", "not measurable here": "pending" };

/** The class of a found verdict: held, failed, pending, or none where there is no record. */
export function verdictClass(found) {
  return found ? CLASSES[found.verdict] ?? "none" : "none";
}

/** A badge: a sign and words. `claimed` is false for a technique without a claim. */
export function badge(found, claimed = true) {
  if (!claimed) return h("span", { class: "badge" }, "no claim");
  if (!found) return h("span", { class: "badge" }, "not measured");
  const place = found.here ? "" : ", elsewhere";
  return h("span", { class: `badge ${verdictClass(found)}`, title: found.why ?? origin(found) }, `${found.verdict}${place}`);
}

/** Whose machine a figure is from. */
export function origin(found) {
  const { processor, cores, torch } = found.machine;
  const machine = `${processor ?? "unknown processor"}, ${cores ?? "?"} cores, torch ${torch ?? "?"}`;
  return `${found.own ? "measured in this folder" : "came with the checkout"}: ${machine}`;
}

/** A finding's value with its unit and spread. */
export function value(finding) {
  const spread = finding.spread ? ` (${figure(finding.spread[0])} to ${figure(finding.spread[1])})` : "";
  return `${figure(finding.value)} ${finding.unit ?? ""}`.trim() + spread;
}
