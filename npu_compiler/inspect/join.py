"""The tasks of a profiler's trace, told by the order of their launches which call of a program each belongs to.

A profiler knows the names of kernels and no graph. A bundle knows the tasks that were captured, in order, and the call
of each (contents.Captured). A replay shows in the trace as those tasks again: their `aclnn` names in the same order on
one stream, each as one kernel or several.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from npu_compiler.errors import TraceError
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import Captured
from npu_compiler.inspect.contents import Task as Launch
from npu_compiler.inspect.program import Call
from npu_compiler.inspect.timeline import Task

_PRIVATE = 0xE000  # the first of the characters that Unicode gives no meaning to
_OTHER = chr(_PRIVATE)


def join(tasks: Sequence[Task], graph: StoredGraph) -> list[Task]:
    """`tasks`, with the call where it is known.

    Raises:
        TraceError: the bundle holds no captured tasks, or no replay of them is in the trace.
    """
    calls = {call.name: call for call in graph.program(graph.stage("final")).calls}
    told: dict[Task, dict[str, str]] = {}
    streams = _streams(tasks)
    known = [capture for capture in graph.captures if capture.tasks]
    for capture in sorted(known, key=lambda capture: -len(capture.tasks)):
        for launches in _launches(capture):
            for stream in streams:
                told |= _found(launches, [task for task in stream if task not in told], calls, graph.name)
    if not told:
        raise TraceError(
            f"no replay of {graph.name} is in the trace",
            rule="a replay shows as the captured operators in their order on one stream"
            if known
            else "the bundle holds the tasks of each capture, which CANN tells on the host runtime only",
            fix="name the bundle of the same program, made on the host runtime with the same versions and options",
        )
    return [replace(task, said=task.said | told[task]) if task in told else task for task in tasks]


def operator(name: str) -> str:
    """The operator that a kernel belongs to: "aclnnAdd" of "aclnnAdd_AddAiCore_Add"."""
    return name.split("_", 1)[0]


def _streams(tasks: Sequence[Task]) -> list[list[Task]]:
    found: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        if not task.waits:
            found[task.stream].append(task)
    return list(found.values())


def _launches(capture: Captured) -> Iterator[list[Launch]]:
    """The operators of each of a capture's streams."""
    found: dict[int, list[Launch]] = defaultdict(list)
    for task in capture.tasks:
        if operator(task.name).startswith(("aclnn", "Hccl")):
            found[task.stream].append(task)
    yield from found.values()


def _found(
    launches: Sequence[Launch], tasks: Sequence[Task], calls: Mapping[str, Call], graph: str
) -> dict[Task, dict[str, str]]:
    """The calls of the tasks that are replays of `launches`."""
    letters = {name: chr(_PRIVATE + 1 + at) for at, name in enumerate(dict.fromkeys(_operators(launches)))}
    runs = [(name, list(group)) for name, group in groupby(launches, key=lambda launch: operator(launch.name))]
    pattern = "".join(f"({letters[name]}{{{len(group)},}}{'?' if last else ''})" for name, group, last in _last(runs))
    text = "".join(letters.get(operator(task.name), _OTHER) for task in tasks)
    told: dict[Task, dict[str, str]] = {}
    for match in re.finditer(pattern, text):
        for at, (_, group) in enumerate(runs, 1):
            for task, nodes in _shared(tasks[match.start(at) : match.end(at)], group):
                told[task] = _said(nodes, calls, graph)
    return told


def _operators(launches: Sequence[Launch]) -> Iterator[str]:
    return (operator(launch.name) for launch in launches)


def _last(runs: Sequence[tuple[str, list[Launch]]]) -> Iterator[tuple[str, list[Launch], bool]]:
    """The runs; only the last takes no more kernels than it must, as the next replay may begin with its operator."""
    for at, (name, group) in enumerate(runs, 1):
        yield name, group, at == len(runs)


def _shared(tasks: Sequence[Task], launches: Sequence[Launch]) -> Iterator[tuple[Task, list[str]]]:
    """Which calls each kernel may belong to: one, unless a row of equal operators has a number of kernels that can't
    be shared out evenly."""
    each, rest = divmod(len(tasks), len(launches))
    for at, task in enumerate(tasks):
        yield task, [launch.node for launch in (launches if rest else [launches[at // each]]) if launch.node]


def _said(nodes: Sequence[str], calls: Mapping[str, Call], graph: str) -> dict[str, str]:
    if len(nodes) != 1 or nodes[0] not in calls:
        return {"graph": graph, "node": " or ".join(nodes)} if nodes else {"graph": graph}
    call = calls[nodes[0]]
    said = {
        "node": call.name,
        "call": str(call.target),
        "module": call.place.module,
        "source": call.place.code,
        "pass": call.made_by,
        "graph": graph,
    }
    return {name: text for name, text in said.items() if text}
