"""Plans captured and replayed on the device in the host runtime's checking mode, which delays tasks at random and
reports every pair that touches the same memory in no order: `NPU_COMPILER_HOST=check=on python -m
tests.plan.captured_checks FILE`. FILE receives a JSON object from check to "" or to what went wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import npu_compiler
from npu_compiler.aclgraph.capture import capture
from npu_compiler.aclgraph.streams import Streams
from npu_compiler.backend import CompiledGraph, ascend, compile_fx
from npu_compiler.graph.device import Device
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import StreamPlan, place
from npu_compiler.runtime import counters
from tests.plan.programs import SIDE, Program, two_branches

aten = torch.ops.aten


def branches(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    left, right = x, x
    for _ in range(4):
        left = torch.relu(left @ weight) / 8
        right = (right * 1.5).sin()
    return left + right, right * 2


def check_two_branches_in_one_captured_graph() -> None:
    before = counters.read()
    compiled = torch.compile(branches, backend="ascend", options={"multistream": "auto", "check": True})
    for step in range(4):
        x, weight = torch.rand(32, 16) + step, torch.rand(16, 16)
        for got, expected in zip(compiled(x.npu(), weight.npu()), branches(x, weight), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    after = counters.read()
    assert "2 streams, estimated" in npu_compiler.report(), npu_compiler.report()
    assert after["graph_launches"] - before["graph_launches"] == 3
    assert after["captures"] - before["captures"] == 1


def check_streams_inside_a_capture_of_somebody_else() -> None:
    """As vLLM captures: the program is compiled without captures, and called inside of one."""
    torch._dynamo.reset()
    made: list[CompiledGraph] = []

    def uncaptured(gm: fx.GraphModule, inputs: list[Any]) -> CompiledGraph:
        made.append(compile_fx(gm, inputs, {"multistream": "auto", "capture": False}))
        return made[0]

    compiled = torch.compile(branches, backend=uncaptured)
    x, weight = torch.rand(32, 16).npu(), torch.rand(16, 16).npu()
    compiled(x, weight)
    assert not made[0].streams, "outside of a capture there is one stream"
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        outputs = compiled(x, weight)
        graph.capture_end()
    assert list(made[0].streams) == ["static"]
    assert "captured static: 2 streams, estimated" in str(made[0])
    for step in range(3):
        values = torch.rand(32, 16) + step
        x.copy_(values)
        torch.npu.synchronize()
        graph.replay()
        torch.npu.synchronize()
        for got, expected in zip(outputs, branches(values, weight.cpu()), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def check_each_shape_has_its_plan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(branches, backend="ascend", dynamic=True, options={"multistream": "auto"})
    weight = torch.rand(16, 16)
    for rows in (8, 8192, 8, 8192, 8, 8192):
        x = torch.rand(rows, 16)
        for got, expected in zip(compiled(x.npu(), weight.npu()), branches(x, weight), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    (last,) = [entry for entry in ascend.compiled() if entry.ledger is not None and len(entry.ledger.captures) == 2]
    assert last.ledger is not None
    texts = [entry.streams for entry in last.ledger.captures]
    assert texts[0] != texts[1], texts


def check_shapes_with_outputs_in_one_place_on_two_streams() -> None:
    """Outputs of several shapes share memory, and the calls come from two streams in turn."""
    torch._dynamo.reset()
    compiled = torch.compile(branches, backend="ascend", dynamic=True)
    weight, side, results = torch.rand(16, 16), torch.npu.Stream(), []
    for index, rows in enumerate((64, 8, 32, 16) * 4):
        x = torch.rand(rows, 16)
        on_device = x.npu()
        torch.npu.synchronize()
        with torch.npu.stream(side if index % 2 else torch.npu.default_stream()):
            results.append((compiled(on_device, weight.npu()), x))
    torch.npu.synchronize()
    for given, x in results:
        for got, expected in zip(given, branches(x, weight), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def check_random_programs() -> None:
    """Programs with writes in place and views, on three streams, replayed with new inputs each time."""
    used = 0
    for seed in range(12):
        module = random_program(seed)
        plan = place(Dependencies.of(module.graph), {}, 3, Device(event=0.0))
        verify(module.graph, plan)
        used += plan.streams > 1
        replayed(module, plan, rounds=3)
    assert used >= 6, "most programs should have used side streams"


def check_a_removed_event_is_a_race() -> None:
    """The counterpart: without the last wait the same program races, and the checking mode says so."""
    module = two_branches()
    plan = place(Dependencies.of(module.graph), {}, 2, Device())
    replayed(module, plan)
    before = counters.read()["races"]
    last = dataclasses.replace(plan.steps[-1], waits=())
    side = next(step for step in reversed(plan.steps) if step.record)
    broken = dataclasses.replace(plan, steps=(*plan.steps[:-1], last), joins=(side.record,))
    with contextlib.suppress(AssertionError):  # the race may show in the numbers too
        replayed(module, broken)
    assert counters.read()["races"] > before, "the checking mode must see the race"


def random_program(seed: int) -> fx.GraphModule:
    choices, program = random.Random(seed), Program()
    for _ in range(16):
        target = choices.choice([aten.sin.default, aten.add.Tensor, aten.mm.default, aten.add_.Tensor, aten.t.default])
        count = 1 if target in (aten.sin.default, aten.t.default) else 2
        arguments = [choices.choice(program.values) for _ in range(count)]
        if target is aten.add_.Tensor:
            arguments[1] = program.add(aten.sin.default, arguments[1])  # torch refuses to add a view of itself
        program.add(target, *arguments)
    return program.done(program.values[-3:])


def replayed(module: fx.GraphModule, plan: StreamPlan, rounds: int = 2) -> None:
    """Captures `module` by `plan` and compares each replay with a run on the CPU."""
    streams = Streams(module, plan.streams).of(plan)
    count = len(module.graph.find_nodes(op="placeholder"))
    held = [torch.zeros(SIDE, SIDE).npu() for _ in range(count)]
    pool = torch.npu.graph_pool_handle()
    made = capture(module, held, name="test", pool=pool, streams=streams, error_mode="thread_local", plan=plan)
    for index in range(rounds):
        torch.manual_seed(index)
        inputs = [torch.rand(SIDE, SIDE) / SIDE for _ in range(count)]
        for buffer, value in zip(held, inputs, strict=True):
            buffer.copy_(value)
        made.graph.replay()
        torch.npu.synchronize()
        expected = module(*inputs)
        for got, want in zip((*made.outputs, *held), (*expected, *inputs), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)


def main() -> None:
    checks: dict[str, Any] = {name: item for name, item in globals().items() if name.startswith("check_")}
    results = {}
    with torch.inference_mode():
        for name, check in checks.items():
            try:
                races = counters.read()["races"]
                check()
                expected_race = name == "check_a_removed_event_is_a_race"
                assert expected_race or counters.read()["races"] == races, "the checking mode found a race"
                results[name] = ""
            except Exception:  # noqa: BLE001  every failure is reported by name, whatever it is
                results[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
