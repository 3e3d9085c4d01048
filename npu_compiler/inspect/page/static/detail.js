// Everything about the selected call, each part a way to where it is shown: line, pass, reads, tasks, memory.

import { byId, bytes, count, h, fill, link, micros } from "./dom.js";
import { ENGINES, ENGINE_NOTE } from "./model.js";
import { go, graph, program, selected, state } from "./state.js";

const box = byId("detail");
const MANY = 12;
const WAS = { target: "called", inputs: "read", arguments: "had", shape: "yielded", layout: "lay with", memory: "memory was", writes: "wrote", once: "ran", layers: "layers were", place: "came from", stream: "ran on" };

const section = (title, ...parts) => (parts.flat(9).some(Boolean) ? h("section", {}, h("h3", {}, title), parts) : null);

function names(found, from, stage) {
  const shown = found.slice(0, MANY).map((i) => link(from.name(i), () => go({ call: from.name(i), ...(stage === undefined ? {} : { stage, mark: "" }) }), `${from.target(i)}  ${from.values(i)}`));
  return h("div", { class: "names" }, shown, found.length > MANY ? h("span", { class: "dim" }, `and ${count(found.length - MANY)} more`) : null);
}

// The arguments, with the names of calls as ways to them.
function argumentsOf(from, i) {
  const reads = new Set(from.inputs(i).map((other) => from.name(other)));
  return h("code", {}, from.args(i).split(/([A-Za-z_]\w*)/).map((part, at) => (at % 2 && reads.has(part) ? link(part, () => go({ call: part })) : part)));
}

export function drawDetail() {
  const i = selected();
  const from = program();
  if (!from || i < 0) { drawNothing(); return; }
  const place = from.place(i);
  const was = graph().changes(state.stage).changed.get(from.name(i));
  const isNew = graph().changes(state.stage).added.has(from.name(i));
  fill(box,
    h("h2", {}, from.name(i), isNew ? h("span", { class: "badge added" }, "new here") : null),
    h("p", { class: "target" }, from.target(i), from.layers(i) > 1 ? h("span", { class: "dim" }, `  stands for ${from.layers(i)} layers`) : null),
    section("Changed here", was?.map(([aspect, text]) => h("div", { class: "was" }, h("span", { class: "dim" }, `${WAS[aspect] ?? aspect} `), text))),
    section("Yields", from.values(i) ? h("code", {}, from.values(i)) : null, from.layout(i) ? h("div", { class: "dim small" }, from.layout(i)) : null, from.once.has(i) ? h("div", { class: "dim small" }, "computed at the first call only") : null),
    section("Source", place.file ? [
      link(`${place.file.split("/").at(-1)}:${place.line}`, () => go({ view: "source", file: place.file, line: place.line }), place.file),
      place.fn ? h("span", { class: "dim" }, ` in ${place.fn}`) : null, h("code", { class: "block" }, place.text)] : null),
    section("Module", place.module ? link(place.module, () => go({ module: place.module }), "Only this module") : null),
    section("Arguments", from.args(i) ? argumentsOf(from, i) : null),
    section("Used by", from.users[i].length ? names(from.users[i], from) : null),
    section("Memory", memoryOf(from, i)),
    section("Cost", costOf(from, i)),
    section("Made by", originOf(from, i)),
    section("In the final program", becomesOf(from, i)),
    section("Captured tasks", tasksOf(from, i)),
  );
}

function drawNothing() {
  const name = state.call;
  const found = name ? graph()?.stages.findLastIndex((stage, number) => stage.program >= 0 && graph().program(number).index.has(name)) ?? -1 : -1;
  fill(box, h("div", { class: "empty" }, name && found >= 0
    ? [h("b", {}, name), h("p", {}, "is not in the program at this stage."), link(`show it in ${graph().stages[found].name}`, () => go({ stage: found, mark: "" }))]
    : [h("b", {}, "No call is selected"), h("p", {}, "Choose a line, a node or a task: its shapes, its place in the model, what made it and what became of it are shown here.")]));
}

function memoryOf(from, i) {
  const shared = [...new Set(from.storages(i).flatMap((storage) => from.holders.get(storage)))].filter((other) => other !== i).sort((a, b) => a - b);
  const block = from === graph().final ? graph().memory?.blocks.find(([name]) => name === from.name(i) || name.startsWith(`${from.name(i)}.`)) : null;
  return [
    shared.length ? [h("span", { class: "dim" }, "shared with"), names(shared, from)] : null,
    from.writes(i).length ? [h("span", { class: "dim" }, "writes in place"), names(from.writes(i).map((storage) => from.holders.get(storage)?.[0]).filter((other) => other !== undefined), from)] : null,
    block ? link(`bytes ${block[3]} to ${block[4]}, calls ${block[1]} to ${block[5] ? "the end" : block[2]}`, () => go({ view: "memory" })) : null,
  ];
}

const costOf = (from, i) => (from.engine(i) ? [
  h("span", { class: `engine${from.engine(i)} pill` }, ENGINES[from.engine(i)]), ` ${micros(from.micros(i))}, ${bytes(from.bytes(i))} moved`,
  h("div", { class: "dim small" }, ENGINE_NOTE)] : from.isCall(i) ? h("span", { class: "dim" }, "launches nothing, or the bundle has no estimate") : null);

function originOf(from, i) {
  const pass = from.madeBy(i);
  if (!pass) return null;
  const lowered = graph().all[0];
  const found = from.replaces(i).map((name) => lowered.index.get(name)).filter((at) => at !== undefined);
  const stage = graph().stageOf(pass);
  return [
    stage >= 0 ? link(pass, () => go({ stage, view: "pass" }), "What this pass did") : pass,
    found.length ? [h("span", { class: "dim" }, ` in place of ${count(from.replaces(i).length)} lowered calls`), names(found, lowered, 0)] : null,
  ];
}

function becomesOf(from, i) {
  const { final } = graph();
  if (!final || from === final || !from.isCall(i)) return null;
  const found = graph().inFinal(from, i);
  return found.length ? names(found, final, graph().finalStage) : h("span", { class: "dim" }, "nothing stands for it");
}

function tasksOf(from, i) {
  const tasks = graph().inFinal(from, i).flatMap((call) => graph().launches.get(call) ?? []);
  return tasks.slice(0, MANY).map(([line, at]) => {
    const [call, stream, start, taken, slack] = graph().timelines[line].launches[at];
    const key = graph().captures[line]?.key ?? "not captured";
    return h("div", {}, link(`${key}: task ${at}, stream ${stream}`, () => go({ view: "streams", capture: line, call: graph().final.name(call), stage: graph().finalStage })),
      h("span", { class: "dim" }, ` at ${micros(start)}, ${micros(taken)}, ${slack ? `slack ${micros(slack)}` : "critical"}`));
  });
}
