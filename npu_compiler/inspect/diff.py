"""Two bundles compared, in the order in which things happen: the first difference is the one to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.contents import FINAL, Captured, Plan, Stage
from npu_compiler.inspect.program import Call, Data, Items, Named, Program, Result, SizeValue
from npu_compiler.inspect.streams import planned, said

NOT_COMPARED = frozenset({"dump", "dump_inputs", "cache", "check", "print_pipeline"})
"""Options that the compiled program does not depend on."""


Numbered = dict[tuple[str, int], Stage]


class Difference(Data):
    """Something that differs.

    Attributes:
        graph: the graph; empty for the environment.
        stage: "environment", "options", the stage of the pipeline, "plan" or "captures".
        what: what differs. `left`, `right`: how.
        place: the place in the user's model, where it has one.
    """

    graph: str
    stage: str
    what: str
    left: str
    right: str
    place: str = ""

    def __str__(self) -> str:
        head = f"{self.graph + ', ' if self.graph else ''}{self.stage}: {self.what}"
        lines = [head, f"  - {self.left}", f"  + {self.right}"]
        return "\n".join([*lines, f"  at {self.place}"] if self.place else lines)


def differences(left: Bundle, right: Bundle) -> list[Difference]:
    """What differs between two compilations, in the order of its making; of a stage only the first difference of each
    kind, and nothing that an earlier stage had already. Times, paths and prices of captures don't count, nor, between
    two ranks of as many, the rank and the devices' indices. Graphs are compared in the order in which they were made.
    """
    found = list(_environment(left, right))
    ranks = {bundle.header.environment.rank for bundle in (left, right)}
    for one, other in itertools.zip_longest(left.graphs, right.graphs):
        if one is None or other is None:
            extra = one or other
            found.append(_of(extra.name, "graph", "compiled on one side only", one and one.name, other and other.name))
        else:
            found += _graph(one, other, indexed=len(ranks) == 1)
    return found


def _environment(left: Bundle, right: Bundle) -> Iterator[Difference]:
    one, other = left.header.environment, right.header.environment
    for name in sorted({*one.versions, *other.versions}):
        yield from _if_differ("", "environment", name, one.versions.get(name), other.versions.get(name))
    for name in ("cann", "device", "platform", "ranks", *(("rank",) if one.ranks != other.ranks else ())):
        yield from _if_differ("", "environment", name, getattr(one, name), getattr(other, name))
    for name in sorted({*one.variables, *other.variables} - {"NPU_COMPILER_DUMP"}):
        yield from _if_differ("", "environment", f"${name}", one.variables.get(name), other.variables.get(name))


def _graph(left: StoredGraph, right: StoredGraph, indexed: bool) -> Iterator[Difference]:
    """The differences of two graphs; `indexed`: the index of a device counts."""
    one, other = left.about, right.about
    for name in sorted({*one.options, *other.options} - NOT_COMPARED):
        yield from _if_differ(left.name, "options", name, one.options.get(name), other.options.get(name))
    yield from _passes(left, right)
    yield from _stages(left, right, indexed)
    yield from _plan(left.name, left.plan, right.plan)
    keys = [tuple(entry.key for entry in graph.captures) for graph in (left, right)]
    yield from _if_differ(left.name, "captures", "captured sizes", *keys)
    yield from _streams(left, right)


def _passes(left: StoredGraph, right: StoredGraph) -> Iterator[Difference]:
    names = [[entry.name for entry in graph.about.passes] for graph in (left, right)]
    ours, theirs = (", ".join(name for name in one if name not in two) for one, two in (names, names[::-1]))
    if ours or theirs:
        yield _of(left.name, "passes", "on one side only", ours or None, theirs or None)
    else:
        yield from _if_differ(left.name, "passes", "order of passes", *map(tuple, names))


def _streams(left: StoredGraph, right: StoredGraph) -> Iterator[Difference]:
    """The first call of each captured size that runs on another stream, or waits for others; nothing where the calls
    are others anyway, which a stage has told."""
    programs = [_final(graph) for graph in (left, right)]
    if len({frozenset(call.name for call in program.calls) if program else None for program in programs}) > 1:
        return
    theirs = {capture.key: capture for capture in right.captures}
    for capture in left.captures:
        other = theirs.get(capture.key)
        if other is None:
            continue
        pairs = itertools.zip_longest(_placed(left, capture), _placed(right, other), fillvalue=(None, ""))
        for (one, place), (two, other_place) in pairs:
            if one != two:
                yield _of(left.name, f"streams: {capture.key}", "from this call on", one, two, place or other_place)
                break


def _final(graph: StoredGraph) -> Program | None:
    stage = next((stage for stage in graph.stages if stage.name == FINAL), None)
    return None if stage is None or not stage.program else graph.program(stage)


def _placed(graph: StoredGraph, capture: Captured) -> Iterator[tuple[str, str]]:
    """Where each call of a capture runs, and its place in the user's model."""
    program = _final(graph)
    for call in planned(program, capture).calls if program is not None else ():
        if call.cost is not None or call.waits:
            yield f"{call.name} on {said(call.stream, call.waits)}", str(call.place)


