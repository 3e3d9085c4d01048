// The pipeline: every stage with what it did; stepping through them.

import { byId, count, h, fill, plural } from "./dom.js";
import { go, graph, state } from "./state.js";

const box = byId("stages");
box.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (by) { event.preventDefault(); stepStage(by, false); }
});

// Moves by one stage; `changing`: to the next that changed the program.
export function stepStage(by, changing = true) {
  const { stages } = graph();
  let at = state.stage + by;
  while (changing && at > 0 && at < stages.length - 1 && !acts(stages[at])) at += by;
  if (at >= 0 && at < stages.length) go({ stage: at, mark: "" });
}

const acts = (stage) => Boolean(stage.changes || stage.error || stage.fired?.length);

export function drawStages(changed) {
  if (changed.has("graph") || !box.firstChild) {
    fill(box, graph().stages.map((stage, number) => h("div", {
      class: `stage ${acts(stage) || !number ? "" : "idle"} ${stage.error ? "failed" : ""}`, role: "option", id: `stage-${number}`,
      onclick: () => go({ stage: number, mark: "" }), title: describe(stage),
    },
    h("span", { class: "dot" }),
    h("span", { class: "name" }, stage.name),
    stage.fired?.length ? h("span", { class: "badge", title: plural(stage.fired.length, "rewrite") }, count(stage.fired.length)) : null,
    h("span", { class: "calls" }, stage.calls_of_all && (acts(stage) || !number) ? count(stage.calls_of_all) : ""),
    )));
  }
  if (changed.has("graph") || changed.has("stage") || changed.has("all")) {
    [...box.children].forEach((child, number) => {
      child.classList.toggle("selected", number === state.stage);
      child.setAttribute("aria-selected", number === state.stage);
    });
    box.setAttribute("aria-activedescendant", `stage-${state.stage}`);
    box.children[state.stage]?.scrollIntoView({ block: "nearest" });
  }
}

function describe(stage) {
  if (stage.error) return stage.error;
  const parts = [plural(stage.calls_of_all ?? 0, "call")];
  if (stage.calls !== stage.calls_of_all) parts[0] += `, shown by ${count(stage.calls ?? 0)}`;
  if (stage.fired?.length) parts.push(plural(stage.fired.length, "rewrite"));
  if (stage.refused?.length) parts.push(`${count(stage.refused.length)} left out`);
  if (stage.seconds) parts.push(`${(stage.seconds * 1e3).toFixed(1)} ms`);
  return parts.join(", ");
}
