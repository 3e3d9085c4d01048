// The graph of a stage: modules as boxes that open and close, calls as nodes, what they read as lines.

import { bytes, count, h, fill, hideTip, micros, showTip, emptyNote } from "./dom.js";
import { MONO, Picture, SANS, palette } from "./canvas.js";
import { layOut, treeOf } from "./layout.js";
import { ENGINES } from "./model.js";
import { go, graph, program, selected, state } from "./state.js";

const SMALL = 5; // pixels of height below which a call is a spot
const SHUT = 26; // pixels of height below which a box is drawn as one piece
const AT_FIRST = 420;
const FAR = 900; // a longer line is a faint one

const tools = h("div", { class: "tools" });
const picture = new Picture({ label: "Graph of the stage: arrows move, plus and minus zoom", draw: paint, click, hover });
const note = h("div", {});
const element = h("div", { class: "graph" }, tools, picture.element, note);
const trees = new Map();
let tree = null;
let pairs = [];
let kinds = null;

function treeFor(from) {
  if (!trees.has(from)) {
    const found = treeOf(from);
    found.open = openAtFirst(found.root);
    trees.set(from, found);
  }
  return trees.get(from);
}

// Level by level, as long as what is then shown can be taken in.
function openAtFirst(root) {
  const open = new Set();
  let level = [root];
  let shown = root.items.length;
  while (level.length) {
    const below = level.flatMap((node) => node.items.filter((item) => item.items));
    const more = below.reduce((sum, node) => sum + node.items.length, 0);
    if (shown + more > AT_FIRST && shown > 12) break;
    below.forEach((node) => open.add(node.path));
    shown += more;
    level = below;
  }
  return open;
}

function arrange() {
  layOut(tree.root, tree.open);
  const seen = new Set();
  pairs = [];
  for (const [from, to] of tree.edges) {
    const [a, b] = [visible(tree.owner[from]), visible(tree.owner[to])];
    const key = a.id * 4294967296 + b.id;
    if (a !== b && !seen.has(key)) { seen.add(key); pairs.push([a, b, from, to]); }
  }
}

// The item itself, or the outermost closed box that it is in.
function visible(item) {
  let shown = item;
  for (let box = item.parent; box; box = box.parent) if (!box.open) shown = box;
  shown.id ??= (visible.next = (visible.next ?? 0) + 1);
  return shown;
}

function draw(fit) {
  const from = program();
  if (!from || !from.modules.total) { fill(note, emptyNote("There is nothing to draw", "The program at this stage has no calls.")); note.hidden = false; picture.element.hidden = true; return; }
  note.hidden = true;
  picture.element.hidden = false;
  tree = treeFor(from);
  kinds = new Map(graph().lines(state.stage).filter((line) => line.kind !== "removed" && line.kind !== "same").map((line) => [line.i, line.kind]));
  arrange();
  const hidden = from.size - from.modules.total - 1;
  fill(tools,
    h("button", { type: "button", onclick: () => setOpen([...tree.byPath.keys()]), title: "e" }, "Open all"),
    h("button", { type: "button", onclick: () => setOpen([]), title: "c" }, "Close all"),
    h("button", { type: "button", onclick: () => picture.fit(whole()), title: "0" }, "Fit"),
    h("span", { class: "dim" }, `${count(from.modules.total)} calls${hidden > 0 ? `, without ${count(hidden)} inputs and constants` : ""}. Double-click opens and closes a module.`),
    h("span", { class: "grow" }),
    ENGINES.slice(1).map((name, i) => h("span", { class: "legend" }, h("i", { class: `swatch engine${i + 1}` }), name)));
  if (fit) picture.fit(whole());
  else picture.draw();
}

const whole = () => [0, 0, tree.root.w, tree.root.h];

export function setOpen(paths) {
  if (!tree) return;
  tree.open = new Set(paths);
  arrange();
  picture.fit(whole());
}

export const openAll = () => tree && setOpen([...tree.byPath.keys()]);

