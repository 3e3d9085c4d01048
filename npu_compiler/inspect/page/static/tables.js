// The ledger of captures, what is known of sizes, and where the bundle was made.

import { count, h, fill, emptyNote } from "./dom.js";
import { data, go, graph, state } from "./state.js";

const table = (titles, rows) => h("table", {}, h("thead", {}, h("tr", {}, titles.map((title) => h("th", {}, title)))), h("tbody", {}, rows));
const cell = (text, kind = "") => h("td", { class: kind }, text);
const pairs = (entries) => table(["", ""], entries.map(([name, text]) => h("tr", {}, h("th", { scope: "row" }, name), cell(text))));
const view = (title, element, draw) => ({ title, element, shown: draw, update(changed) { if (changed.has("graph") || changed.has("stage")) draw(); } });

const ledger = h("div", { class: "page" });

function drawLedger() {
  const { captures } = graph();
  const last = captures.at(-1);
  const total = captures.reduce((sum, entry) => [sum[0] + entry.milliseconds, sum[1] + entry.mebibytes], [0, 0]);
  fill(ledger, h("h2", {}, "Captures"), captures.length ? [
    h("p", { class: "lead" }, `${count(captures.length)} captured, ${total[0].toFixed(1)} ms and ${total[1].toFixed(1)} MiB in all. Figures of the machine that wrote the bundle.`),
    table(["key", "why", "calls", "ms", "MiB", "streams", "replays before it", "evicted for it", ""], captures.map((entry, number) => h("tr", {},
      cell(h("b", {}, entry.key)), cell(entry.reason), cell(count(entry.calls), "n"), cell(entry.milliseconds.toFixed(1), "n"), cell(entry.mebibytes.toFixed(1), "n"), cell(entry.streams || "one"), cell(count(entry.replays), "n"), cell(entry.evicted.join(", ")),
      cell(h("button", { class: "link", type: "button", onclick: () => go({ view: "streams", capture: number }) }, "timeline"))))),
    Object.keys(last.uncaptured).length ? [h("h3", {}, "Ran without a capture, up to the last one"), table(["why", "times"], Object.entries(last.uncaptured).map(([why, times]) => h("tr", {}, cell(why), cell(count(times), "n"))))] : null,
  ] : emptyNote("Nothing was captured", "The graph was compiled and not captured before the bundle was closed: its second call captures it, unless capturing is off."));
}

export const ledgerView = view("Captures", ledger, drawLedger);

const facts = h("div", { class: "page" });

function drawFacts() {
  const from = graph().program(state.stage);
  const asked = graph().stages.flatMap((stage) => (stage.asked ?? []).map((fact) => [stage.name, fact]));
  const sizes = Object.entries(from?.columns.sizes ?? {});
  const known = from?.columns.assumptions ?? [];
  const providers = graph().plan?.providers ?? [];
  fill(facts, h("h2", {}, "Facts"),
    h("h3", {}, "Sizes of the call that was compiled"), sizes.length ? pairs(sizes.map(([name, size]) => [name, count(size)])) : h("p", { class: "dim" }, "All sizes are fixed."),
    known.length ? [h("h3", {}, "Known of them", h("span", { class: "count" }, count(known.length))), h("div", { class: "cards" }, known.map((text) => h("div", { class: "card fact" }, h("code", {}, text))))] : null,
    h("h3", {}, "Asked and answered", h("span", { class: "count" }, count(asked.length))),
    asked.length ? table(["pass", "answer", "why", "times"], asked.map(([name, fact]) => h("tr", {}, cell(name), cell(h("span", { class: `truth ${fact.answer}` }, fact.answer)), cell(h("code", {}, fact.text)), cell(count(fact.times ?? 1), "n")))) : h("p", { class: "dim" }, "No pass had to ask whether a relation of sizes holds."),
    providers.length ? [h("h3", {}, "What fused operators run on"), h("div", { class: "cards" }, providers.map((text) => h("div", { class: "card" }, text)))] : null);
}

export const factsView = view("Facts", facts, drawFacts);

const about = h("div", { class: "page" });

function drawAbout() {
  const { environment, bundle, started } = data();
  const { options, given, inputs } = graph().about;
  fill(about, h("h2", {}, "About"),
    pairs([["bundle", bundle], ["written", new Date(started * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC"], ["device", environment.device], ["CANN", environment.cann], ["platform", environment.platform], ["rank", `${environment.rank} of ${environment.ranks}`], ...Object.entries(environment.variables)]),
    h("h3", {}, "Versions"), pairs(Object.entries(environment.versions)),
    h("h3", {}, "Options"), table(["option", "value", ""], Object.entries(options).sort((a, b) => given.includes(b[0]) - given.includes(a[0])).map(([name, text]) => h("tr", { class: given.includes(name) ? "" : "dim" }, cell(name), cell(h("code", {}, text)), cell(given.includes(name) ? "given" : "default")))),
    inputs.length ? [h("h3", {}, "Inputs", h("span", { class: "count" }, count(inputs.length))), h("p", { class: "small" }, inputs.map((name, at) => [at ? ", " : "", h("code", {}, name)]))] : null);
}

export const aboutView = view("About", about, drawAbout);
