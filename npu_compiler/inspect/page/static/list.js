// The program as a list of lines. Only the lines on the screen are elements; the same ones are filled again and again.

import { count, h, fill, micros, plural, bytes, signed, emptyNote, link } from "./dom.js";
import { ENGINES, ENGINE_NOTE, within } from "./model.js";
import { go, graph, program, selected, state } from "./state.js";

const ROW = 22;
const MARKS = { same: "", added: "+", removed: "−", changed: "~", moved: "↕" };

class VirtualList {
  constructor(make, put) {
    this.make = make;
    this.put = put;
    this.count = 0;
    this.pool = [];
    this.spacer = h("div", { class: "spacer" });
    this.element = h("div", { class: "rows", tabindex: 0, role: "listbox", "aria-label": "Calls" }, this.spacer);
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.element);
  }
  show(amount) {
    this.count = amount;
    this.spacer.style.height = `${amount * ROW}px`;
    this.draw(true);
  }
  draw(all = false) {
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW) - 8);
    const size = Math.ceil(this.element.clientHeight / ROW) + 17;
    while (this.pool.length < size) {
      const row = this.make();
      this.spacer.append(row.element);
      this.pool.push(row);
      all = true;
    }
    for (let index = first; index < first + this.pool.length; index += 1) {
      const row = this.pool[index % this.pool.length];
      if (index >= this.count) { if (row.index !== -1) { row.index = -1; row.element.hidden = true; } continue; }
      if (!all && row.index === index) continue;
      if (row.index !== index) {
        row.element.style.transform = `translateY(${index * ROW}px)`;
        row.element.hidden = false;
        row.index = index;
      }
      this.put(row, index);
    }
  }
  reveal(index) {
    const top = index * ROW;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop + ROW || top > scrollTop + clientHeight - 3 * ROW) this.element.scrollTop = top - clientHeight / 3;
  }
}

let lines = [];
let near = { reads: new Set(), users: new Set() };
const summary = h("div", { class: "summary" });
const filters = h("div", { class: "filters" });
const map = h("canvas", {});
const sight = h("div", { class: "sight" });
const side = h("div", { class: "map", "aria-hidden": "true" }, map, sight);
const body = new VirtualList(makeRow, putRow);
const none = h("div", {});
const element = h("div", { class: "program" }, summary, filters, h("div", { class: "listing" }, body.element, side), none);
body.element.addEventListener("keydown", keydown);
body.element.addEventListener("scroll", placeSight, { passive: true });
new ResizeObserver(() => { if (lines.length) drawMap(); }).observe(side);
side.addEventListener("pointerdown", (event) => { side.setPointerCapture(event.pointerId); jump(event); });
side.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });

function makeRow() {
  const parts = Object.fromEntries(["number", "mark", "name", "target", "args", "values", "cost", "module"].map((part) => [part, h("span", { class: part })]));
  const element = h("div", { class: "row", role: "option" }, parts.number, parts.mark, h("span", { class: "code" }, parts.name, parts.target, parts.args), parts.values, parts.cost, parts.module);
  const row = { element, parts, index: -1 };
  element.addEventListener("click", () => choose(row.index));
  return row;
}

function putRow(row, index) {
  const { kind, i, program: from } = lines[index];
  const { parts } = row;
  const launched = from.engine(i);
  const isSelected = kind !== "removed" && from.name(i) === state.call;
  row.element.className = `row ${kind} op${from.columns.op[i]} ${launched ? "" : "quiet"}${isSelected ? " selected" : ""}${kind !== "removed" && near.reads.has(i) ? " reads" : ""}${kind !== "removed" && near.users.has(i) ? " uses" : ""}`;
  row.element.setAttribute("aria-selected", isSelected);
  row.element.id = isSelected ? "selected-row" : "";
  parts.number.textContent = i;
  parts.mark.textContent = MARKS[kind];
  parts.name.textContent = from.name(i);
  parts.target.textContent = from.isCall(i) ? ` = ${from.shortTarget(i)}` : from.columns.op[i] === 3 ? "" : ` : ${["input", "constant"][from.columns.op[i]]}`;
  parts.args.textContent = from.isInput(i) ? "" : `(${from.args(i)})`;
  parts.values.textContent = from.values(i) + (from.layers(i) > 1 ? `  ×${from.layers(i)} layers` : "") + (from.once.has(i) ? "  once" : "") + onStream(i);
  parts.cost.textContent = launched ? micros(from.micros(i)) : "";
  parts.cost.className = `cost engine${launched}`;
  const path = from.module(i).split(".");
  parts.module.textContent = path.length > 3 ? `…${path.slice(-3).join(".")}` : path.join(".");
  parts.module.title = path.join(".");
}

