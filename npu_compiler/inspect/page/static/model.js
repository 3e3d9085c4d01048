// The bundle's data: programs as columns, with the look-ups that the views need, each made when first asked for.

export const ENGINES = ["host", "matrix", "vector", "copy", "link"];
export const ENGINE_NOTE = "estimated for a 910B3 from bytes and operations; nothing was measured on a card";

function lazy(object, name, make) {
  const value = make();
  Object.defineProperty(object, name, { value });
  return value;
}

export class Program {
  constructor(columns, texts) {
    this.columns = columns;
    this.texts = texts;
    this.size = columns.name.length;
  }
  name(i) { return this.texts[this.columns.name[i]]; }
  target(i) { return this.texts[this.columns.target[i]]; }
  args(i) { return this.texts[this.columns.args[i]]; }
  values(i) { return this.texts[this.columns.values[i]]; }
  layout(i) { return this.texts[this.columns.layout[i]]; }
  madeBy(i) { return this.texts[this.columns.made_by[i]]; }
  isCall(i) { return this.columns.op[i] === 2; }
  isInput(i) { return this.columns.op[i] < 2; }
  inputs(i) { return this.columns.inputs[i]; }
  engine(i) { return this.columns.engine[i]; }
  micros(i) { return this.columns.us[i]; }
  bytes(i) { return this.columns.bytes[i]; }
  layers(i) { return this.columns.layers[i] ?? 1; }
  storages(i) { return this.columns.storages[i]; }
  writes(i) { return this.columns.writes[i] ?? []; }
  replaces(i) { return (this.columns.replaces[i] ?? []).map((number) => this.texts[number]); }
  // The place of a call: module, file, line, function and the line's text.
  place(i) {
    const [module, file, line, fn, text] = this.columns.places[this.columns.place[i]];
    const t = this.texts;
    return { module: t[module], file: t[file], line, fn: t[fn], text: t[text] };
  }
  module(i) { return this.texts[this.columns.places[this.columns.place[i]][0]]; }
  shortTarget(i) { return this.target(i).replace(/^aten\./, "").replace(/\.default$/, ""); }

  get index() {
    return lazy(this, "index", () => new Map(this.columns.name.map((number, i) => [this.texts[number], i])));
  }
  get once() { return lazy(this, "once", () => new Set(this.columns.once)); }
  get users() {
    return lazy(this, "users", () => {
      const found = Array.from({ length: this.size }, () => []);
      this.columns.inputs.forEach((inputs, i) => inputs.forEach((other) => found[other].push(i)));
      return found;
    });
  }
  get hay() {
    return lazy(this, "hay", () => Array.from({ length: this.size }, (_, i) => {
      const { module, file, line, text } = this.place(i);
      return `${this.name(i)} ${this.target(i)} ${this.args(i)} ${this.values(i)} ${module} ${file}:${line} ${text} ${this.madeBy(i)}`.toLowerCase();
    }));
  }
  // Which calls hold each storage.
  get holders() {
    return lazy(this, "holders", () => {
      const found = new Map();
      this.columns.storages.forEach((storages, i) => storages.forEach((storage) => {
        if (!found.has(storage)) found.set(storage, []);
        found.get(storage).push(i);
      }));
      return found;
    });
  }
  // What stands for each call of the lowered program.
  get standsFor() {
    return lazy(this, "standsFor", () => {
      const found = new Map();
      const add = (name, i) => { if (!found.has(name)) found.set(name, []); found.get(name).push(i); };
      for (let i = 0; i < this.size; i += 1) {
        const replaced = this.replaces(i);
        (replaced.length ? replaced : [this.name(i)]).forEach((name) => add(name, i));
      }
      return found;
    });
  }
  get totals() {
    return lazy(this, "totals", () => {
      const found = { calls: 0, kernels: 0, bytes: 0, micros: 0 };
      for (let i = 0; i < this.size; i += 1) {
        const times = this.layers(i);
        if (this.isCall(i)) found.calls += times;
        if (this.engine(i)) found.kernels += times;
        found.bytes += times * this.bytes(i);
        found.micros += times * this.micros(i);
      }
      return found;
    });
  }
  // Modules as a tree of path, children and the calls right in it, in the order of their first call.
  get modules() {
    return lazy(this, "modules", () => {
      const root = { name: "", path: "", children: new Map(), calls: [], total: 0, micros: 0 };
      for (let i = 0; i < this.size; i += 1) {
        if (!this.isCall(i)) continue;
        let node = root;
        const enter = (next) => { node = next; node.total += 1; node.micros += this.micros(i) * this.layers(i); };
        enter(root);
        const path = this.module(i);
        if (path) for (const part of path.split(".")) {
          if (!node.children.has(part)) {
            node.children.set(part, { name: part, path: node.path ? `${node.path}.${part}` : part, children: new Map(), calls: [], total: 0, micros: 0 });
          }
          enter(node.children.get(part));
        }
        node.calls.push(i);
      }
      return root;
    });
  }
}

