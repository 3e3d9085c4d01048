"""Liveness and memory plans: no overlap for any size, and the peak that torch_npu's allocator really has."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler.backend import ascend
from npu_compiler.facts.engine import Facts
from npu_compiler.plan import amounts, memory
from npu_compiler.plan.amounts import Amounts
from npu_compiler.plan.liveness import Lifetime, Storages
from tests.plan.programs import Program, programs

aten = torch.ops.aten
S, T = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "st")
FACTS = Facts([S >= 2, S <= 512, T >= 3])
SIZES = st.builds(
    lambda a, b, c, d, e: a * S + b * T + c * S * T + d * S**2 + e,
    *(st.sampled_from(values) for values in ((0, 4, 512, 2048), (0, 0, 12), (0, 0, 8), (0, 0, 4), (0, 1, 1000, 65536))),
)


@st.composite
def lives(draw: st.DrawFn) -> list[Lifetime]:
    found = []
    for index in range(draw(st.integers(1, 14))):
        first = draw(st.integers(0, 12))
        found.append((first, first + draw(st.integers(0, 6)), draw(SIZES), index))
    found.sort(key=lambda entry: entry[0])
    return [Lifetime(f"x{index}", size, first, last, False) for first, last, size, index in found]


def planned(found: list[Lifetime]) -> memory.MemoryPlan:
    of = Amounts(FACTS)
    return memory.MemoryPlan(memory.placed(found, of), of)


@settings(max_examples=60)
@given(lives(), st.integers(1, 512), st.integers(3, 5000))
def test_no_two_live_storages_overlap_whatever_the_sizes(found: list[Lifetime], s: int, t: int) -> None:
    plan, sizes = planned(found), {S: s, T: t}
    assert not memory.overlaps(plan, sizes)
    spans = list(zip(plan.offsets(sizes), plan.extents(sizes), found, strict=True))
    exact = [int(life.bytes.subs(sizes)) for life in found]
    for index, (offset, size, one) in enumerate(spans):  # the checker itself, checked pair by pair
        assert offset >= 0 and offset % 32 == 0 and size >= exact[index]
        for other_offset, other_size, other in spans[:index]:
            if one.first <= other.last and other.first <= one.last:
                assert offset >= other_offset + other_size or other_offset >= offset + size
    assert plan.peak(sizes) == max(offset + size for offset, size, _ in spans)
    taken = [-(-(size + 32) // 512) * 512 if life.bytes != 0 else 0 for size, life in zip(exact, found, strict=True)]
    together = [
        sum(size for size, life in zip(taken, found, strict=True) if life.first <= step <= life.last)
        for step in range(20)
    ]
    assert plan.live(sizes) == max(together) <= plan.peak(sizes)


def test_checker_sees_an_overlap() -> None:
    found = [Lifetime("a", 512 * S, 0, 2, False), Lifetime("b", 512 * S, 1, 3, False)]
    of = Amounts(FACTS)
    room = of.room(512 * S)
    wrong = memory.MemoryPlan([memory.Block(life, room, room, ()) for life in found], of)
    ((one, other),) = memory.overlaps(wrong, {S: 4})
    assert {one.lifetime.name, other.lifetime.name} == {"a", "b"}


def test_sizes_below_the_smallest_are_refused() -> None:
    plan = planned([Lifetime("a", 8 * T, 0, 1, False)])
    assert plan.peak({T: 3})
    with pytest.raises(ValueError, match="below 3"):
        plan.peak({T: 2})


def test_unknown_order_goes_above_both() -> None:
    """Whether 512*s or 512*t is larger is unknown: what comes above both is above either."""
    of = Amounts(FACTS)
    both = amounts.upper(of.room(512 * S), of.room(512 * T))
    for s, t in ((2, 5000), (512, 3)):
        bound, one, other = of.evaluate([both, of.room(512 * S), of.room(512 * T)], {S: s, T: t})
        assert bound >= max(one, other)
    assert not amounts.covers(of.room(512 * S), of.room(512 * T))


def test_views_and_writes_in_place_live_with_their_storage() -> None:
    program = Program()
    x, _ = program.values
    made = program.add(aten.relu.default, x)
    view = program.add(aten.t.default, made)
    other = program.add(aten.sin.default, x)
    written = program.add(aten.add_.Tensor, view, other)
    result = program.add(aten.neg.default, written)
    module = program.done([result])
    nodes = list(module.graph.nodes)
    found = {life.name: life for life in Storages(nodes, "cpu").lifetimes(nodes)}
    assert list(found) == [made.name, other.name, result.name], "a view allocates nothing, inputs are the caller's"
    assert found[made.name].last == nodes.index(result)
    assert found[other.name].last == nodes.index(written)
    assert found[result.name].returned


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_formula_follows_the_batch(rows: int) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.relu() * 2).sum(-1)

    module = make_fx(function, tracing_mode="symbolic")(torch.rand(12, 256))
    plan = memory.plan(module.graph, "cpu")
    batch = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.expr
    hidden = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1].node.expr
    sizes = {batch: rows, hidden: 256}
    assert plan.live(sizes) == 2 * (rows * 1024 + 512)
    assert plan.live_formula.subs(sizes) == plan.live(sizes)
    assert plan.peak_formula.subs(sizes) == plan.peak(sizes)
    assert str(plan) == str(memory.plan(module.graph, "cpu")), "the same program gives the same text"


@settings(max_examples=15)
@given(programs(largest=16))
def test_peak_is_the_allocators(module: torch.fx.GraphModule) -> None:
    """Random programs with views and writes in place, call by call on the device."""
    inputs = [torch.rand(8, 8).npu() for _ in module.graph.find_nodes(op="placeholder")]
    module.recompile()
    assert allocator_peak(lambda: module(*inputs)) == memory.plan(module.graph, "cpu").live({})


def test_peak_of_a_compiled_block_for_every_batch() -> None:
    def block(x: torch.Tensor, norm: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            h = norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            gate, value = (h @ up).chunk(2, dim=-1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down
        return x

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="ascend", options={"capture": False})
    weights = [torch.rand(96).npu(), torch.rand(96, 384).npu(), torch.rand(192, 96).npu()]
    for rows in (24, 3, 200):
        x = torch.rand(rows, 96).npu()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            compiled(x, *weights)
            measured = allocator_peak(lambda x=x: compiled(x, *weights))
        graph = ascend.compiled()[-1]
        assert graph.memory is not None and graph.graph is not None
        sizes = dict.fromkeys(graph.memory.peak_formula.free_symbols, rows)
        assert len(sizes) == 1, "one program serves every batch"
        assert graph.memory.live(sizes) == measured
        assert measured <= graph.memory.peak(sizes) <= 1.25 * measured + 2048
        assert not memory.overlaps(graph.memory, sizes)


def allocator_peak(call: Callable[[], Any]) -> int:
    """Bytes that a call needs at once, by torch_npu's own count."""
    call()
    gc.collect()
    torch.npu.synchronize()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    result = call()
    torch.npu.synchronize()
    peak = torch.npu.max_memory_allocated() - before
    del result
    return peak
