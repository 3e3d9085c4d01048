// When the tasks of a captured graph run, on which stream, what they wait for, and how much later they could.

import { bytes, count, h, fill, hideTip, micros, showTip, emptyNote } from "./dom.js";
import { Picture, MONO, SANS, palette } from "./canvas.js";
import { ENGINES, ENGINE_NOTE } from "./model.js";
import { go, graph, state } from "./state.js";

const LANE = 46;
const BAR = 24;
const TOP = 34;

const head = h("div", { class: "tools" });
const figures = h("div", { class: "figures" });
const picture = new Picture({ label: "Streams over time: arrows move, plus and minus zoom", draw: paint, click, hover, flat: true, most: 400 });
const longest = h("div", { class: "longest" });
const element = h("div", { class: "streams" }, head, figures, picture.element, longest);

const line = () => graph().timelines[state.capture] ?? graph().timelines[0];
const current = () => (graph().final && state.call ? graph().final.index.get(state.call) ?? -1 : -1);
const onlyCritical = (launch) => launch[4] < 0.05;

function draw() {
  const shown = line();
  const { final, captures } = graph();
  if (!shown || !final || !shown.launches.length) {
    fill(element, emptyNote("There is no timeline", final ? "The bundle has no cost estimates, or nothing of the program is launched." : "The compilation ended before its last stage."));
    return;
  }
  fill(element, head, figures, picture.element, longest);
  const capture = captures[state.capture];
  fill(head,
    captures.length > 1 ? h("select", { "aria-label": "Capture", onchange: (event) => go({ capture: event.target.selectedIndex }) }, captures.map((entry, number) => h("option", { selected: number === state.capture }, entry.key))) : h("b", {}, capture?.key ?? "not captured"),
    h("span", { class: "dim" }, capture ? `${capture.reason}; ${capture.streams || "one stream"}` : "the program's launches in their order"),
    h("span", { class: "grow" }),
    ENGINES.slice(1).map((name, i) => h("span", { class: "legend" }, h("i", { class: `swatch engine${i + 1}` }), name)),
    h("span", { class: "legend" }, h("i", { class: "swatch critical" }), "critical"), h("span", { class: "legend" }, h("i", { class: "swatch slack" }), "slack"));
  const critical = shown.launches.filter(onlyCritical);
  const figure = (value, text, title) => h("div", { class: "tile", title }, h("b", {}, value), h("span", {}, text));
  fill(figures,
    figure(micros(shown.microseconds), "estimated", ENGINE_NOTE),
    figure(micros(shown.alone), "one after the other"),
    figure(micros(shown.chain), "longest chain of dependencies", "No number of streams can beat it"),
    figure(count(shown.launches.length), `tasks on ${shown.streams} ${shown.streams === 1 ? "stream" : "streams"}`),
    figure(count(critical.length), shown.streams === 1 ? "on the longest chain" : "on the critical path"),
    figure(count(shown.launches.reduce((sum, launch) => sum + launch[5].length, 0)), "waits between streams"));
  drawLongest(shown, final);
  picture.element.style.height = `${TOP + shown.streams * LANE + 16}px`;
  picture.fit([0, 0, shown.microseconds, 1]);
}

function drawLongest(shown, final) {
  const order = shown.launches.map((launch, at) => [launch, at]).sort((a, b) => b[0][3] - a[0][3]).slice(0, 12);
  fill(longest, h("h3", {}, "Longest tasks"), h("table", {}, h("thead", {}, h("tr", {}, ["task", "call", "operator", "engine", "stream", "starts", "takes", "moves", "slack", "module"].map((title) => h("th", {}, title)))),
    h("tbody", {}, order.map(([[call, stream, start, taken, slack], at]) => h("tr", { class: `pick ${call === current() ? "selected" : ""}`, onclick: () => choose(call) },
      h("td", { class: "n" }, at), h("td", {}, final.name(call)), h("td", {}, h("code", {}, final.shortTarget(call))), h("td", {}, h("span", { class: `pill engine${final.engine(call)}` }, ENGINES[final.engine(call)])), h("td", { class: "n" }, stream),
      h("td", { class: "n" }, micros(start)), h("td", { class: "n" }, micros(taken)), h("td", { class: "n" }, bytes(final.bytes(call))), h("td", { class: "n" }, slack < 0.05 ? "critical" : micros(slack)), h("td", { class: "dim" }, final.module(call)))))));
}

function choose(call) {
  go({ call: graph().final.name(call), stage: graph().finalStage, mark: "" });
}

export function stepLaunch(by) {
  const { launches } = line() ?? { launches: [] };
  if (!launches.length) return;
  const at = launches.findIndex(([call]) => call === current());
  const next = launches[Math.max(0, Math.min(launches.length - 1, at < 0 ? 0 : at + by))];
  go({ call: graph().final.name(next[0]), stage: graph().finalStage, mark: "" }, true);
}