export const within = (path, module) => path === module || path.startsWith(`${module}.`);

class Graph {
  constructor(data, texts) {
    Object.assign(this, data);
    this.texts = texts;
    this.all = data.programs.map((columns) => new Program(columns, texts));
    this.final = data.stages.some((stage) => stage.name === "final") ? this.all.at(-1) : null; // stages of streams come behind it
    this.finalStage = data.stages.findLastIndex((stage) => !stage.streams); // "final", unless the compilation ended before
    this.rows = new Map();
  }
  // The program at a stage; that of the last stage before it that has one, where a failure left none.
  program(stage) {
    for (let i = stage; i >= 0; i -= 1) if (this.stages[i].program >= 0) return this.all[this.stages[i].program];
    return null;
  }
  before(stage) { return stage > 0 ? this.program(stage - 1) : null; }
  // The stage of a pass, or of the pass that has a rule of this name.
  stageOf(name) {
    const pass = this.about.passes.find((entry) => entry.name === name || entry.rules.some((rule) => rule.name === name));
    return this.stages.findLastIndex((stage) => stage.name === (pass?.name ?? name));
  }

  // What a stage changed, by name: sets of names, and for changed calls what they were.
  changes(stage) {
    const found = this.stages[stage].changes;
    const names = (numbers) => new Set((numbers ?? []).map((number) => this.texts[number]));
    return {
      added: names(found?.added), removed: names(found?.removed), moved: names(found?.moved),
      changed: new Map((found?.changed ?? []).map(([name, aspects]) => [
        this.texts[name], Object.entries(aspects).map(([aspect, text]) => [aspect, this.texts[text]]),
      ])),
    };
  }

  // The lines of a stage: its calls, and in their old place those that it removed.
  lines(stage) {
    if (this.rows.has(stage)) return this.rows.get(stage);
    const program = this.program(stage);
    const found = [];
    if (program) {
      const old = this.before(stage);
      const { added, removed, moved, changed } = this.changes(stage);
      let at = 0;
      const emitRemoved = (until) => {
        for (; at < until; at += 1) if (removed.has(old.name(at))) found.push({ kind: "removed", i: at, program: old });
      };
      for (let i = 0; i < program.size; i += 1) {
        const name = program.name(i);
        if (removed.size && old.index.has(name) && !moved.has(name)) emitRemoved(old.index.get(name));
        const kind = added.has(name) ? "added" : changed.has(name) ? "changed" : moved.has(name) ? "moved" : "same";
        found.push({ kind, i, program });
      }
      if (removed.size) emitRemoved(old.size);
    }
    this.rows.set(stage, found);
    return found;
  }

  // Launches of the captured graph by call of the final program: pairs of timeline and position.
  get launches() {
    return lazy(this, "launches", () => {
      const found = new Map();
      this.timelines.forEach((line, number) => line.launches.forEach(([call], position) => {
        if (!found.has(call)) found.set(call, []);
        found.get(call).push([number, position]);
      }));
      return found;
    });
  }

  // Calls of the final program that do what a call of some stage does.
  inFinal(program, i) {
    if (!this.final || program === this.final) return program === this.final ? [i] : [];
    const lowered = program.replaces(i);
    const found = (lowered.length ? lowered : [program.name(i)]).flatMap((name) => this.final.standsFor.get(name) ?? []);
    const same = this.final.index.get(program.name(i));
    return [...new Set(same === undefined ? found : [same, ...found])];
  }
}

export async function load(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  data.graphs = data.graphs.map((graph) => new Graph(graph, data.texts));
  return data;
}
