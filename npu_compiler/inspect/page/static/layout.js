// Where the calls of a program lie: each module is a box of its own, laid out by dagre, within the box of its parent.
// Equal boxes, such as the layers of a model, are laid out once.

/* global dagre */

const CALL = { height: 34, pad: 14, letter: 6.6 };
const BOX = { head: 24, pad: 12, least: 90 };
const GAP = { node: 14, rank: 24, column: 40 };
const MOST = 220; // items up to which dagre is quick
const TALL = 2.2; // a box taller than this many times its width is folded into columns

// The tree of modules with, for each, its items (calls and modules), and the edges between these.
export function treeOf(program) {
  const parents = new Map();
  const owner = new Array(program.size).fill(null);
  const build = (module, parent, depth) => {
    const node = { module, path: module.path, name: module.name, parent, depth, items: [], edges: [], x: 0, y: 0, w: 0, h: 0 };
    for (const child of module.children.values()) node.items.push(build(child, node, depth + 1));
    for (const call of module.calls) {
      const item = { call, parent: node, x: 0, y: 0, w: widthOf(program, call), h: CALL.height };
      owner[call] = item;
      node.items.push(item);
    }
    node.items.sort((a, b) => first(a) - first(b));
    node.items.forEach((item, number) => { item.number = number; });
    parents.set(node.path, node);
    return node;
  };
  const root = build(program.modules, null, 0);
  const edges = [];
  for (let i = 0; i < program.size; i += 1) {
    if (!owner[i]) continue;
    for (const other of program.inputs(i)) if (owner[other]) { edges.push([other, i]); join(owner[other], owner[i]); }
  }
  return { root, owner, edges, byPath: parents };
}

const first = (item) => (item.items ? Math.min(...item.items.map(first)) : item.call);

const widthOf = (program, call) => CALL.pad + CALL.letter * Math.min(34, Math.max(program.shortTarget(call).length, program.values(call).length, 6));

const depthOf = (item) => (item.items ? item.depth : item.parent.depth + 1);

// Notes an edge between the two items that hold its ends in the innermost box that holds both.
function join(from, to) {
  let [a, b] = [from, to];
  while (depthOf(a) > depthOf(b)) a = a.parent;
  while (depthOf(b) > depthOf(a)) b = b.parent;
  while (a.parent !== b.parent) { a = a.parent; b = b.parent; }
  if (a !== b) a.parent.edges.push([a.number, b.number]);
}

// Lays out everything that is open: `open` has the paths of the modules that show what is in them.
export function layOut(root, open) {
  const known = new Map();
  size(root, open, known);
  position(root, 0, 0);
}

function size(node, open, known) {
  node.open = node.parent === null || open.has(node.path);
  if (!node.open) {
    node.w = Math.max(BOX.least, 24 + 7.5 * node.name.length);
    node.h = 38;
    node.signature = `[${node.w}]`;
    return;
  }
  for (const item of node.items) if (item.items) size(item, open, known);
  const pairs = [...new Set(node.edges.map(([a, b]) => a * 65536 + b))];
  node.signature = `(${node.items.map((item) => (item.items ? item.signature : item.w)).join(",")}|${pairs.join(",")})`;
  if (!known.has(node.signature)) known.set(node.signature, arranged(node.items, pairs));
  const found = known.get(node.signature);
  node.items.forEach((item, number) => { [item.rx, item.ry] = found.at[number]; });
  const head = node.parent ? BOX.head : 0;
  node.w = Math.max(found.w + 2 * BOX.pad, node.parent ? 30 + 7.5 * node.name.length : 0);
  node.h = found.h + head + BOX.pad + (node.parent ? 0 : BOX.pad);
  for (const item of node.items) { item.rx += BOX.pad; item.ry += head || BOX.pad; }
}

function position(node, x, y) {
  node.x = x;
  node.y = y;
  if (!node.open) return;
  for (const item of node.items) {
    if (item.items) position(item, x + item.rx, y + item.ry);
    else { item.x = x + item.rx; item.y = y + item.ry; }
  }
}

