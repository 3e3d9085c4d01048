"""Two bundles compared, in the order in which things happen: the first difference is the one to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.contents import Captured, Plan, Stage
from npu_compiler.inspect.program import Call, Data, Program, Result, SizeValue
from npu_compiler.inspect.streams import planned, said

NOT_COMPARED = frozenset({"dump", "dump_inputs", "cache", "check", "print_pipeline"})
"""Options that the compiled program does not depend on."""


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
    kind. Times, paths and prices of captures don't count. Graphs are compared in the order in which they were made."""
    found = list(_environment(left, right))
    for one, other in itertools.zip_longest(left.graphs, right.graphs):
        if one is None or other is None:
            extra = one or other
            found.append(_of(extra.name, "graph", "compiled on one side only", one and one.name, other and other.name))
        else:
            found += _graph(one, other)
    return found


def _environment(left: Bundle, right: Bundle) -> Iterator[Difference]:
    one, other = left.header.environment, right.header.environment
    for name in sorted({*one.versions, *other.versions}):
        yield from _if_differ("", "environment", name, one.versions.get(name), other.versions.get(name))
    for name in ("cann", "device", "platform", "rank", "ranks"):
        yield from _if_differ("", "environment", name, getattr(one, name), getattr(other, name))
    for name in sorted({*one.variables, *other.variables} - {"NPU_COMPILER_DUMP"}):
        yield from _if_differ("", "environment", f"${name}", one.variables.get(name), other.variables.get(name))


def _graph(left: StoredGraph, right: StoredGraph) -> Iterator[Difference]:
    one, other = left.about, right.about
    for name in sorted({*one.options, *other.options} - NOT_COMPARED):
        yield from _if_differ(left.name, "options", name, one.options.get(name), other.options.get(name))
    names = [tuple(entry.name for entry in about.passes) for about in (one, other)]
    yield from _if_differ(left.name, "passes", "order of passes", *names)
    yield from _stages(left, right)
    yield from _plan(left.name, left.plan, right.plan)
    keys = [tuple(entry.key for entry in graph.captures) for graph in (left, right)]
    yield from _if_differ(left.name, "captures", "captured sizes", *keys)
    yield from _streams(left, right)


def _streams(left: StoredGraph, right: StoredGraph) -> Iterator[Difference]:
    """The first call of each captured size that runs on another stream, or waits for others."""
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


def _placed(graph: StoredGraph, capture: Captured) -> Iterator[tuple[str, str]]:
    """Where each call of a capture runs, and its place in the user's model."""
    stage = next((stage for stage in graph.stages if stage.name == "final"), None)
    if stage is None or not stage.program:
        return
    for call in planned(graph.program(stage), capture).calls:
        if call.cost is not None or call.waits:
            yield f"{call.name} on {said(call.stream, call.waits)}", str(call.place)


def _stages(left: StoredGraph, right: StoredGraph) -> Iterator[Difference]:
    theirs: dict[tuple[str, int], Stage] = _numbered(right)
    ours = _numbered(left)
    for key, one in ours.items():
        other = theirs.get(key)
        if other is None:
            yield _of(left.name, one.name, "stage on one side only", one.name, None)
            continue
        yield from _if_differ(left.name, one.name, "error", one.error, other.error)
        yield from _records(left.name, one, other)
        if one.program and other.program:
            yield from _program(left.name, one.name, left.program(one), right.program(other))
    for key in theirs.keys() - ours.keys():
        yield _of(left.name, key[0], "stage on one side only", None, key[0])


def _numbered(graph: StoredGraph) -> dict[tuple[str, int], Stage]:
    """The stages by their names; one that comes again by its number too."""
    found: dict[tuple[str, int], Stage] = {}
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


def _program(graph: str, stage: str, left: Program, right: Program) -> Iterator[Difference]:
    for one, other in itertools.zip_longest(left.calls, right.calls):
        ours, theirs = (None if call is None else _text(call) for call in (one, other))
        if ours != theirs:
            first = one or other
            yield _of(graph, stage, f"program, from call {first.name} on", ours, theirs, str(first.place))
            return
    yield from _if_differ(graph, stage, "sizes", left.sizes, right.sizes)
    yield from _if_differ(graph, stage, "what is known of sizes", left.assumptions, right.assumptions)


def _text(call: Call) -> str:
    """A call with its arguments and what it yields, in a line."""
    given = [_argument(item) for item in call.args]
    given += [f"{name}={_argument(item)}" for name, item in call.kwargs.items()]
    values = ", ".join(
        str(value) if isinstance(value, SizeValue) else f"{value} of strides {list(value.stride)} on {value.device}"
        for value in call.values
    )
    return f"{call.name} = {call.target}({', '.join(given)})  # {values}{' once' if call.once else ''}"


def _argument(item: Any) -> str:
    if isinstance(item, Result):
        return item.name
    if hasattr(item, "items") and hasattr(item, "kind"):
        return f"{item.kind}({', '.join(map(_argument, item.items))})"
    return getattr(item, "text", None) or repr(item)


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
