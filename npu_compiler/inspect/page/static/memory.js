// The memory plan over the calls of the final program: where each storage lies, how long, whose it is, and the peak.

import { bytes, count, h, fill, hideTip, showTip, emptyNote } from "./dom.js";
import { Picture, MONO, SANS, palette } from "./canvas.js";
import { go, graph, state } from "./state.js";

const head = h("div", { class: "figures" });
const formulas = h("div", { class: "formulas" });
const picture = new Picture({ label: "Memory over calls: arrows move, plus and minus zoom", draw: paint, click, hover, flat: true, most: 400 });
const owners = h("div", { class: "longest" });
const element = h("div", { class: "memory" }, head, formulas, picture.element, owners);
const BOTTOM = 22;
let blocks = [];
let top = 1;
let peakAt = 0;
let live = [];

// Blocks with what is known of their makers.
function collect() {
  const { final, memory } = graph();
  const length = final?.size ?? 1;
  blocks = (memory?.blocks ?? []).filter((block) => block[6] !== null).map(([name, first, last, offset, end, returned, start, size]) => {
    const call = final?.index.get(name) ?? final?.index.get(name.replace(/\.\d+$/, "")) ?? -1;
    const module = call >= 0 ? final.module(call) : "";
    return { name, first, last: returned ? length : last + 1, offset, end, returned, start, size, call, owner: ownerOf(module) };
  });
  top = Math.max(1, ...blocks.map((block) => block.start + block.size));
  live = new Array(length + 1).fill(0);
  blocks.forEach((block) => { for (let at = block.first; at < Math.min(block.last, length); at += 1) live[at] += block.size; });
  peakAt = live.indexOf(Math.max(...live));
}

// The kind of module, the same in every layer: `layers.3.self_attn` and `layers.4.self_attn` are one owner.
const ownerOf = (module) => module.split(".").filter((part) => !/^\d+$/.test(part)).slice(-2).join(".") || "no module";

const hue = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
const tint = (owner, alpha) => `hsl(${hue(owner)} 58% var-light / ${alpha})`;

function draw() {
  const { memory, plan } = graph();
  collect();
  if (!memory || !memory.blocks.length) { fill(element, emptyNote("There is no memory plan", plan ? "The program allocates nothing." : "The compilation ended before it had one.")); return; }
  fill(element, head, formulas, picture.element, owners);
  const figure = (value, text, title) => h("div", { class: "tile", title }, h("b", {}, value), h("span", {}, text));
  const most = Math.max(0, ...live);
  fill(head, blocks.length ? [
    figure(bytes(top), "in one block", `${count(top)} bytes`), figure(bytes(most), "alive at once at most", `${count(most)} bytes`),
    figure(count(memory.blocks.length), "storages"), figure(graph().final?.name(peakAt) ?? "", "the call at the peak")] : figure(count(memory.blocks.length), "storages"),
    plan?.order ? figure(plan.order.winner, "order of calls", Object.entries(plan.order.peaks).map(([name, size]) => `${name}: ${count(size)} bytes`).join("\n")) : null,
    plan?.once?.length ? figure(bytes(Number(plan.once_bytes) || 0), `computed once, ${count(plan.once.length)} values`) : null);
  const sizes = Object.entries(graph().final?.columns.sizes ?? {}).map(([name, size]) => `${name} = ${size}`).join(", ");
  fill(formulas, h("div", {}, h("span", { class: "dim" }, "peak, for every size: "), h("code", {}, memory.peak), h("span", { class: "dim" }, " bytes")),
    memory.live !== memory.peak ? h("div", {}, h("span", { class: "dim" }, "alive at once: "), h("code", {}, memory.live), h("span", { class: "dim" }, " bytes")) : null,
    sizes ? h("div", { class: "dim" }, `drawn at ${sizes}`) : null);
  picture.element.hidden = !blocks.length;
  drawOwners();
  const begin = Math.min(...blocks.map((block) => block.first), graph().final?.size ?? 0);
  picture.fit([begin, 0, Math.max(1, (graph().final?.size ?? 1) - begin), 1]);
}

