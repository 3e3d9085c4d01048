"""A program on several streams, as the device may run it: the plan's waits hold, all else happens in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from torch import fx

from npu_compiler.graph.device import Device
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import MAIN, StreamPlan, place

STREAMS = 3
FREE_EVENTS = Device(event=0.0)
"""A device on which another stream always pays."""
Choice = Callable[[list[int]], int]


def interleavings(module: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The program's calls in orders that a plan of several streams allows: side streams as early as they may be, as
    late as they may be, and at random. The plan is proved first. Nothing if the plan has one stream."""
    plan = place(Dependencies.of(module.graph), {}, STREAMS, FREE_EVENTS)
    verify(module.graph, plan)
    if plan.streams == 1:
        return
    orders: dict[str, Choice] = {
        "side streams first": max,
        "the main stream first": min,
        "at random": random.Random(len(plan.steps)).choice,
    }
    seen = set()
    for name, choice in orders.items():
        found = _ordered(module, plan, choice)
        if found.code not in seen:
            seen.add(found.code)
            yield name, found


def _ordered(module: fx.GraphModule, plan: StreamPlan, choice: Choice) -> fx.GraphModule:
    """`choice` picks the stream, of those whose next call may run, that runs it."""
    queues = [[step for step in plan.steps if step.stream == stream] for stream in range(plan.streams)]
    recorded = {0}
    launched = {step.node for step in plan.steps}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()

    def emit(node: fx.Node) -> None:
        """Copies a node, after the views and sizes that it reads and that nobody launches."""
        for source in node.all_input_nodes:
            if source not in copies:
                assert source not in launched, f"{node.name} may run before {source.name}, which it reads"
                emit(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)

    for node in module.graph.find_nodes(op="placeholder"):
        emit(node)
    while any(queues):
        ready = [stream for stream, queue in enumerate(queues) if queue and recorded.issuperset(queue[0].waits)]
        assert ready, "every stream waits for another"
        step = queues[choice(ready)].pop(0)
        emit(step.node)
        recorded.add(step.record)
    assert recorded.issuperset(plan.joins) and MAIN in range(plan.streams)
    for node in module.graph.nodes:
        if node not in copies and node.op != "output":
            emit(node)
    emit(module.graph.output_node())
    return fx.GraphModule(module, graph)