def _stages(left: StoredGraph, right: StoredGraph, indexed: bool) -> Iterator[Difference]:
    ours, theirs = _numbered(left), _numbered(right)
    told: set[tuple[str, str]] = set()
    for key, one in ours.items():
        other = theirs.get(key)
        if other is None:
            continue
        yield from _if_differ(left.name, one.name, "error", one.error, other.error)
        yield from _records(left.name, one, other)
        if not one.program or not other.program:
            continue
        for entry in _program(left.name, one.name, left.program(one), right.program(other), indexed):
            if (entry.left, entry.right) not in told:
                yield entry
            told.add((entry.left, entry.right))
    one_side, other_side = _alone(left, right, ours, theirs), _alone(right, left, theirs, ours)
    if one_side or other_side:
        yield _of(left.name, "stages", "on one side only", one_side or None, other_side or None)


def _alone(here: StoredGraph, there: StoredGraph, ours: Numbered, theirs: Numbered) -> str:
    """The stages that the other side lacks, but for those of passes that it was compiled without."""
    names = [{entry.name for entry in graph.about.passes} for graph in (here, there)]
    extra = [stage for key, stage in ours.items() if key not in theirs and stage.name not in names[0] - names[1]]
    return ", ".join(f"{stage.name} ({stage.error})" if stage.error else stage.name for stage in extra)


def _numbered(graph: StoredGraph) -> Numbered:
    """The stages by their names; one that comes again by its number too."""
    found: Numbered = {}
    for stage in graph.stages:
        found[stage.name, sum(name == stage.name for name, _ in found)] = stage
    return found


def _records(graph: str, left: Stage, right: Stage) -> Iterator[Difference]:
    for kind, texts in (
        ("rewrite", [[f"{fire.rule} ({', '.join(fire.nodes)})" for fire in one.fired] for one in (left, right)]),
        ("left out", [[f"{entry.rule}: {entry.reason}" for entry in one.refused] for one in (left, right)]),
    ):
        one, other = texts
        for index, (ours, theirs) in enumerate(itertools.zip_longest(one, other)):
            if ours != theirs:
                entries: Any = left if index < len(one) else right
                entry = (entries.fired if kind == "rewrite" else entries.refused)[index]
                yield _of(graph, left.name, f"{kind} {index}", ours, theirs, entry.place)
                break


def _program(graph: str, stage: str, left: Program, right: Program, indexed: bool) -> Iterator[Difference]:
    for one, other in itertools.zip_longest(left.calls, right.calls):
        ours, theirs = (None if call is None else _text(call, indexed) for call in (one, other))
        if ours != theirs:
            first = one or other
            yield _of(graph, stage, f"program, from call {first.name} on", ours, theirs, str(first.place))
            return
    yield from _if_differ(graph, stage, "sizes", left.sizes, right.sizes)
    yield from _if_differ(graph, stage, "what is known of sizes", left.assumptions, right.assumptions)


def _text(call: Call, indexed: bool) -> str:
    """A call with its arguments and what it yields, in a line; devices with their index, or without."""
    given = [_argument(item, indexed) for item in call.args]
    given += [f"{name}={_argument(item, indexed)}" for name, item in call.kwargs.items()]
    values = ", ".join(
        str(value)
        if isinstance(value, SizeValue)
        else f"{value} of strides {list(value.stride)} on {_device(value.device, indexed)}"
        for value in call.values
    )
    return f"{call.name} = {call.target}({', '.join(given)})  # {values}{' once' if call.once else ''}"


def _argument(item: Any, indexed: bool) -> str:
    if isinstance(item, Result):
        return item.name
    if isinstance(item, Items):
        return f"{item.kind}({', '.join(_argument(inner, indexed) for inner in item.items)})"
    if isinstance(item, Named):
        return _device(item.text, indexed) if item.kind == "device" else item.text
    return repr(item)


def _device(text: str, indexed: bool) -> str:
    return text if indexed else text.partition(":")[0]


def _plan(graph: str, left: Plan | None, right: Plan | None) -> Iterator[Difference]:
    if left is None or right is None:
        yield from _if_differ(graph, "plan", "whether it was made", left is not None, right is not None)
        return
    for what, of in (
        ("order of calls", lambda plan: plan.order and plan.order.winner),
        ("memory in one block", lambda plan: plan.memory and plan.memory.peak),
        ("memory alive at once", lambda plan: plan.memory and plan.memory.live),
        ("providers", lambda plan: plan.providers),
        ("computed once", lambda plan: plan.once),
        ("cache", lambda plan: plan.cache),
    ):
        yield from _if_differ(graph, "plan", what, of(left), of(right))


def _if_differ(graph: str, stage: str, what: str, left: object, right: object) -> Iterator[Difference]:
    if left != right:
        yield _of(graph, stage, what, left, right)


def _of(graph: str, stage: str, what: str, left: object, right: object, place: str = "") -> Difference:
    ours, theirs = ("nothing" if side is None or side == () else str(side) for side in (left, right))
    return Difference(graph=graph, stage=stage, what=what, left=ours, right=theirs, place=place)
