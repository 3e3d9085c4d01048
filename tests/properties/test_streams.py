"""Random programs behind the passes, on several streams of one captured graph: replays with other values equal a plain
call, and a plan that lacks an event is found out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, assume, note
from torch import Tensor, fx

from npu_compiler.aclgraph.capture import capture
from npu_compiler.aclgraph.streams import Streams
from npu_compiler.config import Options
from npu_compiler.errors import PlanError
from npu_compiler.passes import pipeline
from npu_compiler.plan.accesses import Accesses, accesses
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.order import arrange
from npu_compiler.plan.schedule import StreamPlan, place
from tests.properties.decode import Drawn, decode, drawn
from tests.properties.fragments import HALVES
from tests.properties.graphs import Built
from tests.properties.seeded import try_all
from tests.properties.stages import PASSES
from tests.properties.streams import FREE_EVENTS, STREAMS

REPLAYS = 3
USED: Counter[int] = Counter()
"""How many captured programs used so many streams."""
FOUND: Counter[str] = Counter()
"""What became of the events left out."""


def planned(numbers: Drawn) -> tuple[Built, fx.GraphModule, StreamPlan]:
    """A program behind the passes, on as many streams as it can use; one that can't use two is given up."""
    (built,) = decode(numbers)
    note(repr(built.program))
    module = built.module
    for entry in PASSES:
        pipeline.run_pass(entry, module, Options())
    arrange(module.graph)
    module.recompile()
    plan = place(Dependencies.of(module.graph), {}, STREAMS, FREE_EVENTS)
    verify(module.graph, plan)
    assume(plan.streams > 1)
    return built, module, plan


def check_replays(numbers: Drawn) -> None:
    """Each replay has other values at the addresses of the capture."""
    built, module, plan = planned(numbers)
    USED[plan.streams] += 1
    held = built.arguments(0)
    streams = Streams(module, plan.streams).of(plan)
    pool = torch.npu.graph_pool_handle()
    made = capture(module, held, name="random", pool=pool, streams=streams, error_mode="thread_local", plan=plan)
    for index in range(REPLAYS):
        for buffer, value in zip(held, built.arguments(1 + index), strict=True):
            if isinstance(buffer, Tensor):
                each_element_once(buffer).copy_(each_element_once(value))
        made.graph.replay()
        torch.npu.synchronize()
        fresh = built.arguments(1 + index)
        expected = [*module(*fresh), *(item for item in fresh if isinstance(item, Tensor))]
        got = [*made.outputs, *(item for item in held if isinstance(item, Tensor))]
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left.cpu(), right.cpu(), rtol=0, atol=0, equal_nan=True)


def each_element_once(tensor: Tensor) -> Tensor:
    """An expanded tensor before it was expanded: what can be written."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def check_lost_events(numbers: Drawn) -> None:
    """Every wait of the plan is left out in turn; the checker must find each one that leaves two calls in no order."""
    _, module, plan = planned(numbers)
    touched = [accesses(step.node) for step in plan.steps]
    for broken in without_an_event(plan):
        race = first_race(broken, touched)
        try:
            verify(module.graph, broken)
        except PlanError as error:
            FOUND["found"] += 1
            if race:
                FOUND["races"] += 1
            assert "event" in str(error) or "wait" in str(error)
        else:
            assert not race, f"not found: {race}\n{broken}"
            FOUND["needless"] += 1


def without_an_event(plan: StreamPlan) -> Iterator[StreamPlan]:
    """The plan without each single wait, the joins at the end among them."""
    for index, step in enumerate(plan.steps):
        for event in step.waits:
            left = dataclasses.replace(step, waits=tuple(other for other in step.waits if other != event))
            yield dataclasses.replace(plan, steps=(*plan.steps[:index], left, *plan.steps[index + 1 :]))
    for event in plan.joins:
        yield dataclasses.replace(plan, joins=tuple(other for other in plan.joins if other != event))


def first_race(plan: StreamPlan, touched: Sequence[Accesses]) -> str:
    """Two calls that touch the same memory, one writing, in no order; "" without any. By reachability, as set of calls,
    where the checker has vector clocks."""
    behind: list[set[int]] = []
    last: dict[int, int] = {}
    recorded: dict[int, int] = {}
    for index, step in enumerate(plan.steps):
        before = {last[step.stream]} if step.stream in last else set()
        before |= {recorded[event] for event in step.waits if event in recorded}
        behind.append(before.union(*(behind[other] for other in before)))
        last[step.stream] = index
        if step.record:
            recorded[step.record] = index
        for other in range(index):
            one, two = touched[other], touched[index]
            conflict = one.writes & (two.reads | two.writes) | one.reads & two.writes
            if conflict and other not in behind[index]:
                return f"{plan.steps[other].node.name} and {step.node.name}"
    return ""


def run(check: Callable[[Drawn], None], count: int, number: int) -> None:
    try_all(check, drawn(most_steps=12, dtypes=HALVES), count, number, suppress=[HealthCheck.filter_too_much])


def test_replays_on_several_streams() -> None:
    run(check_replays, 40, 901)
    assert sum(USED.values()) >= 24, f"dozens should use several streams: {USED}"


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_many_replays_on_several_streams() -> None:
    run(check_replays, 1000, 902)


def test_a_lost_event_is_found() -> None:
    run(check_lost_events, 72, 903)
    assert FOUND["races"] >= 24, f"most waits are needed: {FOUND}"