function drawOwners() {
  const found = new Map();
  for (const block of blocks) {
    const entry = found.get(block.owner) ?? { owner: block.owner, storages: 0, bytes: 0, peak: 0 };
    entry.storages += 1;
    entry.bytes += block.size;
    if (block.first <= peakAt && peakAt < block.last) entry.peak += block.size;
    found.set(block.owner, entry);
  }
  const most = Math.max(1, ...live);
  fill(owners, h("h3", {}, "Owners"), h("table", {}, h("thead", {}, h("tr", {}, ["", "module", "storages", "bytes in all", "at the peak", "part of the peak"].map((title) => h("th", {}, title)))),
    h("tbody", {}, [...found.values()].sort((a, b) => b.peak - a.peak || b.bytes - a.bytes).slice(0, 24).map((entry) => {
      const swatch = h("i", { class: "swatch" });
      swatch.style.background = tint(entry.owner, 0.9).replace("var-light", "55%");
      return h("tr", {}, h("td", {}, swatch), h("td", {}, entry.owner), h("td", { class: "n" }, count(entry.storages)), h("td", { class: "n" }, bytes(entry.bytes)), h("td", { class: "n" }, bytes(entry.peak)), h("td", { class: "n" }, `${((100 * entry.peak) / most).toFixed(0)}%`));
    }))));
}

const scaleOf = (view) => (view.height - BOTTOM - 24) / top;

function paint(pen, view) {
  const color = palette();
  const light = color("block-light");
  const unit = scaleOf(view);
  const base = view.height - BOTTOM;
  const at = (position) => view.x + position * view.kx;
  pen.font = `10px ${SANS}`;
  pen.textBaseline = "middle";
  for (let part = 0; part <= 4; part += 1) {
    const y = base - (part / 4) * top * unit;
    pen.fillStyle = color("border");
    pen.fillRect(0, y, view.width, 1);
    pen.fillStyle = color("dim");
    if (part < 4) pen.fillText(bytes((part / 4) * top), 6, y - 7);
  }
  for (const block of blocks) {
    const x = at(block.first);
    const width = Math.max(1, (block.last - block.first) * view.kx - 0.5);
    if (x > view.width || x + width < 0) continue;
    const height = Math.max(1, block.size * unit);
    const y = base - (block.start + block.size) * unit;
    const mine = block.name === state.call || block.name.startsWith(`${state.call}.`);
    pen.fillStyle = tint(block.owner, 0.82).replace("var-light", light);
    pen.fillRect(x, y, width, height - (height > 3 ? 0.5 : 0));
    if (mine && state.call) { pen.strokeStyle = color("text"); pen.lineWidth = 2; pen.strokeRect(x, y, width, height); }
    if (width > 60 && height > 13) { pen.fillStyle = color("on-block"); pen.font = `11px ${MONO}`; pen.fillText(block.name, Math.max(x, 0) + 5, y + Math.min(height / 2, 40), width - 8); }
  }
  pen.beginPath();
  live.forEach((size, position) => { pen.lineTo(at(position), base - size * unit); pen.lineTo(at(position + 1), base - size * unit); });
  pen.strokeStyle = color("text");
  pen.lineWidth = blocks.length > 300 ? 0.8 : 1.5;
  pen.stroke();
  const label = `peak ${bytes(Math.max(0, ...live))}`;
  pen.setLineDash([4, 3]);
  pen.strokeStyle = color("accent");
  pen.lineWidth = 1;
  pen.strokeRect(at(peakAt) + view.kx / 2, 6, 0, base - 6);
  pen.setLineDash([]);
  pen.fillStyle = color("accent");
  pen.font = `600 11px ${SANS}`;
  const half = pen.measureText(label).width + 8;
  pen.fillText(label, at(peakAt) + half > view.width ? at(peakAt) - half : at(peakAt) + 6, 10);
  pen.fillStyle = color("dim");
  pen.font = `10px ${SANS}`;
  pen.fillText("calls in their order →   line: alive at once", 6, view.height - 9);
}

function hit(x, y) {
  const size = (picture.height - BOTTOM - y) / scaleOf(picture);
  return blocks.find((block) => x >= block.first && x <= block.last && size >= block.start && size <= block.start + block.size);
}

function click(x, y) {
  const block = hit(x, y);
  if (block?.call >= 0) go({ call: graph().final.name(block.call), stage: graph().finalStage, mark: "" });
}

function hover(x, y, event) {
  const block = hit(x, y);
  if (!block) { hideTip(); return; }
  showTip(event, h("b", {}, block.name), h("div", {}, `${bytes(block.size)}, from ${block.offset} to ${block.end}`), h("div", { class: "dim" }, `calls ${block.first} to ${block.returned ? "the end: it is returned" : block.last - 1}`), h("div", { class: "dim" }, block.call >= 0 ? graph().final.module(block.call) : ""));
}

export const memoryView = {
  title: "Memory", element, shown: draw,
  update(changed) { if (changed.has("graph")) draw(); else if (changed.has("call")) picture.draw(); },
  redraw: () => picture.draw(),
  focus: () => picture.canvas.focus(),
};
