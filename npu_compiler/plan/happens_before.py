"""Proof, before anything is captured, that a plan of streams keeps the program's meaning.

Every stream has a vector clock; an event carries the clock of the stream that recorded it, and a wait merges it. Then

* of two calls that touch a buffer, where one writes, the later one must be behind the earlier one;
* memory that is let go may be taken again by the next call on the stream that made it, so that stream must be behind
  every call that touched it;
* an event is recorded before it is waited for, a side stream begins with a wait, and the main stream is behind every
  call at the end: CANN ends no capture with an unjoined stream.

The check reads the plan alone; it shares nothing with the scheduler but the accesses of a call.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx

from npu_compiler.errors import PlanError
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.source import beginning, where
from npu_compiler.graph.traffic import launches
from npu_compiler.plan.accesses import HIDDEN, accesses
from npu_compiler.plan.schedule import FORK, MAIN, Step, StreamPlan

RULE = "plan/happens_before.py: what runs on several streams is ordered by events"
FIX = 'use options={"multistream": "off"} and report the plan'


def verify(graph: fx.Graph, plan: StreamPlan) -> None:
    """Proves `plan` right for `graph`.

    Raises:
        PlanError: the counterexample: the two calls, their source lines, and the event that is missing.
    """
    _Checker(graph, plan).run()


@dataclass(frozen=True)
class _Moment:
    """A call, and when it ran: the tick of its stream."""

    node: fx.Node
    stream: int
    tick: int


class _Checker:
    def __init__(self, graph: fx.Graph, plan: StreamPlan) -> None:
        self._graph, self._plan = graph, plan
        self._clocks = [[0] * plan.streams for _ in range(plan.streams)]
        self._events: dict[int, list[int]] = {FORK: [0] * plan.streams}
        self._writes: dict[int, _Moment] = {}
        self._reads: dict[int, list[_Moment]] = {}
        self._maker: dict[int, int] = {}
        self._held: dict[int, set[fx.Node]] = {}
        self._begun = {MAIN}

    def run(self) -> None:
        self._refuse_other_calls()
        steps = {step.node: step for step in self._plan.steps}
        for node in self._graph.nodes:
            if node in steps:
                self._step(steps[node])
            for buffer in {storage(tensor) for tensor in tensors(node)}:
                self._held.setdefault(buffer, set()).add(node)
            for gone in self._plan.releases.get(node, ()):
                self._release(gone, node)
        self._join()

    def _refuse_other_calls(self) -> None:
        """The plan issues each launch of the program once, in the program's order."""
        planned = [step.node for step in self._plan.steps]
        calls = [node for node in self._graph.nodes if launches(node)]
        if planned != calls:
            pairs = itertools.zip_longest(planned, calls)
            wrong = next(call or step for step, call in pairs if step is not call)
            self._fail("the plan does not issue the program's calls once each, in order", wrong)

    def _step(self, step: Step) -> None:
        clock = self._clocks[step.stream]
        for event in step.waits:
            self._wait(step.stream, event, step.node)
        if step.stream not in self._begun and not step.waits:
            self._fail(f"{step.node.name} begins stream {step.stream} without waiting for another stream", step.node)
        self._begun.add(step.stream)
        clock[step.stream] += 1
        moment = _Moment(step.node, step.stream, clock[step.stream])
        touched = accesses(step.node)
        for buffer in sorted(touched.reads | touched.writes):
            before = [self._writes.get(buffer), *(self._reads.get(buffer, ()) if buffer in touched.writes else ())]
            for other in before:
                if other is not None and clock[other.stream] < other.tick:
                    self._race(other, moment)
        for buffer in touched.reads:
            self._reads.setdefault(buffer, []).append(moment)
            self._maker.setdefault(buffer, step.stream)
        for buffer in touched.writes:
            self._writes[buffer], self._reads[buffer] = moment, []
            self._maker.setdefault(buffer, step.stream)
        if step.record:
            self._events[step.record] = list(clock)

    def _wait(self, stream: int, event: int, node: fx.Node | None) -> None:
        if event not in self._events:
            name = node.name if node is not None else "the end of the program"
            self._fail(f"{name} waits for event {event}, which nothing before it records", node)
        clock = self._clocks[stream]
        clock[:] = map(max, clock, self._events[event])

    def _release(self, gone: fx.Node, after: fx.Node) -> None:
        """Memory whose last holder goes may be taken by whatever its stream runs next."""
        for buffer in {storage(tensor) for tensor in tensors(gone)}:
            holders = self._held.get(buffer, set())
            holders.discard(gone)
            if holders or buffer in HIDDEN or buffer not in self._maker:
                continue
            clock = self._clocks[self._maker[buffer]]
            for moment in (*self._reads.get(buffer, ()), *filter(None, [self._writes.get(buffer)])):
                if clock[moment.stream] < moment.tick:
                    self._early(gone, after, moment, self._maker[buffer])

    def _join(self) -> None:
        for event in self._plan.joins:
            self._wait(MAIN, event, None)
        last = {step.stream: step.node for step in self._plan.steps}
        for stream, node in last.items():
            if self._clocks[MAIN][stream] < self._clocks[stream][stream]:
                self._fail(
                    f"stream {stream} is not joined: the main stream does not wait for {node.name} at the end", node
                )

    def _race(self, first: _Moment, second: _Moment) -> None:
        raise PlanError(
            f"{first.node.name} on stream {first.stream} and {second.node.name} on stream {second.stream} touch the "
            f"same memory in no order: {second.node.name} has to wait for an event recorded behind {first.node.name}",
            where=f"{where(first.node)} and {where(second.node)}",
            rule=RULE,
            fix=FIX,
        )

    def _early(self, gone: fx.Node, after: fx.Node, user: _Moment, stream: int) -> None:
        raise PlanError(
            f"the memory of {gone.name} is let go after {after.name}, and stream {stream}, which made it, may use it "
            f"again while {user.node.name} on stream {user.stream} still does: stream {stream} has to wait for an "
            f"event recorded behind {user.node.name}",
            where=f"{where(gone)} and {where(user.node)}",
            rule=RULE,
            fix=FIX,
        )

    def _fail(self, text: str, node: fx.Node | None) -> None:
        place = where(node) if node is not None else beginning(self._graph)
        raise PlanError(text, where=place, rule=RULE, fix=FIX)
