// The keyboard: one table that is both what the keys do and the help that `?` shows.

import { byId, h, fill } from "./dom.js";
import { nextChange, step } from "./list.js";
import { openAll, setOpen } from "./graph.js";
import { stepStage } from "./stages.js";
import { stepLaunch } from "./streams.js";
import { go, graph, program, selected, state } from "./state.js";

const dialog = byId("keys");
const search = byId("search");
const move = (by) => (state.view === "streams" ? stepLaunch(by) : step(by));

function first(found) {
  if (found !== undefined) go({ call: program().name(found) });
}

function toSource() {
  const at = selected();
  if (at < 0) return;
  const { file, line } = program().place(at);
  if (file) go({ view: "source", file, line });
}

export function bind(views, toggleTheme) {
  const table = [
    ["j", "next line, or task", () => move(1)], ["k", "line, or task, before", () => move(-1)],
    ["n", "next changed line", () => nextChange(1)], ["p", "changed line before", () => nextChange(-1)],
    ["]", "next stage that changed something", () => stepStage(1)], ["[", "stage before", () => stepStage(-1)],
    ["}", "next stage", () => stepStage(1, false)], ["{", "stage before, whatever it did", () => stepStage(-1, false)],
    ["i", "first call that the selected one reads", () => first(selected() >= 0 ? program().inputs(selected())[0] : undefined)],
    ["u", "first call that reads the selected one", () => first(selected() >= 0 ? program().users[selected()][0] : undefined)],
    ["s", "source line of the selected call", toSource],
    ["l", "the selected call in the program", () => go({ view: "program" })],
    ["g", "the selected call in the graph", () => go({ view: "graph" })],
    ["e", "graph: open all modules", () => state.view === "graph" && openAll()],
    ["c", "graph: close all modules", () => state.view === "graph" && setOpen([])],
    ["m", "to the modules", () => byId("modules").focus()],
    ["/", "search", () => { search.focus(); search.select(); }],
    ["t", "light or dark", toggleTheme],
    ["?", "these keys", help],
  ];
  views.forEach((name, at) => table.push([String(at + 1), `view ${name}`, () => go({ view: name })]));
  const keys = new Map(table.map(([key, , act]) => [key, act]));

  function help() {
    if (dialog.open) { dialog.close(); return; }
    fill(dialog, h("h2", {}, "Keys"), h("dl", {}, table.map(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)]),
      [["Esc", "take filters away"], ["← ↑ ↓ → + − 0", "move, zoom and fit a picture; walk a list or tree"], ["Alt ←", "back to what was shown before"]].map(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)])),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close"));
    dialog.showModal();
  }

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && !dialog.open) {
      if (document.activeElement === search && search.value) go({ filter: "" }, true);
      else if (state.filter || state.module || state.line || state.mark) go({ filter: "", module: "", line: 0, mark: "" });
      else go({ call: "" });
      if (typing) event.target.blur();
      return;
    }
    if (typing || !graph() || (dialog.open && event.key !== "?")) return;
    const act = keys.get(event.key);
    if (act) { event.preventDefault(); act(); }
  });
  byId("help").addEventListener("click", help);
}