function toggle(node) {
  const before = [node.x, node.y];
  if (!tree.open.delete(node.path)) tree.open.add(node.path);
  arrange();
  picture.x += (before[0] - node.x) * picture.kx;
  picture.y += (before[1] - node.y) * picture.ky;
  picture.touched = true;
  picture.draw();
}

function paint(pen, view) {
  if (!tree) return;
  const color = palette();
  const from = program();
  const seen = [-view.x / view.kx, -view.y / view.ky, (view.width - view.x) / view.kx, (view.height - view.y) / view.ky];
  pen.translate(view.x, view.y);
  pen.scale(view.kx, view.ky);
  const calls = [];
  paintBox(pen, tree.root, view, seen, color, calls);
  paintLines(pen, view, seen, color);
  paintCalls(pen, calls, view, color, from);
}

const apart = (item, seen) => item.x > seen[2] || item.y > seen[3] || item.x + item.w < seen[0] || item.y + item.h < seen[1];

function paintBox(pen, node, view, seen, color, calls) {
  const small = node.parent && node.h * view.ky < SHUT;
  if (node.parent) {
    const chosen = node.path === state.module;
    pen.fillStyle = color(node.open && !small ? (node.depth % 2 ? "box-1" : "box-2") : "box-shut");
    pen.strokeStyle = color(chosen ? "accent" : "border");
    pen.lineWidth = (chosen ? 2.5 : 1) / Math.min(1, view.kx * 1.5);
    pen.beginPath();
    pen.roundRect(node.x, node.y, node.w, node.h, 6);
    pen.fill();
    pen.stroke();
    const letter = Math.max(11, Math.min(13 / view.kx, node.h * 0.45, (node.w / Math.max(4, node.name.length)) * 1.4));
    if (letter * view.kx > 6) {
      pen.fillStyle = color(node.open ? "dim" : "text");
      pen.font = `600 ${node.open && !small ? Math.min(letter, 15) : Math.min(letter, node.h * 0.42)}px ${SANS}`;
      pen.textBaseline = "middle";
      const text = node.open || node.h * view.ky < 30 ? node.name : `${node.name}  ·  ${node.module.total}`;
      pen.fillText(text, node.x + 9, node.y + (node.open && !small ? 13 : node.h / 2), node.w - 14);
    }
    if (!node.open || small) return;
  }
  for (const item of node.items) {
    if (apart(item, seen)) continue;
    if (item.items) paintBox(pen, item, view, seen, color, calls);
    else calls.push(item);
  }
}

function paintLines(pen, view, seen, color) {
  if (view.kx < 0.06) return;
  const at = selected();
  const strong = [];
  pen.lineWidth = Math.max(1, 0.7 / view.kx);
  pen.strokeStyle = color("edge");
  for (const far of [true, false]) {
    pen.globalAlpha = far ? 0.16 : view.kx < 0.2 ? 0.45 : 0.85;
    pen.beginPath();
    for (const pair of pairs) {
      const [a, b, from, to] = pair;
      const [x, y, u, v] = [a.x + a.w / 2, a.y + a.h, b.x + b.w / 2, b.y];
      if (Math.abs(u - x) + Math.abs(v - y) > FAR !== far) continue;
      if (from === at || to === at) { strong.push(pair); continue; }
      if (Math.max(x, u) < seen[0] || Math.min(x, u) > seen[2] || Math.max(y, v) < seen[1] || Math.min(y, v) > seen[3]) continue;
      curve(pen, x, y, u, v);
    }
    pen.stroke();
  }
  pen.globalAlpha = 1;
  pen.lineWidth = Math.max(2, 1.6 / view.kx);
  for (const [a, b, , to] of strong) {
    pen.strokeStyle = color(to === at ? "reads" : "uses");
    pen.beginPath();
    curve(pen, a.x + a.w / 2, a.y + a.h, b.x + b.w / 2, b.y);
    pen.stroke();
  }
}

function curve(pen, x, y, u, v) {
  const bend = Math.max(12, Math.min(90, Math.abs(v - y) / 2));
  pen.moveTo(x, y);
  pen.bezierCurveTo(x, y + bend, u, v - bend, u, v);
}