// Top left corners of items, and the size of all.
function arranged(items, pairs) {
  const ranks = items.length > MOST ? inRanks(items, pairs) : byDagre(items, pairs);
  return fold(items, ranks);
}

function byDagre(items, pairs) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ nodesep: GAP.node, ranksep: GAP.rank, rankdir: "TB" });
  graph.setDefaultEdgeLabel(() => ({}));
  items.forEach((item, number) => graph.setNode(String(number), { width: item.w, height: item.h }));
  for (const [a, b] of needed(items.length, pairs)) graph.setEdge(String(a), String(b));
  dagre.layout(graph);
  return items.map((item, number) => { const { x, y } = graph.node(String(number)); return { x: x - item.w / 2, y: y - item.h / 2, middle: y }; });
}

// The edges without those that a longer way implies: what the first layer makes for all others must not pull them aside.
function needed(amount, pairs) {
  const before = Array.from({ length: amount }, () => []);
  const back = [];
  for (const pair of pairs) { const [a, b] = [Math.floor(pair / 65536), pair % 65536]; if (a < b) before[b].push(a); else back.push([a, b]); }
  const above = Array.from({ length: amount }, () => new Uint8Array(amount));
  const found = [];
  for (let b = 0; b < amount; b += 1) {
    for (const a of before[b].sort((x, y) => y - x)) {
      if (above[b][a]) continue;
      found.push([a, b]);
      above[b][a] = 1;
      for (let i = 0; i < a; i += 1) above[b][i] |= above[a][i];
    }
  }
  return [...found, ...back];
}

// For a box of very many items: each below all that it reads, the row in the order of what it reads.
function inRanks(items, pairs) {
  const above = items.map(() => []);
  for (const pair of pairs) { const [a, b] = [Math.floor(pair / 65536), pair % 65536]; if (a < b) above[b].push(a); }
  const rank = [];
  const rows = [];
  items.forEach((item, number) => {
    rank[number] = above[number].reduce((most, other) => Math.max(most, rank[other] + 1), 0);
    (rows[rank[number]] ??= []).push(number);
  });
  const found = [];
  const order = new Array(items.length).fill(0);
  let y = 0;
  rows.forEach((row) => {
    const weight = (number) => (above[number].length ? above[number].reduce((sum, other) => sum + order[other], 0) / above[number].length : 0);
    row.sort((a, b) => weight(a) - weight(b) || a - b);
    let x = 0;
    let tallest = 0;
    row.forEach((number) => {
      order[number] = x;
      found[number] = { x, y, middle: y };
      x += items[number].w + GAP.node;
      tallest = Math.max(tallest, items[number].h);
    });
    y += tallest + GAP.rank;
  });
  return found;
}

// A long column of ranks is cut into several beside one another.
function fold(items, places) {
  const left = Math.min(0, ...places.map((place) => place.x));
  places.forEach((place) => { place.x -= left; });
  const width = Math.max(1, ...places.map((place, i) => place.x + items[i].w));
  const height = Math.max(1, ...places.map((place, i) => place.y + items[i].h));
  const columns = height > TALL * width ? Math.max(1, Math.round(Math.sqrt(height / width / 1.2))) : 1;
  if (columns === 1) return { at: places.map(({ x, y }) => [x, y]), w: width, h: height };
  const order = places.map((place, i) => i).sort((a, b) => places[a].middle - places[b].middle);
  const at = [];
  let [column, top, tallest, middle] = [0, 0, 0, null];
  for (const i of order) {
    const place = places[i];
    const begins = place.middle !== middle;
    middle = place.middle;
    if (begins && place.y - top >= height / columns && column < columns - 1) { column += 1; top = place.y; }
    at[i] = [place.x + column * (width + GAP.column), Math.max(0, place.y - top)];
    tallest = Math.max(tallest, at[i][1] + items[i].h);
  }
  return { at, w: (column + 1) * width + column * GAP.column, h: tallest };
}