function paint(pen, view) {
  const shown = line();
  if (!shown) return;
  const color = palette();
  const { final } = graph();
  const engines = ENGINES.map((name) => color(name));
  const at = (moment) => view.x + moment * view.kx;
  paintAxis(pen, view, color, at);
  for (let stream = 0; stream < shown.streams; stream += 1) {
    const y = TOP + stream * LANE;
    pen.fillStyle = color("lane");
    pen.fillRect(0, y - 4, view.width, LANE - 8);
  }
  const mine = current();
  shown.launches.forEach(([call, stream, start, taken, slack]) => {
    const x = at(start);
    const width = Math.max(0.75, taken * view.kx - 0.5);
    if (x > view.width || x + Math.max(width, slack * view.kx + width) < 0) return;
    const y = TOP + stream * LANE;
    if (slack >= 0.05) { pen.fillStyle = color("slack"); pen.fillRect(x + width, y + BAR + 3, slack * view.kx, 3); }
    pen.fillStyle = engines[final.engine(call)];
    pen.globalAlpha = slack < 0.05 ? 1 : 0.5;
    pen.fillRect(x, y, width, BAR);
    pen.globalAlpha = 1;
    if (slack < 0.05) { pen.fillStyle = color("critical"); pen.fillRect(x, y + BAR + 3, width, 3); }
    if (call === mine) { pen.strokeStyle = color("text"); pen.lineWidth = 2; pen.strokeRect(x - 1.5, y - 2, width + 3, BAR + 4); }
    if (width > 44) {
      pen.save();
      pen.beginPath();
      pen.rect(x, y, width, BAR);
      pen.clip();
      pen.fillStyle = color("on-bar");
      pen.font = `11px ${MONO}`;
      pen.fillText(final.shortTarget(call), Math.max(x, 0) + 5, y + BAR / 2 + 1);
      pen.restore();
    }
  });
  paintWaits(pen, view, color, at, mine);
  for (let stream = 0; stream < shown.streams; stream += 1) {
    pen.font = `600 10px ${SANS}`;
    const text = stream ? `side stream ${stream}` : "main stream";
    pen.fillStyle = color("panel");
    pen.globalAlpha = 0.85;
    pen.fillRect(4, TOP + stream * LANE + BAR - 24, pen.measureText(text).width + 8, 14);
    pen.globalAlpha = 1;
    pen.fillStyle = color("text");
    pen.fillText(text, 8, TOP + stream * LANE + BAR - 17);
  }
}

function paintAxis(pen, view, color, at) {
  const raw = 110 / view.kx;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const every = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= raw);
  pen.font = `10px ${SANS}`;
  pen.textBaseline = "middle";
  for (let moment = Math.max(0, Math.floor(-view.x / view.kx / every) * every); at(moment) < view.width; moment += every) {
    pen.fillStyle = color("border");
    pen.fillRect(at(moment), 18, 1, view.height - 22);
    pen.fillStyle = color("dim");
    pen.fillText(`${Number(moment.toPrecision(6))} µs`, at(moment) + 4, 12);
  }
}

function paintWaits(pen, view, color, at, mine) {
  const { launches } = line();
  const dense = view.kx < 1.2;
  launches.forEach(([call, stream, start, , , waits]) => waits.forEach((other) => {
    const [from, lane, begun, taken] = launches[other];
    const strong = call === mine || from === mine;
    if (lane === stream || (dense && !strong)) return;
    const [x, y, u, v] = [at(begun + taken), TOP + lane * LANE + BAR / 2, at(start), TOP + stream * LANE + BAR / 2];
    if (Math.max(x, u) < 0 || Math.min(x, u) > view.width) return;
    pen.strokeStyle = color(strong ? "text" : "edge");
    pen.lineWidth = strong ? 2 : 1;
    pen.beginPath();
    pen.moveTo(x, y);
    pen.bezierCurveTo(x + 12, y, u - 12, v, u, v);
    pen.stroke();
  }));
}

function hit(x, y) {
  const shown = line();
  if (!shown) return -1;
  const stream = Math.floor((y - TOP + 4) / LANE);
  return shown.launches.findIndex((launch) => launch[1] === stream && x >= launch[2] && x <= launch[2] + launch[3]);
}

function click(x, y) { const at = hit(x, y); if (at >= 0) choose(line().launches[at][0]); }

function hover(x, y, event) {
  const at = hit(x, y);
  if (at < 0) { hideTip(); return; }
  const [call, stream, start, taken, slack] = line().launches[at];
  const { final } = graph();
  showTip(event, h("b", {}, final.name(call)), h("div", {}, final.target(call)), h("div", { class: "dim" }, final.module(call)),
    h("div", { class: "dim" }, `task ${at}, stream ${stream}: ${micros(start)} + ${micros(taken)}, ${slack < 0.05 ? "critical" : `slack ${micros(slack)}`}`));
}

export const streamsView = {
  title: "Streams", element,
  shown: () => { draw(); requestAnimationFrame(reveal); },
  update(changed) {
    if (changed.has("graph") || changed.has("capture")) draw();
    if (changed.has("call")) { reveal(); if (line() && graph().final) drawLongest(line(), graph().final); }
  },
  redraw: () => picture.draw(),
  focus: () => picture.canvas.focus(),
};

function reveal() {
  const launch = line()?.launches.find(([call]) => call === current());
  if (launch) picture.show([launch[2], 0, launch[3], 1], 3);
  else picture.draw();
}
