"""Inputs of a replay, its reference, its verdicts, and the parts of the compiler that it runs by halves."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph.device import Device
from npu_compiler.inspect import bundle, collectives, partly, reference, undefined
from npu_compiler.inspect.from_graph import program_of
from npu_compiler.inspect.judge import Expected, Seen, judge
from npu_compiler.inspect.minify import calls_in, shrink
from npu_compiler.inspect.program import Program
from npu_compiler.inspect.rerun import rerun
from npu_compiler.inspect.to_graph import graph_of
from npu_compiler.inspect.values import Values
from npu_compiler.passes import pipeline, sequence_parallel
from npu_compiler.passes.record import PassRecord
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import place
from tests import world
from tests.inspect.planted import defects
from tests.passes.lowered import lowered

aten = torch.ops.aten


def normed(x: Tensor, weight: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    cache[1:3] = y[:2]
    gate, up = (y @ y.t()).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up, (x + x).float().sum(-1)


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(4, 8, dtype=dtype).npu(),
        torch.randn(8, dtype=dtype).npu(),
        torch.zeros(6, 8, dtype=dtype).npu(),
    ]


def program(dtype: torch.dtype = torch.float32) -> Program:
    return program_of(lowered(normed, *arguments(dtype)).graph.graph)


def test_saved_inputs_share_memory_as_they_did(tmp_path: Path) -> None:
    base = torch.arange(12.0).npu()
    table = torch._dynamo.mark_static_address
    weight = torch.full((4,), 2.0).npu()
    table(weight)
    torch._dynamo.reset()

    def shifted(left: Tensor, right: Tensor, by: Tensor) -> Tensor:
        return left[:4] * by + right[:4]

    options = {"dump": str(tmp_path), "dump_inputs": "call"}
    with torch.inference_mode():
        torch.compile(shifted, backend="ascend", options=options)(
            base[2:8], base[4:].view(2, 4).t().reshape(-1), weight
        )
        torch._dynamo.reset()
        torch.compile(shifted, backend="ascend", options=options)(base[2:8], base[4:], weight)
    graph = bundle.open(tmp_path).graphs[-1]
    stored = graph.program(graph.stages[0])
    values = Values(stored, graph.inputs, graph.tensors())
    for turn in (0, 1):
        given = values.arguments(values.memory(turn))
        shared = [item for item in given if item.numel() > 4]
        assert len({item.untyped_storage().data_ptr() for item in shared}) == 1
        left, right = sorted(shared, key=lambda item: item.storage_offset())
        assert torch.equal(left[2:], right[: left.numel() - 2])
        assert (torch.equal(left.cpu(), base[2:8].cpu())) == (turn == 0)
    assert len(values.made_up) == 1
    wide = values.in_float64(0)
    assert wide is not None
    assert {item.dtype for item in wide} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_float64(dtype: torch.dtype) -> None:
    graph = graph_of(program(dtype))
    given = [item.cpu().double() for item in arguments(dtype)]
    expected_given = [item.clone() for item in given]
    outputs, on_device = reference.run(graph, given)
    expected = normed(*expected_given)
    assert not on_device
    assert {item.dtype for item in outputs} == {torch.float64}
    for got, wanted in zip(outputs, (*expected[:1], expected[1]), strict=True):
        assert float((got - wanted).abs().max()) < 1e-6  # .float() of the program stays wide
    assert torch.equal(given[2], expected_given[2])


def test_a_conversion_of_torch_npu_stays_wide() -> None:
    graph = lowered(lambda x: torch.ops.npu.npu_dtype_cast(x, torch.bfloat16) * 2, torch.rand(4, 8).npu()).graph
    x = torch.rand(4, 8, dtype=torch.float64)
    (found,), on_device = reference.run(graph, [x])
    assert not on_device
    assert torch.equal(found, x * 2)


def test_memory_that_a_program_returns_unwritten_is_zero() -> None:
    x = torch.rand(4).npu()
    module = lowered(lambda x: (x + 1, torch.empty(64, device=x.device)), x).graph
    undefined.fill(module)
    one, other = module(x)
    assert torch.equal(one, x + 1)
    assert other.shape == (64,) and not other.any()
    assert "aten.zeros.default" in [str(node.target) for node in module.graph.nodes]


BASE = torch.tensor([1.0, -2.0, 4.0, float("inf")])


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, ""),
        ({"outputs": [BASE * (1 + 2e-7)]}, ""),
        ({"outputs": [BASE + torch.tensor([1e-4, 0.0, 0.0, 0.0])]}, "1 of 4 elements are"),
        ({"outputs": [torch.where(BASE == 4.0, float("nan"), BASE)]}, "1 infinities or NaNs"),
        ({"outputs": [torch.where(BASE.isinf(), 0.0, BASE)]}, "1 infinities or NaNs"),
        ({"outputs": [BASE.double()]}, "is float64[4], not float32[4]"),
        ({"outputs": [BASE[:3]]}, "is float32[3], not float32[4]"),
        ({"outputs": []}, "are 0, not 1"),
        ({"outputs": [None]}, "is None"),
        ({"written": {}}, "was not written"),
        ({"written": {"cache": torch.tensor([1, 3])}}, "differs in 1 of 2 elements"),
        ({"written": {"cache": torch.tensor([1, 2]), "x": BASE}}, "input x was written"),
        ({"shared": frozenset({("output 0", "input x")})}, "shares memory with input x"),
    ],
)
def test_verdicts(found: dict[str, Any], text: str) -> None:
    lowered_seen = Seen([BASE], {"cache": torch.tensor([1, 2])}, frozenset())
    wide = dataclasses.replace(lowered_seen, outputs=[BASE.double()])
    said = list(judge(1, dataclasses.replace(lowered_seen, **found), Expected(lowered_seen, wide)))
    assert (len(said) == 1 and text in str(said[0])) if text else not said, said


def test_an_argmax_of_equals_may_differ() -> None:
    lowered_seen, wide = (Seen([torch.tensor([0, index])], {}, frozenset()) for index in (1, 2))
    found = Seen([torch.tensor([0, 3])], {}, frozenset())
    assert not list(judge(0, found, Expected(lowered_seen, wide)))
    assert list(judge(0, found, Expected(lowered_seen, lowered_seen)))


def communicating(x: Tensor) -> tuple[Tensor, ...]:
    functional = torch.ops._c10d_functional
    wait = functional.wait_tensor
    return (
        wait(functional.all_reduce(x, "sum", "0")) + 0.0,
        wait(functional.all_reduce(x, "max", "0")) + 0.0,
        wait(functional.all_gather_into_tensor(x, 4, "0")) + 0.0,
        wait(functional.reduce_scatter_tensor(x, "sum", 4, "0")) + 0.0,
        wait(functional.all_to_all_single(x, [1, 1, 1, 1], [1, 1, 1, 1], "0")) + 0.0,
    )


def test_collectives_run_alone_as_where_all_ranks_have_equal_values() -> None:
    module = lowered(communicating, torch.rand(4, 3).npu()).graph
    names = collectives.in_order(module.graph)
    assert len(names) == 5
    assert not collectives.disorder(module.graph, names)
    assert "in the lowered program before it" in collectives.disorder(module.graph, names[::-1])
    collectives.replace(module, 4)
    assert not collectives.in_order(module.graph)
    x = torch.rand(4, 3)
    summed, largest, gathered, scattered, exchanged = module(x.npu())
    for got, wanted in (
        (summed, x * 4),
        (largest, x),
        (gathered, torch.cat([x] * 4)),
        (scattered, x[:1] * 4),
        (exchanged, x),
    ):
        assert torch.equal(got.cpu(), wanted)


def test_what_needs_other_ranks_is_refused_by_name() -> None:
    fusion_kernels.register()
    graph = fx.Graph()
    rows, order = graph.placeholder("rows"), graph.placeholder("order")
    combine = torch.ops.npu_fused.all_to_all_combine.default
    made = graph.call_function(combine, (rows, order, order, rows, "ep:0", 2))
    made.meta["npu_origin"] = {"pass": "token_drop", "nodes": ()}
    graph.output((made,))
    with pytest.raises(OptionError, match=r"(?s)npu_fused.all_to_all_combine.default gives.*\[\"token_drop\"\]"):
        collectives.replace(fx.GraphModule(torch.nn.Module(), graph), 2)


def scattered(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
    total = torch.ops._c10d_functional.wait_tensor(total)
    return torch.ops.npu_fused.add_rms_norm(total, residual * 2, weight, 1e-6)[0]


def test_rows_in_parts_run_alone_as_the_sums_did() -> None:
    fusion_kernels.register()
    given = torch.rand(5, 3), torch.rand(5, 3), torch.rand(3)
    with world.group_of(2):
        before = make_fx(scattered, tracing_mode="fake")(*given)
        after = copy.deepcopy(before)
        sequence_parallel.run(after, PassRecord("sequence_parallel"))
    assert not collectives.disorder(after.graph, collectives.in_order(before.graph))
    for module in (before, after):
        assert collectives.in_order(module.graph)
        collectives.replace(module, 2)
        assert not collectives.in_order(module.graph)
    assert torch.equal(after(*given), before(*given))


def behind(until: pipeline.Until) -> tuple[fx.GraphModule, int]:
    module = graph_of(program())
    records = pipeline.run(module, Options(), until=until)
    return module, len(records[-1].fired)


def test_a_pass_ends_at_any_of_its_rewrites() -> None:
    """Of rules and of functions; the program is right each time."""
    given = arguments()
    expected = graph_of(program())(*[item.clone() for item in given])
    busy = []
    for index, name in enumerate(pipeline.names(pipeline.selected(Options()))):
        _, count = behind(pipeline.Until(index + 1))
        busy += [name] * bool(count)
        for most in range(count + 1):
            module, made = behind(pipeline.Until(index + 1, most))
            assert made == most
            found = module(*[item.clone() for item in given])
            for got, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(got.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-5)
    assert {"noop", "swiglu", "reinplace"} <= set(busy), busy


def test_any_part_of_the_calls_is_ordered_or_captured() -> None:
    module, _ = behind(pipeline.Until(len(pipeline.selected(Options()))))
    given = arguments()
    expected = module(*[item.clone() for item in given])
    count = sum(node.op == "call_function" for node in module.graph.nodes)
    assert count >= 6
    for index in range(count + 1):
        ordered = fx.GraphModule(module, fx.Graph())
        ordered.graph.output(ordered.graph.graph_copy(module.graph, {}))
        partly.order(ordered.graph, index)
        ordered.recompile()
        first = partly.captured_first(module, index, [], Options(), "first") if index else module
        for run in (ordered, first, first):
            for got, wanted in zip(run(*[item.clone() for item in given]), expected, strict=True):
                assert torch.equal(got.cpu(), wanted.cpu())


def test_any_part_of_a_plan_is_in_order() -> None:
    graph = lowered(defects.branches, torch.rand(32, 16).npu(), torch.rand(16, 16).npu()).graph.graph
    plan = place(Dependencies.of(graph), {}, 3, Device())
    assert plan.streams > 1
    for count in range(len(plan.steps) + 1):
        part = partly.first_steps(plan, count)
        verify(graph, part)
        assert [step.stream for step in part.steps[:count]] == [step.stream for step in plan.steps[:count]]
        assert not any(step.stream for step in part.steps[count:])


def test_what_is_left_keeps_writes_aliases_and_results() -> None:
    """Shrunk as long as an input is written through a view of it."""

    def long(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x) * 2.0
        cache[2:4].copy_(y.sin()[:2])
        return y.cos(), y.exp()

    whole = program_of(lowered(long, torch.rand(4, 64).npu(), torch.rand(8, 64).npu()).graph.graph)
    tried = []

    def holds(candidate: Program) -> bool:
        tried.append(candidate)
        graph_of(candidate)  # every candidate is a program
        targets = [call.target for call in calls_in(candidate)]
        return any(call.writes for call in candidate.calls) and "aten.sin.default" in targets

    small = shrink(whole, holds)
    assert [call.target for call in calls_in(small)] == ["aten.sin.default", "aten.copy_.default"]
    assert small.calls[-1].inputs() == []
    assert all(size <= 8 for call in small.inputs for size in call.values[0].shape)  # type: ignore[union-attr]
    assert 5 < len(tried) < 80


def test_a_step_of_the_compiler_on_a_small_program() -> None:
    def gates(x: Tensor, up: Tensor) -> list[Tensor]:
        return [aten.mul.Tensor(aten.silu.default(x), up)]

    given = [torch.randn(2, 64).npu(), torch.randn(2, 64).npu()]
    for name, state in (("FUSION", "wrong"), ("RIGHT_FUSION", "right")):
        outcome = rerun(gates, given, "planted", defects.planted(name))
        assert outcome.state == state, str(outcome)
        assert [fire.rule for fire in outcome.rewrites] == ["gated"]
    for step in ("all passes", "order", "capture"):
        assert rerun(gates, given, step).right