// Where a stage that plans streams has a call run.
function onStream(i) {
  const said = graph().stages[state.stage].streams?.[i];
  return said === undefined ? "" : `  ${graph().texts[said]}`;
}

function choose(index, quiet = false) {
  const line = lines[index];
  if (!line) return;
  if (line.kind === "removed") go({ stage: state.stage - 1, call: line.program.name(line.i), mark: "" });
  else go({ call: line.program.name(line.i) }, quiet);
}

function position() { return lines.findIndex((line) => line.kind !== "removed" && line.program.name(line.i) === state.call); }

export function step(by) {
  let at = position();
  if (at < 0) at = by > 0 ? -1 : lines.length;
  for (at += by; lines[at]?.kind === "removed"; at += Math.sign(by));
  at = Math.max(0, Math.min(lines.length - 1, at));
  choose(lines[at]?.kind === "removed" ? -1 : at, true);
}

export function nextChange(by) {
  const start = position();
  for (let at = start + by; at >= 0 && at < lines.length; at += by) {
    if (lines[at].kind !== "same" && lines[at].kind !== "removed") { choose(at, true); return; }
  }
}

function keydown(event) {
  const page = Math.max(1, Math.floor(body.element.clientHeight / ROW) - 2);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -lines.length, End: lines.length };
  if (event.key in moves && !event.ctrlKey && !event.altKey && !event.metaKey) { event.preventDefault(); step(moves[event.key]); }
}

function jump(event) {
  const at = (event.clientY - side.getBoundingClientRect().top) / unitOf();
  body.element.scrollTop = at * ROW - body.element.clientHeight / 2;
}

const unitOf = () => Math.min(ROW / 4, side.clientHeight / Math.max(1, lines.length));

function placeSight() {
  const unit = unitOf() / ROW;
  sight.style.transform = `translateY(${body.element.scrollTop * unit}px)`;
  sight.style.height = `${Math.max(3, body.element.clientHeight * unit)}px`;
}

// The whole program at a glance: its changes, and the engines that work.
function drawMap() {
  const { clientWidth: width, clientHeight: height } = map;
  if (!width || !height) return;
  const scale = devicePixelRatio;
  if (map.width !== Math.round(width * scale) || map.height !== Math.round(height * scale)) { map.width = width * scale; map.height = height * scale; }
  const pen = map.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const engines = ENGINES.map((name) => color(`--${name}`));
  const kinds = { added: color("--added"), removed: color("--removed"), changed: color("--changed"), moved: color("--changed") };
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  const unit = unitOf();
  const every = Math.max(1, Math.floor(0.5 / unit));
  for (let at = 0; at < lines.length; at += every) {
    const { kind, i, program: from } = lines[at];
    pen.fillStyle = engines[from.engine(i)];
    pen.globalAlpha = from.engine(i) ? 0.7 : 0.15;
    pen.fillRect(12, at * unit, width - 16, Math.max(0.6, unit - 0.2));
    if (kind !== "same") { pen.globalAlpha = 1; pen.fillStyle = kinds[kind]; pen.fillRect(2, at * unit, 7, Math.max(1.5, unit)); }
  }
  pen.globalAlpha = 1;
  placeSight();
}

function keep(line, words) {
  const { kind, i, program: from } = line;
  if (state.mark && (state.mark === "launches" ? !from.engine(i) : kind !== state.mark && !(state.mark === "changed" && kind === "moved"))) return false;
  if (state.module && !within(from.module(i), state.module)) return false;
  if (state.line) { const place = from.place(i); if (place.line !== state.line || place.file !== state.file) return false; }
  return words.every((word) => from.hay[i].includes(word));
}

