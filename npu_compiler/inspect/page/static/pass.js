// What one stage did, and what it did not do: rewrites, refusals, nearest misses, questions about sizes.

import { count, h, fill, link, plural, emptyNote } from "./dom.js";
import { go, graph, state } from "./state.js";

const element = h("div", { class: "page" });
const FIRST = 60;

// A list whose rest is shown on request.
function some(entries, show) {
  const box = h("div", { class: "cards" }, entries.slice(0, FIRST).map(show));
  if (entries.length > FIRST) {
    const more = h("button", { type: "button", class: "more", onclick: () => { more.remove(); box.append(...entries.slice(FIRST).map(show)); } }, `show ${count(entries.length - FIRST)} more`);
    box.append(more);
  }
  return box;
}

function callLink(name, stage) {
  const known = stage >= 0 && graph().program(stage)?.index.has(name);
  return known ? link(name, () => go({ stage, view: "program", call: name, mark: "" })) : h("span", { class: "gone" }, name);
}

const callLinks = (names, stage) => (names ?? []).map((name) => [callLink(name, stage), " "]);

const fired = (entry) => h("div", { class: "card" },
  h("div", {}, h("b", {}, entry.rule), entry.layers > 1 ? h("span", { class: "dim" }, ` in ${entry.layers} layers`) : null,
    entry.kernels || entry.bytes ? h("span", { class: "saves" }, `saves ${[entry.kernels ? plural(entry.kernels, "kernel") : "", entry.bytes && entry.bytes !== "0" ? `${entry.bytes} bytes` : ""].filter(Boolean).join(", ")}`) : null),
  h("div", { class: "place" }, entry.place),
  h("div", { class: "names" }, h("span", { class: "minus" }, "−"), callLinks(entry.nodes, state.stage - 1)),
  entry.made?.length ? h("div", { class: "names" }, h("span", { class: "plus" }, "+"), callLinks(entry.made, state.stage)) : null);

const refused = (entry) => h("div", { class: "card" }, h("b", {}, entry.rule), h("div", {}, entry.reason), h("div", { class: "place" }, entry.place));

const missed = (entry) => h("div", { class: "card" },
  h("div", {}, h("b", {}, entry.rule), h("span", { class: "dim" }, ` matched ${plural(entry.matched, "call")} at `), callLink(entry.anchor, state.stage - 1)),
  h("div", {}, entry.reason || "nothing fits its first argument"),
  entry.stopper ? h("div", { class: "names" }, h("span", { class: "dim" }, "stopped by "), callLink(entry.stopper, state.stage - 1)) : null,
  h("div", { class: "place" }, entry.place));

const asked = (entry) => h("div", { class: "card fact" }, h("span", { class: `truth ${entry.answer}` }, entry.answer), h("code", {}, entry.text), (entry.times ?? 1) > 1 ? h("span", { class: "dim" }, ` ${entry.times} times`) : null);

function group(title, entries, show, note) {
  if (!entries?.length) return null;
  return [h("h3", {}, title, h("span", { class: "count" }, count(entries.length))), note ? h("p", { class: "dim" }, note) : null, some(entries, show)];
}

function draw() {
  const stage = graph().stages[state.stage];
  const about = graph().about.passes?.find((pass) => pass.name === stage.name);
  const rules = about?.rules ?? [];
  const times = (list, rule) => (list ?? []).filter((entry) => entry.rule === rule).length;
  const misses = [...(stage.attempts ?? [])].sort((a, b) => b.matched - a.matched);
  const idle = !stage.error && !stage.fired?.length && !stage.refused?.length && !misses.length && !stage.asked?.length;
  fill(element,
    h("h2", {}, stage.name, stage.seconds ? h("span", { class: "dim" }, `  ${(stage.seconds * 1e3).toFixed(1)} ms`) : null),
    about?.place || stage.note ? h("p", { class: "lead" }, about?.place ?? stage.note) : null,
    stage.error ? h("p", { class: "error" }, stage.error) : null,
    idle && !rules.length && !stage.note ? emptyNote(about ? "It had nothing to do" : "This stage is no pass", about ? "No call of the program is one that this pass looks for." : "It is the program as it stood here. Step on with ]") : null,
    rules.length ? h("table", {}, h("thead", {}, h("tr", {}, ["rule", "fired", "left out", "missed", "pattern ends in", "written in"].map((title) => h("th", {}, title)))),
      h("tbody", {}, rules.map((rule) => h("tr", { class: rule.disabled ? "dim" : "" },
        h("td", {}, h("b", {}, rule.name), rule.disabled ? " (disabled)" : ""), h("td", { class: "n" }, times(stage.fired, rule.name) || ""), h("td", { class: "n" }, times(stage.refused, rule.name) || ""), h("td", { class: "n" }, times(misses, rule.name) || ""),
        h("td", {}, h("code", {}, (rule.roots ?? []).join(", "))), h("td", { class: "dim" }, rule.file ? `${rule.file.split("/").slice(-2).join("/")}:${rule.line}` : ""))))) : null,
    group("Rewrites", stage.fired, fired),
    group("Left out", stage.refused, refused, "Rewrites that were possible and not made."),
    group("Nearest misses", misses, missed, "Where a rule was tried in vain, the furthest first."),
    group("Questions about sizes", stage.asked, asked),
  );
  element.scrollTop = 0;
}

export const passView = { title: "Pass", element, shown: draw, update(changed) { if (changed.has("stage") || changed.has("graph")) draw(); } };
