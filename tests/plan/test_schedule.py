"""Streams: what the scheduler plans, that the plan keeps the program's meaning in any order the device may run it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from npu_compiler.errors import PlanError
from npu_compiler.graph.device import Device
from npu_compiler.graph.traffic import launches
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.engines import Engine, engine_of
from npu_compiler.plan.estimate import estimate
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import FORK, MAIN, StreamPlan, place, schedule
from tests.plan.programs import IN_PLACE, SIDE, Program, programs, two_branches

aten = torch.ops.aten
EAGER = Device(event=0.0)
"""Events for nothing: the scheduler forks wherever it can."""
QUICK = settings(max_examples=100)


def test_two_branches_use_two_streams() -> None:
    program = two_branches()
    plan = schedule(Dependencies.of(program.graph), {}, 2)
    assert plan is not None
    verify(program.graph, plan)
    streams = {step.node.name: step.stream for step in plan.steps}
    assert {streams[name] for name in streams if name.startswith("mm")} == {0}
    assert {streams[name] for name in streams if name.startswith("sin")} == {1}
    assert plan.microseconds < 0.8 * plan.alone
    (first,) = [step for step in plan.steps if step.stream == 1][:1]
    assert first.waits == (FORK,), "a side stream begins behind the start of the capture"
    assert plan.steps[-1].waits, "the sum waits for the other branch"


def test_a_chain_stays_on_one_stream() -> None:
    program = Program(inputs=1)
    value = program.values[0]
    for _ in range(6):
        value = program.add(aten.sin.default, value)
    assert schedule(Dependencies.of(program.done([value]).graph), {}, 4) is None


def test_a_full_engine_gains_nothing() -> None:
    """Two branches that each fill the vector cores would only share them."""
    program = Program(inputs=1, side=4096)
    left = right = program.values[0]
    for _ in range(3):
        left = program.add(aten.sin.default, left)
        right = program.add(aten.relu.default, right)
    assert schedule(Dependencies.of(program.done([left, right]).graph), {}, 2) is None


def test_stream_limit() -> None:
    program = Program(inputs=1)
    outputs = []
    for _ in range(6):
        value = program.values[0]
        for _ in range(5):
            value = program.add(aten.sin.default, value)
        outputs.append(value)
    module = program.done(outputs)
    used = [
        plan.streams for limit in (2, 3, 4) if (plan := schedule(Dependencies.of(module.graph), {}, limit)) is not None
    ]
    assert used == [2, 3, 4]


def test_memory_is_kept_until_its_own_stream_is_behind_the_reader() -> None:
    """A value made on the side stream and read on the main one: letting go of it at its last reader is too early."""
    program = Program(inputs=1)
    right = program.values[0]
    for _ in range(4):
        right = program.add(aten.sin.default, right)
    left = program.add(aten.mm.default, program.values[0], program.values[0])
    for _ in range(3):
        left = program.add(aten.mm.default, left, program.values[0])
    left = program.add(aten.add.Tensor, left, right)
    for _ in range(3):
        left = program.add(aten.mm.default, left, program.values[0])
    other = program.add(aten.relu.default, program.values[0])
    module = program.done([left, other])
    plan = place(Dependencies.of(module.graph), {}, 2, EAGER)
    verify(module.graph, plan)
    streams = {step.node: step.stream for step in plan.steps}
    reader = next(node for node in streams if node.name == "add_tensor")
    crossing = [node for node in reader.all_input_nodes if streams[node] != streams[reader]]
    assert len(crossing) == 1, str(plan)
    early = {reader: (*plan.releases.get(reader, ()), crossing[0])}
    early = {
        **{node: tuple(item for item in gone if item is not crossing[0]) for node, gone in plan.releases.items()},
        **early,
    }
    with pytest.raises(PlanError, match=f"the memory of {crossing[0].name} is let go after {reader.name}"):
        verify(module.graph, dataclasses.replace(plan, releases=early))


@QUICK
@given(programs(), st.integers(2, 4))
def test_plans_are_proved_and_keep_every_call(program: fx.GraphModule, streams: int) -> None:
    plan = place(Dependencies.of(program.graph), {}, streams, EAGER)
    verify(program.graph, plan)
    assert [step.node for step in plan.steps] == [node for node in program.graph.nodes if launches(node)]
    assert plan.streams <= streams


@QUICK
@given(programs(), st.integers(2, 4), st.randoms(use_true_random=False))
def test_any_order_the_device_may_choose_gives_the_same(
    program: fx.GraphModule, streams: int, choices: random.Random
) -> None:
    """Runs the calls on real numbers in a random order that streams and events allow, writes in place included."""
    plan = place(Dependencies.of(program.graph), {}, streams, EAGER)
    inputs = [torch.linspace(-1, 1, SIDE * SIDE, dtype=torch.float64).view(SIDE, SIDE) / (1 + i) for i in range(2)]
    expected, written = run(program, [step.node for step in plan.steps], inputs)
    got, changed = run(program, shuffled(plan, choices), inputs)
    for left, right in zip((*expected, *written), (*got, *changed), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True)


@QUICK
@given(programs())
def test_every_wait_is_needed(program: fx.GraphModule) -> None:
    """On two streams no wait is there for nothing: without any one of them, the check has a counterexample."""
    plan = place(Dependencies.of(program.graph), {}, 2, EAGER)
    for index, step in enumerate(plan.steps):
        for event in step.waits:
            fewer = dataclasses.replace(step, waits=tuple(item for item in step.waits if item != event))
            steps = (*plan.steps[:index], fewer, *plan.steps[index + 1 :])
            with pytest.raises(
                PlanError, match=f"{step.node.name} has to wait for|{step.node.name} begins stream|is let go"
            ):
                verify(program.graph, dataclasses.replace(plan, steps=steps))
    if plan.joins:
        with pytest.raises(PlanError, match="is not joined"):
            verify(program.graph, dataclasses.replace(plan, joins=()))


@QUICK
@given(st.data())
def test_same_program_same_plan(data: st.DataObject) -> None:
    """Built twice, at other addresses: the same text."""
    seed = data.draw(st.integers(0, 2**16))
    plans = [str(place(Dependencies.of(rebuilt(seed)), {}, 3, EAGER)) for _ in range(2)]
    assert plans[0] == plans[1]


def rebuilt(seed: int) -> fx.Graph:
    choices, program = random.Random(seed), Program()
    for _ in range(12):
        target = choices.choice([aten.sin.default, aten.add.Tensor, aten.mm.default, aten.add_.Tensor, aten.t.default])
        count = 1 if target in (aten.sin.default, aten.t.default) else 2
        program.add(target, *(choices.choice(program.values) for _ in range(count)))
    return program.done(program.values[-2:]).graph


def shuffled(plan: StreamPlan, choices: random.Random) -> list[fx.Node]:
    """An order of the calls in which each stream keeps its own and waits for its events."""
    queues: dict[int, list[int]] = {}
    for index, step in enumerate(plan.steps):
        queues.setdefault(step.stream, []).append(index)
    recorded, order = {FORK}, []
    while any(queues.values()):
        ready = [queue for queue in queues.values() if queue and recorded.issuperset(plan.steps[queue[0]].waits)]
        step = plan.steps[choices.choice(ready).pop(0)]
        order.append(step.node)
        recorded.add(step.record)
    return order


def run(module: fx.GraphModule, order: list[fx.Node], inputs: list[torch.Tensor]) -> tuple[list, list]:  # type: ignore[type-arg]
    """Executes the launches in `order`; views are looked at when a launch needs them. Returns outputs and inputs."""
    placeholders = module.graph.find_nodes(op="placeholder")
    values = {node: value.clone() for node, value in zip(placeholders, inputs, strict=True)}

    def value(node: fx.Node) -> torch.Tensor:
        if node not in values:
            args = list(fx.node.map_arg(node.args, value))  # type: ignore[arg-type, call-overload]
            if node.target in IN_PLACE:
                args[1] = args[1].clone()  # torch refuses to add a view of itself
            values[node] = node.target(*args)  # type: ignore[operator]
        return values[node]

    for node in order:
        value(node)
    return [value(node) for node in module.graph.output_node().args[0]], [values[node] for node in placeholders]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "count", "engine"),
    [
        (aten.mm.default, 2, Engine.MATRIX),
        (aten.sin.default, 1, Engine.VECTOR),
        (aten.clone.default, 1, Engine.COPY),
        (aten.t.default, 1, Engine.HOST),
        (aten.empty_like.default, 1, Engine.HOST),
    ],
)
def test_engines(target: torch._ops.OpOverload, count: int, engine: Engine) -> None:
    program = Program()
    assert engine_of(program.add(target, *program.values[:count])) is engine


def test_estimates_follow_the_device() -> None:
    """A large product is bound by the matrix unit, a large addition by memory."""
    side, device = 4096, Device()
    program = Program(side=side)
    product, total = (program.add(target, *program.values[:2]) for target in (aten.mm.default, aten.add.Tensor))
    assert estimate(product, {}, device).microseconds == pytest.approx(device.launch + 2 * side**3 / device.matrix)
    assert estimate(total, {}, device).microseconds == pytest.approx(device.launch + 3 * 4 * side**2 / device.memory)


def test_hidden_effects_stay_on_the_main_stream_in_order() -> None:
    with torch.library._scoped_library("plan_test", "DEF") as library:
        library.define("note(Tensor x) -> ()")
        library.impl("note", lambda x: None, "Meta")
        program = Program(inputs=1)
        values = []
        for _ in range(3):
            value = program.values[0]
            for _ in range(3):
                value = program.add(aten.sin.default, value)
            values.append(value)
            program.add(torch.ops.plan_test.note.default, value)
            program.values.pop()
        draws = [program.add(aten.rand_like.default, program.values[0]) for _ in range(2)]
        module = program.done([*values, *draws])
        plan = place(Dependencies.of(module.graph), {}, 3, EAGER)
        verify(module.graph, plan)
        pinned = [step for step in plan.steps if "note" in step.node.name or "rand" in step.node.name]
        assert len(pinned) == 5
        assert all(step.stream == MAIN for step in pinned)
