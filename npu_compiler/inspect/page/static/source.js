// The lines of the user's model that the program comes from: each with its calls at this stage and its captured tasks.

import { count, h, fill, link, micros, emptyNote } from "./dom.js";
import { go, graph, program, selected, state } from "./state.js";

const files = h("div", { class: "files" });
const text = h("div", { class: "lines", tabindex: 0, role: "listbox", "aria-label": "Lines" });
const found = h("div", { class: "found" });
const element = h("div", { class: "source" }, files, text, found);
let lines = [];

// The lines of a file that have calls in the lowered program or at this stage.
function collect() {
  const byFile = new Map();
  const add = (from, key) => {
    for (let i = 0; i < from.size; i += 1) {
      if (!from.isCall(i)) continue;
      const place = from.place(i);
      if (!place.file) continue;
      if (!byFile.has(place.file)) byFile.set(place.file, new Map());
      const inFile = byFile.get(place.file);
      if (!inFile.has(place.line)) inFile.set(place.line, { line: place.line, text: place.text, fn: place.fn, lowered: [], now: [], micros: 0 });
      const entry = inFile.get(place.line);
      entry[key].push(i);
      if (key === "now") entry.micros += from.micros(i) * from.layers(i);
    }
  };
  add(graph().all[0], "lowered");
  add(program(), "now");
  return byFile;
}

function draw() {
  if (!program()) { fill(element, emptyNote("There is no program", "The compilation ended before it had one.")); return; }
  fill(element, files, text, found);
  const byFile = collect();
  if (!byFile.size) { fill(files); fill(found); fill(text, emptyNote("No call knows its line", "The graph was traced without stack traces.")); return; }
  const order = [...byFile].sort((a, b) => sum(b[1]) - sum(a[1]));
  const file = byFile.has(state.file) ? state.file : order[0][0];
  fill(files, order.map(([name, inFile]) => h("button", { class: name === file ? "selected" : "", type: "button", title: name, onclick: () => go({ file: name, line: 0 }) },
    name.split("/").at(-1), h("span", { class: "calls" }, count(sum(inFile))))));
  lines = [...byFile.get(file).values()].sort((a, b) => a.line - b.line);
  const total = Math.max(...lines.map((entry) => entry.micros), 1e-9);
  let fn = null;
  let last = 0;
  const rows = [h("div", { class: "path" }, file)];
  for (const entry of lines) {
    if (entry.fn !== fn) { fn = entry.fn; rows.push(h("div", { class: "function" }, fn ? `def ${fn}` : "")); } else if (entry.line > last + 1) rows.push(h("div", { class: "gap" }, "⋯"));
    last = entry.line;
    const bar = h("span", { class: "share" });
    bar.style.setProperty("--share", String(entry.micros / total));
    rows.push(h("div", { class: `line ${entry.line === state.line ? "selected" : ""} ${entry.now.length ? "" : "quiet"}`, role: "option", "aria-selected": entry.line === state.line, data: { line: entry.line }, onclick: () => go({ file, line: entry.line }) },
      h("span", { class: "number" }, entry.line), h("code", {}, entry.text || " "), h("span", { class: "calls", title: "calls at this stage" }, entry.now.length ? count(entry.now.length) : ""), h("span", { class: "cost" }, entry.micros ? micros(entry.micros) : ""), bar));
  }
  fill(text, rows);
  text.querySelector(".line.selected")?.scrollIntoView({ block: "nearest" });
  drawFound(file, lines.find((entry) => entry.line === state.line));
}

const sum = (inFile) => [...inFile.values()].reduce((total, entry) => total + entry.now.length, 0);

function drawFound(file, entry) {
  if (!entry) { fill(found, emptyNote("Choose a line", "Its calls at this stage, what they were when lowered, and the tasks that they are captured as are shown here.")); return; }
  const stage = graph().stages[state.stage].name;
  const from = program();
  const current = selected(); // it stands first
  const lowered = graph().all[0];
  const row = (of, i, patch) => h("div", { class: `hit ${of.name(i) === state.call ? "selected" : ""}` }, link(of.name(i), () => go({ call: of.name(i), ...patch })), h("code", {}, ` ${of.shortTarget(i)}`), h("span", { class: "dim" }, `  ${of.values(i)}`), h("span", { class: "dim end" }, of.module(i)));
  const tasks = [...new Set(entry.lowered.flatMap((i) => graph().inFinal(lowered, i)).concat(from === graph().final ? entry.now : entry.now.flatMap((i) => graph().inFinal(from, i))))].flatMap((call) => (graph().launches.get(call) ?? []).map((at) => [call, ...at]));
  fill(found,
    h("div", { class: "head" }, h("b", {}, `${file.split("/").at(-1)}:${entry.line}`), " ", link("only this line in the program", () => go({ view: "program", file, line: entry.line }))),
    h("h3", {}, `Calls at ${stage}`, h("span", { class: "count" }, count(entry.now.length))),
    entry.now.length ? clipped([...entry.now].sort((a, b) => (b === current) - (a === current)), (i) => row(from, i, {})) : h("p", { class: "dim" }, "None is left: see what stands for them below."),
    h("h3", {}, "Captured tasks", h("span", { class: "count" }, count(tasks.length))),
    tasks.length ? clipped(tasks, ([call, number, at]) => {
      const [, stream, start, taken] = graph().timelines[number].launches[at];
      const { final } = graph();
      return h("div", { class: "hit" }, link(`${graph().captures[number]?.key ?? "not captured"}: task ${at}`, () => go({ view: "streams", capture: number, call: final.name(call), stage: graph().finalStage })), h("code", {}, ` ${final.shortTarget(call)}`), h("span", { class: "dim end" }, `stream ${stream}, at ${micros(start)}, ${micros(taken)}`));
    }) : h("p", { class: "dim" }, "None: it launches nothing."),
    state.stage ? [h("h3", {}, "Calls when lowered", h("span", { class: "count" }, count(entry.lowered.length))), clipped(entry.lowered, (i) => row(lowered, i, { stage: 0, mark: "" }))] : null,
  );
}

function clipped(entries, show) {
  const box = h("div", { class: "hits" }, entries.slice(0, 40).map(show));
  if (entries.length > 40) box.append(h("button", { class: "more", type: "button", onclick: (event) => { event.target.remove(); box.append(...entries.slice(40).map(show)); } }, `show ${count(entries.length - 40)} more`));
  return box;
}

text.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || !lines.length) return;
  event.preventDefault();
  const at = lines.findIndex((entry) => entry.line === state.line);
  const next = lines[Math.max(0, Math.min(lines.length - 1, at + by))];
  go({ file: text.querySelector(".path").textContent, line: next.line }, true);
});

export const sourceView = { title: "Source", element, shown: draw, update(changed) { if (["graph", "stage", "file", "line", "call"].some((key) => changed.has(key))) draw(); }, focus: () => text.focus() };
