// The model's modules as a tree; one that is chosen filters the program and is shown in the graph.

import { byId, count, h, fill, micros } from "./dom.js";
import { within } from "./model.js";
import { go, program, selected, state } from "./state.js";

const box = byId("modules");
const open = new Set();
let rows = [];
let cursor = 0;

box.addEventListener("keydown", keydown);

export function drawModules(changed) {
  if (!program()) { fill(box); return; }
  if (changed.has("call") && selected() >= 0) reveal(program().module(selected()));
  if (!["graph", "stage", "module", "call", "all"].some((key) => changed.has(key))) return;
  if (!open.size) openFirst();
  render();
}

// Opens what has a single child, so that the tree begins where it branches.
function openFirst() {
  for (let node = program().modules; node.children.size && node.children.size <= 3;) {
    const next = [...node.children.values()].reduce((a, b) => (b.total > a.total ? b : a));
    open.add(next.path);
    node = next;
  }
}

function reveal(path) {
  const parts = path.split(".");
  for (let length = 1; length < parts.length; length += 1) open.add(parts.slice(0, length).join("."));
}

function render() {
  rows = [];
  const total = program().modules.micros || 1;
  const current = selected() >= 0 ? program().module(selected()) : "";
  const add = (node, depth) => {
    for (const child of node.children.values()) {
      rows.push({ node: child, depth });
      if (open.has(child.path)) add(child, depth + 1);
    }
  };
  add(program().modules, 0);
  cursor = Math.min(cursor, Math.max(0, rows.length - 1));
  const kept = box.scrollTop;
  fill(box, rows.length ? rows.map(({ node, depth }, index) => {
    const bar = h("span", { class: "share", title: `${micros(node.micros)} estimated` });
    bar.style.setProperty("--share", String(node.micros / total));
    const element = h("div", {
      class: `module ${node.path === state.module ? "selected" : ""} ${current && within(current, node.path) ? "holds" : ""}`,
      role: "treeitem", id: `module-${index}`, title: `${node.path}: ${count(node.total)} calls, ${micros(node.micros)} estimated`,
      "aria-expanded": node.children.size ? String(open.has(node.path)) : null, "aria-level": depth + 1,
      onclick: () => { cursor = index; choose(node); },
    },
    h("button", { class: "twist", type: "button", tabindex: -1, "aria-hidden": "true", onclick: (event) => { event.stopPropagation(); toggle(node); } },
      node.children.size ? (open.has(node.path) ? "▾" : "▸") : ""),
    h("span", { class: "name" }, node.name), h("span", { class: "calls" }, count(node.total)), bar);
    element.style.paddingLeft = `${4 + depth * 12}px`;
    return element;
  }) : h("p", { class: "dim pad" }, "The calls carry no module paths: a function was compiled, not a module."));
  box.scrollTop = kept;
  markCursor();
}

function markCursor() {
  [...box.children].forEach((child, index) => child.classList.toggle("cursor", index === cursor));
  box.setAttribute("aria-activedescendant", `module-${cursor}`);
  if (document.activeElement === box) box.children[cursor]?.scrollIntoView({ block: "nearest" });
}

const choose = (node) => go({ module: state.module === node.path ? "" : node.path });

function toggle(node) {
  if (!open.delete(node.path)) open.add(node.path);
  render();
}

function keydown(event) {
  const row = rows[cursor];
  if (!row) return;
  const acts = {
    ArrowDown: () => { cursor = Math.min(rows.length - 1, cursor + 1); },
    ArrowUp: () => { cursor = Math.max(0, cursor - 1); },
    ArrowRight: () => { if (row.node.children.size && !open.has(row.node.path)) toggle(row.node); else cursor = Math.min(rows.length - 1, cursor + 1); },
    ArrowLeft: () => {
      if (open.has(row.node.path) && row.node.children.size) toggle(row.node);
      else for (let at = cursor - 1; at >= 0; at -= 1) if (rows[at].depth < row.depth) { cursor = at; break; }
    },
    Enter: () => choose(row.node),
    " ": () => choose(row.node),
  };
  if (acts[event.key]) { event.preventDefault(); acts[event.key](); markCursor(); }
}