function drawFilters(all) {
  const chips = [];
  const chip = (text, patch) => chips.push(h("button", { class: "chip", type: "button", onclick: () => go(patch), title: "Show all again" }, text, h("i", {}, "×")));
  if (state.filter) chip(`“${state.filter}”`, { filter: "" });
  if (state.module) chip(`module ${state.module}`, { module: "" });
  if (state.line) chip(`line ${state.file.split("/").at(-1)}:${state.line}`, { file: "", line: 0 });
  if (state.mark) chip(`only ${state.mark}`, { mark: "" });
  fill(filters, chips, chips.length ? h("span", { class: "dim" }, `${count(lines.length)} of ${count(all)} lines`) : null);
  filters.hidden = !chips.length;
}

function drawSummary() {
  const stage = graph().stages[state.stage];
  const now = program().totals;
  const old = state.stage && stage.changes ? graph().before(state.stage)?.totals : null;
  const { added, removed, changed, moved } = graph().changes(state.stage);
  const toggle = (mark, text, kind) => h("button", { class: `stat ${kind}`, type: "button", "aria-pressed": state.mark === mark, onclick: () => go({ mark: state.mark === mark ? "" : mark }), title: `Only these (${text})` }, text);
  const figure = (text, was, is, show, title) => h("span", { class: "figure", title }, h("b", {}, show(is)), ` ${text}`,
    old && was !== is ? h("em", { class: is < was ? "good" : "bad" }, ` ${signed(show(is - was), is - was)}`) : null);
  fill(summary,
    h("span", { class: "stage-name" }, stage.name),
    stage.fired?.length ? link(plural(stage.fired.length, "rewrite"), () => go({ view: "pass" }), "What was rewritten, and where") : null,
    figure("calls", old?.calls, now.calls, count, "All layers counted"),
    figure("kernels", old?.kernels, now.kernels, count, "Calls that launch something"),
    figure("moved", old?.bytes, now.bytes, bytes, "Bytes that the calls read and write"),
    figure("estimated", old?.micros, now.micros, micros, `One after the other, ${ENGINE_NOTE}`),
    graph().final === program() && graph().timelines[0]?.streams > 1 ? link(`${count(graph().timelines[0].launches.filter((launch) => launch[1]).length)} tasks on side streams`, () => go({ view: "streams", capture: 0 })) : null,
    h("span", { class: "grow" }),
    added.size ? toggle("added", `+${count(added.size)} added`, "added") : null,
    removed.size ? toggle("removed", `−${count(removed.size)} removed`, "removed") : null,
    changed.size + moved.size ? toggle("changed", `~${count(changed.size + moved.size)} changed`, "changed") : null,
    state.stage && !stage.changes && !stage.error ? h("span", { class: "dim" }, "changed nothing") : null,
  );
}

function refresh() {
  const all = graph().lines(state.stage);
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  lines = words.length || state.module || state.line || state.mark ? all.filter((line) => keep(line, words)) : all;
  drawSummary();
  drawFilters(all.length);
  fill(none, lines.length ? null : emptyNote("No line is like that", "Take a filter away, or press Esc."));
  markNear();
  body.show(lines.length);
  drawMap();
}

function markNear() {
  const at = selected();
  near = at < 0 ? { reads: new Set(), users: new Set() } : { reads: new Set(program().inputs(at)), users: new Set(program().users[at]) };
}

const SHAPED = ["graph", "stage", "filter", "module", "line", "file", "mark"];

export const programView = {
  title: "Program", element,
  shown() {
    if (!program()) { fill(none, emptyNote("There is no program", "The compilation ended before it had one.")); return; }
    const top = body.element.scrollTop;
    refresh();
    const at = position();
    if (at >= 0) body.reveal(at);
    else body.element.scrollTop = top || firstChange();
  },
  update(changed) {
    if (!program()) { fill(none, emptyNote("There is no program", "The compilation ended before it had one.")); return; }
    if (SHAPED.some((key) => changed.has(key))) {
      const top = body.element.scrollTop;
      refresh();
      if (changed.has("stage") || changed.has("graph")) body.element.scrollTop = position() >= 0 ? top : firstChange();
    }
    if (changed.has("call")) { markNear(); body.draw(true); }
    const at = position();
    if (at >= 0) body.reveal(at);
  },
  redraw: drawMap,
  focus: () => body.element.focus({ preventScroll: true }),
};

function firstChange() {
  const changed = state.stage && lines.findIndex((line) => line.kind === "added" || line.kind === "removed");
  const at = changed > 0 ? changed : lines.findIndex((line) => line.program.isCall(line.i));
  return at < 0 ? 0 : Math.max(0, at - 3) * ROW;
}
