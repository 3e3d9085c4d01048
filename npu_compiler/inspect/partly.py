"""A layer behind the passes, applied to a part of a program: what `bisect` halves until one call is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from npu_compiler.aclgraph.replay import Replayer
from npu_compiler.aclgraph.streams import Streams
from npu_compiler.config import Options
from npu_compiler.graph.once import LASTING
from npu_compiler.plan.order import arrange
from npu_compiler.plan.schedule import MAIN, Step, StreamPlan


def order(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Puts the calls into the chosen order (plan/order.py), but only the first `count` nodes of it: the others follow
    in the order they had. Returns all in the chosen order."""
    before = list(graph.nodes)
    arrange(graph)
    chosen = list(graph.nodes)
    first = chosen[:count]
    taken = set(first)
    last = None
    for node in (*first, *(node for node in before if node not in taken)):
        if last is not None:
            last.append(node)
        last = node
    graph.lint()
    return chosen


class FirstSteps(Streams):
    """The streams of a plan for its first `count` launches; the others follow on the main stream.

    Attributes:
        steps: the whole plan's launches, when it was made.
    """

    def __init__(self, program: fx.GraphModule, limit: int, count: int) -> None:
        super().__init__(program, limit)
        self.steps: tuple[Step, ...] = ()
        self._count = count

    def plan(self, arguments: Sequence[Any]) -> StreamPlan | None:
        plan = super().plan(arguments)
        if plan is None:
            return None
        self.steps = plan.steps
        return first_steps(plan, self._count)


def first_steps(plan: StreamPlan, count: int) -> StreamPlan:
    """`plan` for its first `count` launches. The next waits for all of them; it and the rest are on the main stream,
    and keep their values to the end: when a side stream may have them back is another question there."""
    if count >= len(plan.steps):
        return plan
    steps = list(plan.steps[:count])
    events = plan.events - 1
    joins = []
    for stream in sorted({step.stream for step in steps} - {MAIN}):
        index = max(index for index, step in enumerate(steps) if step.stream == stream)
        if not steps[index].record:
            events += 1
            steps[index] = dataclasses.replace(steps[index], record=events)
        joins.append(steps[index].record)
    for index, step in enumerate(plan.steps[count:]):
        waits = tuple(joins) if index == 0 else ()
        steps.append(Step(step.node, MAIN, waits))
    first = plan.steps[count].node
    releases = {node: gone for node, gone in plan.releases.items() if node < first}
    return dataclasses.replace(plan, steps=tuple(steps), joins=(), releases=releases)


def captured_first(
    module: fx.GraphModule, count: int, stable: Sequence[int], options: Options, name: str
) -> Callable[..., Any]:
    """A program whose first `count` calls are captured and replayed, and whose others are called one by one."""
    nodes = list(module.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    inside = {node for node in nodes if node.op == "placeholder"} | set(calls[:count])
    inside |= {node for node in nodes if node.op == "get_attr"}
    handed = [node for node in nodes if node in inside and any(user not in inside for user in node.users)]
    first, rest = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    again: dict[fx.Node, fx.Node] = {}
    for node in handed:
        again[node] = rest.placeholder(node.name)
        again[node].meta = dict(node.meta)
    for node in nodes:
        if node in inside:
            copies[node] = first.node_copy(node, copies.__getitem__)
        elif node.op != "output":
            again[node] = rest.node_copy(node, again.__getitem__)
    first.output([copies[node] for node in handed])
    rest.output(fx.node.map_arg(module.graph.output_node().args[0], again.__getitem__))
    head, tail = fx.GraphModule(module, first), fx.GraphModule(module, rest)
    replayer = Replayer(head, stable, options, name, ())
    return lambda *args: tail(*replayer(*args))


def lasting(graph: fx.Graph) -> list[int]:
    """Positions of the inputs that lie at the same address at every call."""
    return [index for index, node in enumerate(graph.find_nodes(op="placeholder")) if node.meta.get(LASTING)]
