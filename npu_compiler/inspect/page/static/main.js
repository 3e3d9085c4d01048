// Starts the page: reads the data, ties the views to the state.

import { byId, h, fill, emptyNote } from "./dom.js";
import { load } from "./model.js";
import { drawDetail } from "./detail.js";
import { drawModules } from "./modules.js";
import { drawStages } from "./stages.js";
import { programView } from "./list.js";
import { graphView } from "./graph.js";
import { passView } from "./pass.js";
import { sourceView } from "./source.js";
import { streamsView } from "./streams.js";
import { memoryView } from "./memory.js";
import { aboutView, factsView, ledgerView } from "./tables.js";
import { bind } from "./keys.js";
import { data, go, graph, readAddress, setData, state, subscribe } from "./state.js";

const VIEWS = { program: programView, graph: graphView, pass: passView, source: sourceView, streams: streamsView, memory: memoryView, captures: ledgerView, facts: factsView, about: aboutView };
const THEME = "npu-compiler-inspect-theme";
const search = byId("search");
let shown = null;

function drawTabs() {
  fill(byId("tabs"), Object.entries(VIEWS).map(([name, view], at) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": name === state.view, tabindex: name === state.view ? 0 : -1, onclick: () => go({ view: name }), title: `${at + 1}` }, view.title)));
}

function update(changed) {
  if (!(state.view in VIEWS)) state.view = "program";
  const view = VIEWS[state.view];
  drawStages(changed);
  drawModules(changed);
  if (["call", "stage", "graph", "all"].some((key) => changed.has(key))) drawDetail();
  if (search.value !== state.filter) search.value = state.filter;
  if (shown !== view) {
    drawTabs();
    fill(byId("view"), view.element);
    byId("view").setAttribute("aria-labelledby", `tab-${state.view}`);
    shown = view;
    view.shown();
  } else view.update(changed);
  if (changed.has("graph")) byId("graphs").selectedIndex = state.graph;
}

function theme() {
  try { return localStorage.getItem(THEME); } catch { return null; } // storage may be barred for files
}

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  try { localStorage.setItem(THEME, name); } catch { /* it then lasts as long as the page */ }
  VIEWS[state.view]?.redraw?.();
}

function toggleTheme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
}

function searching() {
  const filter = search.value;
  const patch = { filter };
  if (filter && state.view !== "program") patch.view = "program";
  go(patch, true);
}

async function start() {
  if (theme()) document.documentElement.dataset.theme = theme();
  setData(await load(byId("data").textContent));
  const { graphs, bundle, environment } = data();
  byId("data").remove();
  fill(byId("where"), `${bundle.split("/").slice(-2).join("/")} · rank ${environment.rank} of ${environment.ranks} · ${environment.device}`);
  byId("where").title = bundle;
  if (!graphs.length) { fill(byId("view"), emptyNote("No graph is in this bundle", "The process wrote its environment and compiled nothing.")); document.documentElement.dataset.ready = String(performance.now()); return; }
  fill(byId("graphs"), graphs.map((entry) => h("option", {}, entry.name)));
  byId("graphs").hidden = graphs.length === 1 && graphs[0].name.length < 2;
  byId("graphs").addEventListener("change", (event) => { event.target.blur(); openGraph(event.target.selectedIndex); });
  byId("theme").addEventListener("click", toggleTheme);
  byId("tabs").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const names = Object.keys(VIEWS);
    go({ view: names[(names.indexOf(state.view) + by + names.length) % names.length] });
    byId(`tab-${state.view}`).focus();
  });
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(searching, 60); });
  search.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === "ArrowDown") { event.preventDefault(); searching(); search.blur(); VIEWS[state.view].focus?.(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => VIEWS[state.view]?.redraw?.());
  bind(Object.keys(VIEWS), toggleTheme);
  subscribe(update);
  state.stage = graph().finalStage;
  if (location.hash.length > 1) readAddress();
  update(new Set(["all", "graph", "stage"]));
  document.documentElement.dataset.ready = String(performance.now());
}

function openGraph(number) {
  go({ graph: number, stage: data().graphs[number].finalStage, call: "", filter: "", module: "", file: "", line: 0, mark: "", capture: 0 });
}

start().catch((error) => { fill(byId("view"), emptyNote("The page could not be built", String(error?.stack ?? error))); throw error; });
