"""The streams of a captured program: the plan for a shape, and running it inside a capture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from npu_compiler.aclgraph.labels import Labeller, Labels
from npu_compiler.config import Options
from npu_compiler.graph.rolled import Rolled
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.estimate import sizes_of
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import FORK, MAIN, StreamPlan, schedule


class Streams:
    """The streams that a program is captured on; its shapes share them.

    Args:
        limit: how many streams a captured graph may use; 1 plans nothing.
    """

    @classmethod
    def chosen(cls, program: fx.GraphModule | Rolled, options: Options) -> Streams:
        """As the options say."""
        return cls(program, options.stream_limit if options.multistream == "auto" else 1)

    def __init__(self, program: fx.GraphModule | Rolled, limit: int) -> None:
        self._graph, self._limit = program.graph, limit
        self._streams: list[Any] = []

    def plan(self, arguments: Sequence[Any]) -> StreamPlan | None:
        """The plan for a call with these arguments, proved; None where one stream is estimated to be as good.

        Raises:
            PlanError: the plan is wrong; nothing was captured.
        """
        if self._limit == 1:
            return None
        plan = schedule(self._dependencies, self._sizes(arguments), self._limit)
        if plan is not None:
            verify(self._graph, plan)
        return plan

    @functools.cached_property
    def _dependencies(self) -> Dependencies:
        return Dependencies.of(self._graph)

    def of(self, plan: StreamPlan | None) -> list[Any]:
        """The streams of a plan, the captured one first: the default stream can't be captured."""
        while len(self._streams) < (plan.streams if plan is not None else 1):
            self._streams.append(torch.npu.Stream())
        return self._streams

    def beside(self, main: Any, plan: StreamPlan) -> list[Any]:
        """The streams of a plan whose main one is given."""
        return [main, *(stream for stream in self.of(plan) if stream != main)][: plan.streams]

    def text(self, arguments: Sequence[Any]) -> str:
        """The sizes of a call in words; "static" for a program that has none."""
        return ", ".join(f"{symbol}={size}" for symbol, size in self._sizes(arguments).items()) or "static"

    def _sizes(self, arguments: Sequence[Any]) -> dict[sympy.Symbol, int]:
        placeholders = self._graph.find_nodes(op="placeholder")
        return sizes_of(dict(zip(placeholders, arguments, strict=True)))


class StreamRunner(Labeller):
    """Runs the program call by call, each on the stream that the plan gives it, so that a refused call can be named.

    Args:
        plan: None runs everything on the current stream.
        streams: the plan's streams; the first is the one that is captured.
        repeats: as of a Labeller.
    """

    def __init__(
        self,
        program: fx.GraphModule | Rolled,
        labels: Labels,
        plan: StreamPlan | None,
        streams: Sequence[Any],
        repeats: bool = False,
    ) -> None:
        super().__init__(program, labels, streams[MAIN], repeats)
        self._plan, self._streams = plan, streams
        if plan is not None:
            self._steps = {step.node: step for step in plan.steps}
            self._events = [torch.npu.Event() for _ in range(plan.events)]
            # The interpreter lets go of a value after its last reader; on several streams that can be too early.
            self.user_to_last_uses = {node: list(gone) for node, gone in plan.releases.items()}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self._plan is None:
            return super().run(*args, **kwargs)
        self._events[FORK].record(self._streams[MAIN])
        result = super().run(*args, **kwargs)
        for event in self._plan.joins:
            self._streams[MAIN].wait_event(self._events[event])
        return result

    def call(self, n: fx.Node) -> Any:
        """Runs a node on its stream, behind what the plan says it waits for."""
        step = self._steps.get(n) if self._plan is not None else None
        if step is None:
            return super().call(n)
        stream = self._streams[step.stream]
        for event in step.waits:
            stream.wait_event(self._events[event])
        with torch.npu.stream(stream):
            result = super().call(n)
        if step.record:
            self._events[step.record].record(stream)
        return result


def summary(plan: StreamPlan | None) -> str:
    """A plan in the words of the ledger; empty for one stream."""
    if plan is None:
        return ""
    return f"{plan.streams} streams, estimated {plan.microseconds:.1f} us instead of {plan.alone:.1f}"
