"""What the page shows of a bundle, as compact JSON: programs as columns, each distinct one once, texts by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.contents import Captured, Memory, Stage
from npu_compiler.inspect.page.changes import Changes, changes
from npu_compiler.inspect.page.texts import Texts, argument_text
from npu_compiler.inspect.page.timeline import Timeline, timeline
from npu_compiler.inspect.program import Call, Cost, Program, TensorValue
from npu_compiler.inspect.streams import planned, said, summary

OPS = ("placeholder", "get_attr", "call_function", "output")
ENGINES = ("", "matrix", "vector", "copy", "link")


def page_data(bundle: Bundle, graphs: Sequence[StoredGraph]) -> dict[str, Any]:
    """The page's data. Texts are numbers of `texts`, save in what is read as it stands (`about`, `environment`)."""
    texts = Texts()
    found = [_graph(graph, texts) for graph in graphs]
    header = bundle.header
    return {
        "bundle": str(bundle),
        "started": header.started,
        "environment": header.environment.model_dump(mode="json"),
        "graphs": found,
        "texts": texts.all,
    }


def _graph(graph: StoredGraph, texts: Texts) -> dict[str, Any]:
    files: dict[str, int] = {}
    programs: list[Program] = []
    stages = []
    for stage in graph.stages:
        number, delta = -1, None
        if stage.program:
            fresh = stage.program not in files
            if fresh:
                files[stage.program] = len(programs)
                programs.append(graph.program(stage))
            number = files[stage.program]
            if fresh and number:
                delta = _changes(changes(programs[number - 1], programs[number]), texts)
        stages.append(_stage(stage, number, delta))
    if graph.incomplete:
        stages.append(_stage(Stage(name="incomplete", error=graph.incomplete), -1, None))
    last = programs[-1] if programs and graph.stages[-1].name == "final" else None
    if last is not None:
        stages += [_streams(last, len(programs) - 1, capture, texts) for capture in graph.captures if capture.steps]
    lines = [timeline(last, capture) for capture in graph.captures] if last is not None else []
    if last is not None and not lines:
        lines = [timeline(last, None)]
    plan = graph.plan
    return {
        "name": graph.name,
        "about": graph.about.model_dump(mode="json"),
        "programs": [_program(program, texts) for program in programs],
        "stages": stages,
        "plan": None if plan is None else plan.model_dump(mode="json", exclude={"memory"}),
        "memory": None if plan is None or plan.memory is None else _memory(plan.memory),
        "captures": [capture.model_dump(mode="json", exclude={"steps"}) for capture in graph.captures],
        "timelines": [_timeline(line) for line in lines],
    }


def _stage(stage: Stage, program: int, delta: dict[str, Any] | None) -> dict[str, Any]:
    kept = stage.model_dump(mode="json", exclude={"program"}, exclude_defaults=True)
    return {**kept, "name": stage.name, "program": program, "changes": delta}


def _streams(program: Program, number: int, capture: Captured, texts: Texts) -> dict[str, Any]:
    """The plan of a capture's streams as a stage of its own: it leaves the program and says where each call runs."""
    placed = planned(program, capture)
    calls = [(index, call) for index, call in enumerate(placed.calls) if call.stream or call.waits]
    return {
        **_stage(Stage(name=f"streams: {capture.key}"), number, _changes(changes(program, placed), texts)),
        "streams": {index: texts(said(call.stream, call.waits)) for index, call in calls},
        "calls": len(program.calls),
        "note": f"Planned when {capture.key} was captured: {summary(capture)}.",
    }


def _changes(found: Changes, texts: Texts) -> dict[str, Any]:
    return {
        "removed": list(map(texts, found.removed)),
        "added": list(map(texts, found.added)),
        "moved": list(map(texts, found.moved)),
        "changed": [
            [texts(entry.name), {aspect: texts(text) for aspect, text in entry.before.items()}]
            for entry in found.changed
        ],
    }


def _program(program: Program, texts: Texts) -> dict[str, Any]:
    calls = program.calls
    position = {call.name: index for index, call in enumerate(calls)}
    places = {call.place: None for call in calls}
    numbers = {place: index for index, place in enumerate(places)}
    costs = [call.cost or Cost(engine="vector", bytes=0, microseconds=0.0) for call in calls]
    return {
        "name": [texts(call.name) for call in calls],
        "op": [OPS.index(call.op) for call in calls],
        "target": [texts(call.target) for call in calls],
        "args": [texts(_arguments(call)) for call in calls],
        "values": [texts(", ".join(map(str, call.values))) for call in calls],
        "layout": [texts(_layout(call)) for call in calls],
        "storages": [[value.storage for value in call.values if isinstance(value, TensorValue)] for call in calls],
        "writes": {index: call.writes for index, call in enumerate(calls) if call.writes},
        "inputs": [[position[name] for name in call.inputs()] for call in calls],
        "place": [numbers[call.place] for call in calls],
        "places": [
            [texts(one.module), texts(one.file), one.line, texts(one.function), texts(one.text)] for one in places
        ],
        "made_by": [texts(call.made_by) for call in calls],
        "replaces": {
            index: [texts(name) for name in call.replaces] for index, call in enumerate(calls) if call.replaces
        },
        "once": [index for index, call in enumerate(calls) if call.once],
        "layers": {index: call.layers for index, call in enumerate(calls) if call.layers != 1},
        "engine": [ENGINES.index(call.cost.engine) if call.cost else 0 for call in calls],
        "bytes": [cost.bytes for cost in costs],
        "us": [cost.microseconds for cost in costs],
        "sizes": program.sizes,
        "assumptions": program.assumptions,
    }


def _arguments(call: Call) -> str:
    given = [argument_text(item) for item in call.args]
    given += [f"{name}={argument_text(item)}" for name, item in call.kwargs.items()]
    return ", ".join(given)


def _layout(call: Call) -> str:
    """Strides, offset and device of what a call yields."""
    return "; ".join(
        f"strides [{', '.join(map(str, value.stride))}]"
        f"{f' from {value.offset}' if value.offset else ''}, {value.device}"
        for value in call.values
        if isinstance(value, TensorValue)
    )


def _memory(memory: Memory) -> dict[str, Any]:
    kept = memory.model_dump(mode="json", exclude={"blocks"})
    keys = ("name", "first", "last", "offset", "end", "returned", "start", "size")
    return {**kept, "blocks": [[getattr(block, key) for key in keys] for block in memory.blocks]}


def _timeline(line: Timeline) -> dict[str, Any]:
    kept = line.model_dump(mode="json", exclude={"launches"})
    keys = ("call", "stream", "start", "microseconds", "slack", "waits")
    return {**kept, "launches": [[getattr(launch, key) for key in keys] for launch in line.launches]}
