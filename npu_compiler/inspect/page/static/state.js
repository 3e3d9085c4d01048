// What is shown: one object, changed by `go`, kept in the address so that back, forward and a copied address work.

export const state = { graph: 0, stage: 0, view: "program", call: "", filter: "", module: "", file: "", line: 0, mark: "", capture: 0 };
let loaded = null;
export const data = () => loaded;
const KEPT = Object.keys(state);
const START = { ...state };
const listeners = [];

export const setData = (given) => { loaded = given; };
export const graph = () => loaded.graphs[state.graph];
export const program = () => graph()?.program(state.stage) ?? null;
export const selected = () => program()?.index.get(state.call) ?? -1;
export const subscribe = (listener) => listeners.push(listener);

// Changes the state; `quiet`: without an entry in the history (moving a selection, typing).
export function go(patch, quiet = false) {
  const changed = new Set(Object.keys(patch).filter((key) => patch[key] !== state[key]));
  if (!changed.size) return;
  Object.assign(state, patch);
  const text = address();
  if (quiet) history.replaceState(null, "", text);
  else history.pushState(null, "", text);
  listeners.forEach((listener) => listener(changed));
}

function address() {
  const found = new URLSearchParams();
  for (const key of KEPT) if (key === "stage" || state[key] !== START[key]) found.set(key, state[key]);
  return `#${found}`;
}

export function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  const patch = { ...START };
  for (const key of KEPT) {
    if (found.has(key)) patch[key] = typeof START[key] === "number" ? Number.parseInt(found.get(key), 10) || 0 : found.get(key);
  }
  patch.graph = Math.max(0, Math.min(patch.graph, loaded.graphs.length - 1));
  const shown = loaded.graphs[patch.graph];
  const last = (shown?.stages.length ?? 1) - 1;
  patch.stage = found.has("stage") ? Math.max(0, Math.min(patch.stage, last)) : shown?.finalStage ?? 0;
  const changed = new Set(KEPT.filter((key) => patch[key] !== state[key]));
  Object.assign(state, patch);
  if (changed.size) listeners.forEach((listener) => listener(changed));
}

addEventListener("popstate", readAddress);