function paintCalls(pen, calls, view, color, from) {
  const engines = ENGINES.map((name) => color(name));
  const at = selected();
  const near = at < 0 ? new Set() : new Set([...from.inputs(at), ...from.users[at]]);
  const spots = CALL_HEIGHT * view.ky < SMALL;
  pen.textBaseline = "middle";
  for (const item of calls) {
    const { call } = item;
    const kind = kinds.get(call);
    pen.fillStyle = spots ? engines[from.engine(call)] : color("node");
    if (spots) { pen.fillRect(item.x, item.y, item.w, item.h); if (call !== at && !kind) continue; }
    pen.beginPath();
    pen.roundRect(item.x, item.y, item.w, item.h, 4);
    if (!spots) pen.fill();
    pen.strokeStyle = color(call === at ? "accent" : kind ? (kind === "added" ? "added" : "changed") : near.has(call) ? "accent" : "border");
    pen.lineWidth = (call === at ? 3 : kind || near.has(call) ? 2 : 1) / Math.min(1, view.kx * 1.2);
    pen.stroke();
    if (spots) continue;
    pen.fillStyle = engines[from.engine(call)];
    pen.fillRect(item.x, item.y + 3, 4, item.h - 6);
    if (view.ky * 11 < 5) continue;
    pen.fillStyle = color(from.engine(call) ? "text" : "dim");
    pen.font = `600 11px ${MONO}`;
    pen.fillText(from.shortTarget(call), item.x + 9, item.y + 11, item.w - 13);
    pen.fillStyle = color("dim");
    pen.font = `10px ${MONO}`;
    pen.fillText(from.values(call), item.x + 9, item.y + 24, item.w - 13);
  }
}

const CALL_HEIGHT = 34;

function hit(x, y) {
  let node = tree?.root;
  for (let found = node; found;) {
    node = found;
    found = node.open && node.items ? node.items.find((item) => x >= item.x && x <= item.x + item.w && y >= item.y && y <= item.y + item.h) : null;
  }
  return node;
}

function click(x, y, twice) {
  const item = hit(x, y);
  if (!item || item === tree.root) return;
  if (!item.items) go({ call: program().name(item.call) });
  else if (twice) toggle(item);
}

function hover(x, y, event) {
  const item = hit(x, y);
  if (!item || item === tree.root) { hideTip(); return; }
  const from = program();
  if (item.items) { showTip(event, h("b", {}, item.path), h("div", { class: "dim" }, `${count(item.module.total)} calls, ${micros(item.module.micros)} estimated`)); return; }
  const { call } = item;
  showTip(event, h("b", {}, from.name(call)), h("div", {}, from.target(call)), h("div", { class: "dim" }, from.values(call)), from.engine(call) ? h("div", { class: "dim" }, `${micros(from.micros(call))}, ${bytes(from.bytes(call))}`) : null);
}

// Opens what the selected call is in, and moves to it.
function reveal() {
  const at = selected();
  const item = at >= 0 ? tree?.owner[at] : null;
  if (!item) { picture.draw(); return; }
  let closed = false;
  for (let box = item.parent; box; box = box.parent) if (box.parent && !tree.open.has(box.path)) { tree.open.add(box.path); closed = true; }
  if (closed) arrange();
  picture.show([item.x, item.y, item.w, item.h], 0.55);
}

function revealModule() {
  const node = tree?.byPath.get(state.module);
  if (!node) { picture.draw(); return; }
  for (let box = node; box.parent; box = box.parent) tree.open.add(box.path);
  arrange();
  picture.fit([node.x, node.y, node.w, node.h]);
  picture.touched = true;
}

let shownFor = null;

export const graphView = {
  title: "Graph", element,
  shown() {
    const fresh = shownFor !== program();
    shownFor = program();
    draw(fresh);
    if (selected() >= 0) reveal();
    else if (state.module) revealModule();
  },
  update(changed) {
    if (changed.has("stage") || changed.has("graph")) { shownFor = program(); draw(true); if (selected() >= 0) reveal(); }
    else if (changed.has("module") && state.module) revealModule();
    else if (changed.has("call")) reveal();
  },
  redraw: () => picture.draw(),
  focus: () => picture.canvas.focus(),
};
